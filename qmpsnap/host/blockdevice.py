"""The disks of this host by number: the only place that finds the one under a path."""

from __future__ import annotations

import os
from pathlib import Path

from qmpsnap.host import kernelfile

_BLOCK = Path("/sys/dev/block")


def under(path: Path, block: Path = _BLOCK) -> str | None:
    """The disk, as `8:0`, that holds *path*, or that would once it exists; None if none does.

    It is the whole disk also where a partition is mounted: only that can be throttled.
    """
    # Path.exists raises where we may not look
    there = next((one for one in (path, *path.parents) if os.path.exists(one)), Path("/"))  # noqa: PTH110
    number = there.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    if not (block / name).exists():
        return None  # of no disk, or of several: tmpfs, NFS, btrfs
    if (block / name / "partition").exists():
        return kernelfile.text((block / name).resolve().parent / "dev")
    return name


def exists(device: str, block: Path = _BLOCK) -> bool:
    """Whether there is a disk *device*, such as `8:0`."""
    return (block / device).exists()
