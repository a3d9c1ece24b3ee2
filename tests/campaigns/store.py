"""The store misbehaves, on real NFS mounts: each fault at each stage of `create`, as a table.

    python -m tests.campaigns.store [--mounts NAME,...] [--faults NAME,...] [-- options of with-nfs]

For each mount a rig is started, and in it one VM that goes through all faults: of firmware only, or
with --guest the test guest, which tells from inside how long it stood still, beside the same with a
healthy store.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qmpsnap import Engine, Machine
from qmpsnap.engine.wishes import Wishes
from qmpsnap.errors import NotShipped
from tests.faults.bench import bench
from tests.rig.console import Heartbeat
from tests.rig.graph import status
from tests.rig.guest import booted
from tests.rig.qemu import ROOT, binary

MOUNT = Path(os.environ.get("NFS_MOUNT", "/mnt/nfs"))
WITHIN = 12.0  # seconds without progress after which the store is given up
WISHES = Wishes(max_pause=30)
MOUNTS = {
    "v4.2 hard": ("4.2", ""),
    "v4.2 soft": ("4.2", "soft,timeo=10,retrans=1"),
    "v3 hard": ("3", ""),
    "v3 soft": ("3", "soft,timeo=10,retrans=1"),
}


@dataclass(frozen=True)
class Fault:
    """What is told to the server, at which sign of `create`; and what ends it."""

    name: str
    verbs: tuple[str, ...]
    mend: tuple[str, ...] = ()
    at: str = "shipping"


STAGES = ["", "saving RAM", "packing RAM", "shipping"]
FAULTS = [
    *(Fault(f"hung ({at or 'before'})", ("pause",), ("cont",), at) for at in STAGES),
    Fault("dead (before)", ("kill",), ("start",), ""),
    Fault("dead (shipping)", ("kill",), ("start",)),
    Fault("restarted (shipping)", ("restart 1",)),
    Fault("link cut (shipping)", ("down",), ("up",)),
    Fault("full (before)", ("fill",), ("unfill",), ""),
    Fault("full (shipping)", ("fill",), ("unfill",)),
    Fault("no inodes (before)", ("use-inodes",), ("unfill",), ""),
    Fault("no inodes (saving RAM)", ("use-inodes",), ("unfill",), "saving RAM"),
    Fault("read-only (before)", ("ro",), ("rw",), ""),
    Fault("read-only (shipping)", ("ro",), ("rw",)),
    Fault("permission denied (before)", ("squash",), ("rw",), ""),
    Fault("permission denied (saving RAM)", ("squash",), ("rw",), "saving RAM"),
    Fault("slow (100 kB/s)", ("slow 100kbps",), ("fast",), "saving RAM"),
    Fault("stale (shipping)", ("stale",), ("remount",)),
]
NAMES = [one.name for one in FAULTS]
SAMPLE = ["hung (saving RAM)", "read-only (before)", "link cut (shipping)"]


@dataclass(frozen=True)
class Row:
    """*exit*: of `create`, which took *took_s* and held the VM for *pause_ms*; the guest was silent
    for *silent_ms*. *later_s*: until it was delivered after the store was mended."""

    mount: str
    fault: str
    exit: int
    took_s: float
    pause_ms: float
    silent_ms: float | None
    later_s: float | None
    said: str


def steer(words: str) -> dict[str, Any]:
    """Tell the server; one word is ours: the client mounts it anew."""
    if words == "remount":
        subprocess.run(["umount", "--lazy", MOUNT], check=True)
        line = ["mount", "-t", "nfs", "-o", os.environ["NFS_OPTIONS"], os.environ["NFS_SOURCE"]]
        subprocess.run([*line, MOUNT], check=True)
        MOUNT.joinpath(_store().name).mkdir(exist_ok=True)
        return {}
    host, port = os.environ["NFSCTL"].split(":")
    with socket.create_connection((host, int(port))) as wire:
        wire.sendall(f"{words}\n".encode())
        answer: dict[str, Any] = json.loads(wire.makefile().readline())
    assert answer["ok"], (words, answer)
    return answer


def _store() -> Path:
    return MOUNT / f"campaign-{os.getpid()}"


class _Armed:
    """The engine's report: does something when it first tells of a stage."""

    def __init__(self) -> None:
        self.at, self.then, self.fired = "", lambda: None, False

    def arm(self, at: str, then: Callable[[], None]) -> None:
        self.at, self.then, self.fired = at, then, False

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self.fired and self.at and what.startswith(self.at):
            self.fired = True
            self.then()


async def campaign(
    mount: str, faults: list[Fault], say: Callable[[Row], None], *, times: int = 1, with_guest: bool
) -> None:
    """Rows for the healthy store, and one for each fault, all of it *times* in turn. Raises
    AssertionError for a broken promise: a guest that does not run on, a spool that is not delivered
    whole."""
    folder = Path(tempfile.mkdtemp(prefix="qs"))
    _store().mkdir()
    rounds = [Fault("healthy", ()), Fault("healthy", ()), *faults] * times
    if with_guest:
        async with booted(binary("7.2"), folder) as guest:
            with Heartbeat.open(guest.heartbeat) as heart:
                scene = _Scene(mount, folder, Machine("web", guest.qmp, guest.agent), heart)
                await scene.all(rounds, lambda: status(guest.qemu.witness), say)
            assert (await guest.console.witness(within=120)).ok
    else:
        async with bench(binary("7.2"), folder, _store()) as vm:
            scene = _Scene(mount, folder, Machine("web", vm.qemu.qmp), None)
            await scene.all(rounds, lambda: asyncio.to_thread(lambda: vm.witness.status), say)
    shutil.rmtree(folder)
    shutil.rmtree(_store())


