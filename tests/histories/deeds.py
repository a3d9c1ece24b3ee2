"""What an engine is asked for in a history; in a process of its own it can be made to die.

Started by `dying`; prints one JSON object: what was done, or `{"error": …}`.
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
from qmpsnap.engine.retention import Policy
from qmpsnap.engine.wishes import Copying, Level, Quiesce, RamChoice, Wishes
from qmpsnap.errors import SnapError
from qmpsnap.host.journal import Entry, Journal
from tests.rig.qemu import ROOT

VM = "vm"
# what changes a file system, as our own code and the libraries call it
_CALLS = ("rename", "replace", "link", "unlink", "mkdir", "rmdir", "fsync", "ftruncate")


async def do(engine: Engine, machine: Machine, deed: dict[str, Any]) -> dict[str, Any]:
    """Carry *deed* out, whose snapshots are named by their IDs."""
    match deed["verb"]:
        case "create":
            wishes = Wishes(
                level=Level(deed["level"]),
                ram=RamChoice(deed["ram"]),
                quiesce=Quiesce.NONE,
                max_pause=60,
                include=tuple(deed["include"]),
                copying=Copying(compress=deed["compress"]),
            )
            made = await engine.create(machine, wishes)
            return {"id": made.id, "levels": {name: one.level for name, one in made.disks.items()}}
        case "refresh":
            new = await engine.refresh(machine, deed["id"], quiesce=Quiesce.NONE, max_pause=60)
            return {"id": new.id, "revision": new.revision, "levels": new.levels}
        case "delete":
            return {"deleted": (await engine.delete(machine, deed["id"])).id}
        case "prune":
            policy = Policy(last=deed["last"])
            pruned = await engine.prune(machine, policy, merging=deed["merging"])
            kept = [fate.id for fate in pruned.fates if fate.decision == "keep"]
            return {"kept": kept, "failed": pruned.failed}
    raise ValueError(deed)


@contextmanager
def dying(
    deed: dict[str, Any], *, qmp: Path, local: Path, store: Path, die: str | int | None
) -> Iterator[subprocess.Popen[bytes]]:
    """*deed* in a new process. *die*: it kills itself at a note of its journal (`before sealed`),
    at the how-manieth of its calls that change a file system, or at one of a file that is there
    (`unlink storage.json.partial`)."""
    said = {"deed": deed, "qmp": str(qmp), "local": str(local), "store": str(store), "die": die}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.histories.deeds", json.dumps(said)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def outcome(process: subprocess.Popen[bytes], *, within: float = 120) -> dict[str, Any]:
    """What the engine said at its end; nothing if it was killed."""
    said, _ = await asyncio.to_thread(process.communicate, timeout=within)
    return dict(json.loads(said or b"{}"))


def _killed_at_note(
    when: str, phase: str, real: Callable[..., Any], told: Callable[..., str]
) -> Any:
    def wrapped(*arguments: Any, **other: Any) -> Any:
        mine = told(*arguments) == phase
        if mine and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **other)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def _killed_at_call(number: int) -> None:
    left = [number]

    def counted(real: Callable[..., Any]) -> Any:
        def wrapped(*arguments: Any, **other: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **other)

        return wrapped

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))


def _killed_at_file(call: str, file: str) -> None:
    real = getattr(os, call)

    def wrapped(path: Any, *arguments: Any, **other: Any) -> Any:
        if Path(path).name == file and Path(path).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *arguments, **other)

    setattr(os, call, wrapped)


def _arm(die: str | int) -> None:
    if isinstance(die, int):
        _killed_at_call(die)
        return
    when, _, phase = die.partition(" ")
    if when in _CALLS:
        _killed_at_file(when, phase)
        return

    def armed(real: Any, told: Callable[..., str]) -> Any:
        return _killed_at_note(when, phase, real, told)

    Journal.open_entry = armed(Journal.open_entry, lambda *_: "planned")  # type: ignore[method-assign]
    Entry.note = armed(Entry.note, lambda _, told: told)  # type: ignore[method-assign]
    Entry.close = armed(Entry.close, lambda _: "closed")  # type: ignore[method-assign]


async def _main(said: dict[str, Any]) -> dict[str, Any]:
    engine = Engine(Path(said["local"]), Path(said["store"]), allow_local_store=True)
    try:
        return await do(engine, Machine(VM, Path(said["qmp"])), said["deed"])
    except SnapError as failed:
        return {"error": f"{type(failed).__name__}: {failed}"}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if asked["die"] is not None:
        _arm(asked["die"])
    print(json.dumps(asyncio.run(_main(asked))))
