"""A disk that stands still beneath its overlay, read while the guest runs on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from qmpsnap.engine.plan import PlannedDisk
from qmpsnap.errors import MonitorLost
from qmpsnap.host import qemu_nbd
from qmpsnap.host.priority import stoppable
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.hypervisor.nbd import client
from qmpsnap.store import copying

T = TypeVar("T")
_ALLOCATION, _ZERO = "base:allocation", 2  # NBD's protocol, "Metadata contexts"
_SOCKET = "frozen"


@asynccontextmanager
async def reading(
    disk: PlannedDisk, sockets: Path, *, allocation: bool = False
) -> AsyncIterator[client.Reader]:
    """The frozen chain of *disk*, served in the folder *sockets*; *allocation*: `data` is asked.

    Raises LocalFailed.
    """
    top = disk.site.disk.top
    format = top.driver if top.driver in {"qcow2", "raw"} else "raw"
    contexts = (_ALLOCATION,) if allocation else ()
    async with qemu_nbd.serving(Path(disk.site.paths[0]), format, sockets / _SOCKET):
        with client.Reader(sockets / _SOCKET, "", *contexts) as reader:
            yield reader


def data(reader: client.Reader) -> list[tuple[int, int]]:
    """Where the disk is not known to be zeros, in order. Blocks. Raises LocalFailed."""
    found = reader.extents(_ALLOCATION)
    return [(one.start, one.length) for one in found if not one.flags & _ZERO]


async def while_qemu_lives(monitor: Monitor, work: Callable[[Callable[[], bool]], T]) -> T:
    """Run *work* in a thread that yields. It is given what it asks whether to give up.

    Raises what *work* does, and MonitorLost when QEMU went away: the copy is for nothing then.
    """
    try:
        return await stoppable(lambda stop: work(lambda: stop() or monitor.lost))
    except copying.Cancelled as stopped:
        raise MonitorLost(f"{monitor.path}: QEMU went away during the copy") from stopped
