"""The host's huge pages: the only place that knows their sizes and how many are free."""

from __future__ import annotations

import os
from pathlib import Path

from qmpsnap.errors import LocalFailed
from qmpsnap.host import filesystem, kernelfile

_HUGETLBFS = 0x958458F6  # linux/magic.h
_POOLS = Path("/sys/kernel/mm/hugepages")


def of_file(path: Path) -> int | None:
    """The bytes of a page of the file at *path*, in `hugetlbfs`; None for one on small pages."""
    try:
        if filesystem.examine(path).magic != _HUGETLBFS:
            return None
        return os.statvfs(path if path.exists() else path.parent).f_bsize
    except (LocalFailed, OSError):
        return None


def default(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """The bytes of a huge page where nobody asks for a size; None without huge pages."""
    return kernelfile.kilobytes(kernelfile.table(meminfo, ":"), "Hugepagesize")


def free_bytes(pools: Path = _POOLS) -> dict[int, int]:
    """What can be had of each pool, by the bytes of its pages.

    That is what is free and nobody has reserved, and what the kernel may add to the pool.
    """
    found = {}
    for pool in pools.glob("hugepages-*kB"):
        size = kernelfile.whole(pool.name.removeprefix("hugepages-").removesuffix("kB"))
        free = kernelfile.number(pool / "free_hugepages")
        if size is None or free is None:
            continue
        taken, more, added = (
            kernelfile.number(pool / name) or 0
            for name in ("resv_hugepages", "nr_overcommit_hugepages", "surplus_hugepages")
        )
        found[size << 10] = max(0, free - taken + more - added) * (size << 10)
    return found
