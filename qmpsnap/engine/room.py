"""Room on disk, asked for before anything is touched: for a copy, and for the guest meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from qmpsnap.engine.plan import PlannedDisk
from qmpsnap.engine.wishes import Level
from qmpsnap.errors import Blocked, LocalFailed

# Bytes of the target's file system that we leave alone. Where the guest writes to the same one
# (its overlay lies beside its disk), it must never be us who fill it up.
_RESERVE, _RESERVE_OF_THE_GUEST = 16 << 20, 256 << 20
# What a guest may write while its disk is copied: the more, the larger the disk
_WRITES, _WRITES_OF_A_DISK = 256 << 20, 20


def growth(size: int) -> int:
    """The bytes that have to be free for what a guest writes to a disk of *size* bytes."""
    return min(size, max(_WRITES, size // _WRITES_OF_A_DISK))


def reserve(disk: PlannedDisk, folder: Path) -> int:
    """The bytes that a copy of *disk* into *folder* leaves free there. Raises OSError."""
    shared = folder.stat().st_dev == _beside(disk).stat().st_dev
    return _RESERVE_OF_THE_GUEST if shared else _RESERVE


def _beside(disk: PlannedDisk) -> Path:
    """The folder of the overlay, or the one in which it is still to be made."""
    folder = disk.overlay.path.parent
    return folder if folder.exists() else folder.parent


def expect(disks: Sequence[PlannedDisk], folder: Path) -> None:
    """Raises Blocked when the copies of *disks* into *folder*, or the guest, would lack room.

    A guest whose overlay cannot grow is stopped by QEMU, so there has to be a twentieth of its
    disk and at least 256 MiB, or room for all of the disk. What an increment takes is not known
    yet, nor is it known of a full where the file system may share blocks.
    """
    copied = [disk for disk in disks if disk.copied]
    try:
        for disk in copied:
            device = _beside(disk).stat().st_dev
            _guests(disk, [one for one in copied if _beside(one).stat().st_dev == device])
            _ours(disk, folder)
    except OSError as failed:
        raise LocalFailed(f"{failed.filename}: {failed.strerror}") from failed


def _guests(disk: PlannedDisk, sharing: list[PlannedDisk]) -> None:
    folder = _beside(disk)
    sizes = [one.site.disk.top.virtual_size for one in sharing]
    needed = sum(map(growth, sizes))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Blocked(
            f"{folder}: {needed} bytes have to be free for what the guest writes while "
            f"{disk.site.name} is copied, but only {free} are",
            hint="make room there: a guest that fills it up would be stopped",
        )


def _ours(disk: PlannedDisk, folder: Path) -> None:
    chain, spare = disk.site.disk.chain, reserve(disk, folder)
    whole = len(chain) > 1 or folder.stat().st_dev != Path(disk.site.paths[0]).stat().st_dev
    # what is encrypted shares no blocks
    full = disk.chosen.level is Level.FULL and (whole or disk.chosen.sealed)
    needed = sum(node.actual_size for node in chain) if full else 0
    free = shutil.disk_usage(folder).free
    if free < needed + spare:
        raise Blocked(
            f"{folder}: no room for a copy of {disk.site.name}: {needed} bytes and {spare} to "
            f"spare have to be free, but only {free} are",
            hint="`qmpsnap prune` makes room",
        )
