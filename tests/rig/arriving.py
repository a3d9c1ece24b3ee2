"""RAM that arrives while its guest runs: a store that holds it back, and who brings it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qmpsnap import Engine

# The worker as it is, but what nobody waits for comes only once the gate is there
_GATED = """
import sys, time
from pathlib import Path
from qmpsnap.store import half, worker

gate, fill = Path(sys.argv[1]), half.fill

def gated(root, request, progress, *more):
    while any(length > 1 << 20 for _, _, length in request.spans or ()) and not gate.exists():
        progress(0, 1, "")
        time.sleep(0.05)
    return fill(root, request, progress, *more)

half.fill = gated
worker.main()
"""


def gated(engine: Engine, gate: Path) -> Engine:
    """*engine*, whose store gives of a RAM only what a guest waits for, until *gate* exists."""
    engine.roots.store.command = (sys.executable, "-P", "-c", _GATED, str(gate))
    return engine


def bringers(local: Path) -> list[int]:
    """The processes that bring RAM of VMs of the root *local*."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if b"engine.feeder" in (process / "cmdline").read_bytes() and _holds(process, local):
                found.append(int(process.name))
    return found


def _holds(process: Path, local: Path) -> bool:
    """Whether it has a lock of the root *local* open; others of its files come and go meanwhile."""
    for link in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = str(link.readlink())
            if f"{local}/" in target and target.endswith(".lock"):
                return True
    return False


def family(pid: int) -> list[int]:
    """The process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


async def gone(pids: Sequence[int]) -> None:
    """Returns when none of them runs any more; within 30 seconds."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                ready = await asyncio.to_thread(select.select, [descriptor], [], [], 30)
                assert ready[0], f"process {pid} still runs"
            finally:
                os.close(descriptor)


async def killed(local: Path) -> None:
    """Who brings RAM is killed; there has to be one."""
    (pid,) = bringers(local)
    kin = family(pid)
    os.kill(pid, signal.SIGKILL)
    await gone(kin)


async def seen(what: Callable[[], object]) -> None:
    """Returns when *what* is true; within 60 seconds."""
    async with asyncio.timeout(60):
        while True:
            if what():
                return
            await asyncio.sleep(0.02)
