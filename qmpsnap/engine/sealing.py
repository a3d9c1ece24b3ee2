"""Copies of frozen disks that are encrypted as they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.engine import frozen
from qmpsnap.engine.plan import PlannedDisk
from qmpsnap.engine.room import reserve
from qmpsnap.engine.wishes import Copying
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.store import sealed
from qmpsnap.store.files import Progress
from qmpsnap.store.manifest import SEALED, Means
from qmpsnap.store.sealedimages import role
from qmpsnap.store.secret import Keys, Secret


@dataclass(frozen=True, slots=True)
class Sealing:
    """With what the images of *vm* are encrypted: *secret*; *keys* are those that others have."""

    vm: str
    secret: Secret
    keys: Keys


async def sealed_copy(
    monitor: Monitor,
    disk: PlannedDisk,
    ranges: list[tuple[int, int]] | None,
    folder: Path,
    how: Copying,
    tell: Progress,
    sockets: Path,
    sealing: Sealing,
) -> tuple[Path, Means, int]:
    """Write *ranges* of the frozen *disk* into *folder*, or without any all of its data.

    The file, by which means, and its bytes. Raises LocalFailed, MonitorLost.
    """
    path = folder / f"{disk.label}.{SEALED}"
    beneath = disk.chosen.beneath if ranges is not None else None
    async with frozen.reading(disk, sockets, allocation=ranges is None) as reader:

        def work(stop: Callable[[], bool]) -> int:
            return sealed.write(
                path,
                secret=sealing.secret,
                role=role(sealing.vm, path),
                virtual_size=disk.site.disk.top.virtual_size,
                on=beneath.name if beneath is not None else "",
                extents=frozen.data(reader) if ranges is None else ranges,
                read=reader.read_all,
                compress=how.compress,
                reserve=reserve(disk, folder),
                limit=how.limit,
                cancelled=stop,
                on_progress=tell,
            )

        written = await frozen.while_qemu_lives(monitor, work)
    return path, "copy" if ranges is None else "increment", written