class _Scene:
    """A VM, and an engine between a local root in *folder* and the store."""

    def __init__(self, mount: str, folder: Path, machine: Machine, heart: Heartbeat | None) -> None:
        self._mount, self._machine, self._heart = mount, machine, heart
        self._armed = _Armed()
        self._engine = Engine(
            folder / "roots", _store(), store_within=WITHIN, ship_retry=0, ram_images=2,
            report=self._armed,
        )  # fmt: skip

    async def all(
        self, rounds: list[Fault], state: Callable[[], Awaitable[str]], say: Callable[[Row], None]
    ) -> None:
        await self._engine.create(self._machine, WISHES)  # the first one copies all
        for fault in rounds:
            row = await self._round(fault)
            assert await state() == "running"
            say(row)

    async def _round(self, fault: Fault) -> Row:
        def strike() -> None:
            for verb in fault.verbs:
                steer(verb)

        self._armed.arm(fault.at if fault.verbs else "", strike)
        if fault.verbs and not fault.at:
            strike()
        begun, mark, code, said = time.monotonic(), Heartbeat.mark(), 0, ""
        try:
            made: Any = await self._engine.create(self._machine, WISHES)
        except NotShipped as waiting:
            code, said, made = waiting.exit_code, str(waiting), waiting.created
        took, silent = time.monotonic() - begun, None
        if self._heart is not None:
            silent = round(self._heart.silence(mark, Heartbeat.mark()) * 1000, 1)
        assert fault.verbs or code == 0, said
        assert self._armed.fired or not fault.at or not fault.verbs, f"{fault.name} never was"
        for verb in fault.mend:
            steer(verb)
        later = await self._delivered() if code else None
        found: list[Any] = []
        if fault.mend != ("remount",):  # what came before is on a file system that is gone
            found = (await self._engine.verify("web")).findings
        assert found == [], fault.name
        return Row(
            mount=self._mount, fault=fault.name, exit=code, took_s=round(took, 1),
            pause_ms=made.pause_ms, silent_ms=silent, later_s=later, said=said,
        )  # fmt: skip

    async def _delivered(self) -> float:
        """Seconds until `ship` has delivered all: a client comes back in its own time."""
        begun = time.monotonic()
        while time.monotonic() - begun < 120:
            _, waiting = await self._engine.ship("web")
            if not waiting:
                return round(time.monotonic() - begun, 1)
        raise AssertionError(f"still not delivered: {waiting[0]}")


def _table(rows: list[Row]) -> str:
    text = "| mount | fault, and when | exit | took | pause | guest silent | delivered after |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for row in rows:
        later = "" if row.later_s is None else f"{row.later_s} s"
        silent = "" if row.silent_ms is None else f"{row.silent_ms:.0f} ms"
        text += f"| {row.mount} | {row.fault} | {row.exit} | {row.took_s} s | "
        text += f"{row.pause_ms:.0f} ms | {silent} | {later} |\n"
    return text


def _side_by_side(rows: list[Row]) -> str:
    """Of a guest that was asked several times what it felt."""
    text = "| mount | fault, and when | times | guest silent, median | longest | pause, median |\n"
    text += "|---|---|---|---|---|---|\n"
    for mount, fault in dict.fromkeys((row.mount, row.fault) for row in rows):
        these = [row for row in rows if (row.mount, row.fault) == (mount, fault)]
        silent = [row.silent_ms for row in these if row.silent_ms is not None]
        pause = statistics.median(row.pause_ms for row in these)
        text += f"| {mount} | {fault} | {len(these)} | {statistics.median(silent):.0f} ms | "
        text += f"{max(silent):.0f} ms | {pause:.0f} ms |\n"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mounts", default=",".join(MOUNTS))
    parser.add_argument(
        "--faults", default=",".join(one.name for one in FAULTS).replace(", ", "; ")
    )
    parser.add_argument("--guest", action="store_true")
    parser.add_argument("--times", type=int, default=1, help="go through all of it so often")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("rig", nargs="*", help="options of scripts/with-nfs")
    given = parser.parse_args()
    faults = [one for one in FAULTS if one.name in given.faults.split(",")]
    if given.inside:

        def say(row: Row) -> None:
            print(json.dumps(asdict(row)), flush=True)

        asyncio.run(campaign(given.mounts, faults, say, times=given.times, with_guest=given.guest))
        return 0
    rows: list[Row] = []
    code = 0
    for mount in given.mounts.split(","):
        version, options = MOUNTS[mount]
        line = [str(ROOT / "scripts/with-nfs"), "--vers", version, "--opts", options, *given.rig]
        line += ["--timeout", "1800", "--", sys.executable, "-m", "tests.campaigns.store"]
        line += ["--inside", "--mounts", mount, "--faults", given.faults]
        line += ["--times", str(given.times)] + (["--guest"] if given.guest else [])
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None
            for text in process.stdout:
                print(text, end="", file=sys.stderr)
                rows.append(Row(**json.loads(text)))
        code = code or process.returncode
    print(_table(rows))
    if given.guest and given.times > 1:
        print(_side_by_side(rows))
    return code


if __name__ == "__main__":
    sys.exit(main())
