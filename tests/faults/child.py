"""An engine in a process of its own, for tests that kill it.

Started by `engine`; prints one JSON object: `{"id": …}`, or `{"error": …, "exit_code": …}`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qmpsnap.engine.engine import Engine
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.wishes import Copying, Level, Quiesce, RamChoice, Wishes
from qmpsnap.errors import SnapError
from qmpsnap.host.journal import Entry, Journal
from qmpsnap.hypervisor.vmstate import session
from tests.rig.qemu import ROOT


@contextmanager
def engine(
    *,
    qmp: Path,
    local: Path,
    store: Path,
    ram: RamChoice,
    agent: Path | None = None,
    max_pause: float = 20,
    margin: float | None = None,
    die: str = "",
    level: Level = Level.OVERLAY,
    limit: int | None = None,
    sockets: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """`create` in a new process. *die*, as in `before sealed`: it kills itself at that note of
    its journal. *margin* is the watchdog's, in seconds. *limit*: bytes a second for a copy;
    *sockets*: where temporary files go."""
    said = {
        "qmp": str(qmp), "local": str(local), "store": str(store), "ram": ram.value,
        "agent": str(agent) if agent else None, "max_pause": max_pause, "margin": margin,
        "die": die, "level": level.value, "limit": limit,
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.child", json.dumps(said)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **({"TMPDIR": str(sockets)} if sockets else {})},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()


async def outcome(process: subprocess.Popen[bytes], *, within: float = 60) -> dict[str, Any]:
    """What the engine said at its end; nothing if it was killed.

    Nobody else has its pipes then, also not who outlives it.
    """
    said, aside = await asyncio.to_thread(process.communicate, timeout=within)
    sys.stderr.write(aside.decode())
    return dict(json.loads(said or b"{}"))


def _dying(when: str, phase: str, real: Callable[..., Any], name: Callable[..., str]) -> Any:
    def wrapped(*arguments: Any, **other: Any) -> Any:
        mine = name(*arguments) == phase
        if mine and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **other)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def _arm(die: str) -> None:
    when, _, phase = die.partition(" ")
    Journal.open_entry = _dying(when, phase, Journal.open_entry, lambda *_: "planned")  # type: ignore[method-assign]
    Entry.note = _dying(when, phase, Entry.note, lambda _, told: told)  # type: ignore[method-assign]
    Entry.close = _dying(when, phase, Entry.close, lambda _: "closed")  # type: ignore[method-assign]


async def _create(said: dict[str, Any]) -> dict[str, Any]:
    made = Engine(Path(said["local"]), Path(said["store"]), allow_local_store=True)
    machine = Machine("vm", Path(said["qmp"]), Path(said["agent"]) if said["agent"] else None)
    wishes = Wishes(
        level=Level(said["level"]),
        copying=Copying(limit=said["limit"]),
        ram=RamChoice(said["ram"]),
        max_pause=said["max_pause"],
        quiesce=Quiesce.AGENT if said["agent"] else Quiesce.NONE,
    )
    try:
        return {"id": (await made.create(machine, wishes)).id}
    except SnapError as failed:
        return {"error": str(failed), "code": failed.code, "exit_code": failed.exit_code}


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    if told["die"]:
        _arm(told["die"])
    if told["margin"] is not None:
        session.MARGIN = told["margin"]
    print(json.dumps(asyncio.run(_create(told))))
