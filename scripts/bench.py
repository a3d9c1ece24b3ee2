"""Pauses, restores and copies, ours beside a bare QMP script in the same run; prints ratios.

`scripts/bench pause restore --ram 256 1024 4096 --repeat 5 --qemu 11.1 [--output FILE]`
`scripts/bench copy --size 4096 --data 3072 --fs here xfs btrfs`: see `scripts/bench copy --help`
`scripts/bench ram --quick`: restores by RAM size, series, clones; see `scripts/bench ram --help`
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Level, RamChoice, Wishes
from scripts import bare, bench_copy, bench_ram
from scripts.measure import cpu_seconds, listening
from tests.rig.guest import Guest, blockdev, booted, disk
from tests.rig.qemu import binaries

SIZE = 64 << 20


@dataclass(slots=True)
class Row:
    """One way of doing it: each list has a figure a run, ms or seconds of CPU."""

    pause: list[float] = field(default_factory=list)
    silence: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)


async def measured(row: Row, guest: Guest, act: Callable[[], float]) -> None:
    """Run the blocking *act* once, which gives the pause."""
    before, start = cpu_seconds(guest.qemu.pid), time.monotonic()
    with listening(guest.heartbeat, row.silence):
        row.pause.append(await asyncio.to_thread(act))
    row.took.append((time.monotonic() - start) * 1000)
    row.cpu.append(cpu_seconds(guest.qemu.pid) - before)


async def pauses(qemu: Path, mib: int, load: str, repeat: int, modes: list[str]) -> dict[str, Row]:
    """Every way in turn, *repeat* times, on one guest whose RAM is mostly touched."""
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(prefix="qb", dir="/var/tmp") as name:
        folder = Path(name)
        nodes = {node: disk(folder / f"{node}.qcow2") for node in ("d0", "d1")}
        options = [
            word
            for node, path in nodes.items()
            for word in blockdev(path, node, "qcow2", device=f"v{node}")
        ]
        store = Path(tempfile.mkdtemp(prefix="qb", dir="/dev/shm"))
        engine = Engine(folder / "local", store, allow_local_store=True)
        async with booted(qemu, folder, disks=options, memory=mib) as guest:
            await guest.console.run(f"fill {mib * 3 // 4 - 40}", within=300)
            if load != "idle":
                await guest.console.run(f"busy {load}", within=20)
            machine = Machine("bench", guest.qmp, guest.agent)

            async def theirs(mode: str) -> None:
                row = rows.setdefault(f"bare {mode}", Row())
                act = functools.partial(bare.pause, mode, guest.qmp, folder, nodes, SIZE)
                await measured(row, guest, act)

            async def ours(mode: str) -> None:
                row = rows.setdefault(f"qmpsnap {mode}", Row())
                wishes = Wishes(level=Level.OVERLAY, ram=RamChoice(mode), max_pause=60)
                before, start = cpu_seconds(guest.qemu.pid), time.monotonic()
                with listening(guest.heartbeat, row.silence):
                    made = await engine.create(machine, wishes)
                row.took.append((time.monotonic() - start) * 1000)
                row.cpu.append(cpu_seconds(guest.qemu.pid) - before)
                row.pause.append(made.pause_ms)
                await engine.delete(machine, made.id)

            for turn in range(repeat):
                for mode in modes:
                    ways = [ours] if mode == "auto" else [theirs, ours]
                    # neither is always the one that finds what the other has left behind
                    for way in reversed(ways) if turn % 2 else ways:
                        await way(mode)
                row = rows.setdefault("QEMU snapshot-save", Row())
                await measured(row, guest, lambda: bare.snapshot_save(guest.qmp, nodes))
        shutil.rmtree(store)
    return rows


async def restores(qemu: Path, mib: int, repeat: int) -> dict[str, Row]:
    """From nothing to a running guest: ours from the pair, bare from a raw stream on disk."""
    rows = {"bare": Row(), "qmpsnap": Row()}
    with tempfile.TemporaryDirectory(prefix="qb", dir="/var/tmp") as name:
        folder = Path(name)
        store = Path(tempfile.mkdtemp(prefix="qb", dir="/dev/shm"))
        engine = Engine(folder / "local", store, allow_local_store=True)
        async with booted(qemu, folder, memory=mib) as guest:
            await guest.console.run(f"fill {mib * 3 // 4 - 40}", within=300)
            made = await engine.create(
                Machine("bench", guest.qmp, guest.agent), Wishes(max_pause=60)
            )
        pair = await engine.show("bench", made.id)
        raw = folder / "raw"
        fd = os.open(raw, os.O_WRONLY | os.O_CREAT, 0o600)
        await pair.load(fd, lambda what, done, total: None)
        os.close(fd)
        for _ in range(repeat):
            ready = await engine.prepare_restore("bench", Restoration(folder / "b"), made.id)
            start = time.monotonic()
            await asyncio.to_thread(_bare_restore, ready.argv, folder / "b/qmp.sock", raw)
            rows["bare"].took.append((time.monotonic() - start) * 1000)
            shutil.rmtree(folder / "b")
            start = time.monotonic()
            ready = await engine.prepare_restore("bench", Restoration(folder / "r"), made.id)
            async with engine.restored(ready):
                rows["qmpsnap"].took.append((time.monotonic() - start) * 1000)
            shutil.rmtree(folder / "r")
        shutil.rmtree(store)
    return rows


def _bare_restore(argv: list[str], socket: Path, raw: Path) -> None:
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        qmp = None
        while qmp is None:
            with contextlib.suppress(OSError, ValueError):
                qmp = bare.Qmp(socket)
        on = [{"capability": "events", "state": True}]
        qmp("migrate-set-capabilities", capabilities=on)
        qmp("migrate-incoming", uri=f"exec:cat {raw}")
        qmp.event("MIGRATION", status="completed")
        qmp("cont")
        while qmp("query-status")["status"] != "running":
            pass
    finally:
        process.kill()
        process.wait()


def table(title: str, rows: dict[str, Row], floor_of: Callable[[str], str]) -> list[str]:
    """A Markdown table: medians, spread (least to most), ratio to the floor."""
    head = ["way", "pause ms", "least-most", "x floor", "silence ms", "x floor", "took ms", "CPU s"]
    lines = [f"### {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        floor = rows.get(floor_of(name))
        cells = [name]
        for values, base in (
            (row.pause, floor and floor.pause),
            (row.silence, floor and floor.silence),
        ):
            cells.append(f"{statistics.median(values):.1f}" if values else "")
            if values is row.pause:
                cells.append(f"{min(values):.1f}-{max(values):.1f}" if values else "")
            ratio = statistics.median(values) / statistics.median(base) if values and base else None
            cells.append(f"{ratio:.2f}" if ratio is not None else "")
        cells.append(f"{statistics.median(row.took):.0f}" if row.took else "")
        cells.append(f"{statistics.median(row.cpu):.2f}" if row.cpu else "")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _floor(name: str) -> str:
    mode = name.split()[-1]
    return {"auto": "bare live"}.get(mode, f"bare {mode}") if name != "qmpsnap" else "bare"


async def run(options: argparse.Namespace) -> list[str]:
    lines: list[str] = []
    for version in options.qemu:
        qemu = binaries()[version]
        for mib in options.ram:
            if "pause" in options.what:
                for load in options.load:
                    rows = await pauses(qemu, mib, load, options.repeat, options.mode)
                    title = f"Pause, QEMU {version}, {mib} MiB, {load}"
                    lines += table(title, rows, _floor)
                    print("\n".join(lines[-len(rows) - 5 :]), flush=True)
            if "restore" in options.what:
                rows = await restores(qemu, mib, options.repeat)
                lines += table(f"Restore to running, QEMU {version}, {mib} MiB", rows, _floor)
                print("\n".join(lines[-len(rows) - 5 :]), flush=True)
    return lines


def main() -> None:
    others = {"copy": bench_copy.main, "ram": bench_ram.main}
    if other := others.get("".join(sys.argv[1:2])):
        other(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=["pause", "restore"])
    parser.add_argument("--ram", nargs="+", type=int, default=[256, 1024, 4096], help="MiB")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--qemu", nargs="+", default=["11.1"], choices=list(binaries()))
    parser.add_argument("--mode", nargs="+", default=["auto", "live", "background", "paused"])
    parser.add_argument("--load", nargs="+", default=["idle", "ram=64 rate=40 disk=1024"])
    parser.add_argument("--output", type=Path, help="the tables as Markdown")
    options = parser.parse_args()
    lines = asyncio.run(run(options))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
