"""The memory that a process holds: the only place that knows what it costs to ask for it."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from qmpsnap.errors import LocalFailed
from qmpsnap.host import kernelfile
from qmpsnap.host.kernelfile import kilobytes
from qmpsnap.host.tasks import PROC

_NODES = Path("/sys/devices/system/node/online")
# The kernel walks all pages for smaps_rollup, and again for numa_maps: 12.5 ms of CPU each per GiB
# of small pages. More than this is not walked (huge pages of hugetlbfs cost next to nothing).
WALKED_BYTES = 1 << 30


class MemoryUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a process. None is what could not be read, or was too dear to ask for.

    *pss_bytes*: pages shared with others count in part. *transparent_huge_bytes* are part of the
    RSS, *hugetlb_bytes* are not. *node_bytes*: RSS and hugetlb by NUMA node. PSS, transparent huge
    pages and, on hosts with more than one node, the nodes are asked for up to `WALKED_BYTES` of
    RSS.
    """

    rss_bytes: int | None = None
    rss_peak_bytes: int | None = None
    rss_anon_bytes: int | None = None
    rss_file_bytes: int | None = None
    rss_shmem_bytes: int | None = None
    vms_bytes: int | None = None
    swap_bytes: int | None = None
    locked_bytes: int | None = None
    pss_bytes: int | None = None
    transparent_huge_bytes: int | None = None
    hugetlb_bytes: int | None = None
    node_bytes: dict[str, int] | None = None


def usage(
    pid: int,
    *,
    walk: bool = True,
    proc: Path = PROC,
    nodes: Path = _NODES,
    walked_bytes: int = WALKED_BYTES,
) -> MemoryUsage:
    """The memory of *pid*; what takes a walk over its pages only if *walk*, and if they are few.

    Raises LocalFailed when the process is gone.
    """
    home = proc / str(pid)
    status = kernelfile.table(home / "status", ":")
    if not status:
        raise LocalFailed(f"there is no process {pid} any more")
    rss, hugetlb = kilobytes(status, "VmRSS"), kilobytes(status, "HugetlbPages")
    walk = walk and rss is not None and rss <= walked_bytes
    rollup = kernelfile.table(home / "smaps_rollup", ":") if walk else {}
    online = kernelfile.cpu_list(kernelfile.text(nodes)) or []
    spread = None
    if len(online) == 1 and rss is not None:
        spread = {str(online[0]): rss + (hugetlb or 0)}
    elif walk:
        spread = _spread(kernelfile.text(home / "numa_maps"))
    return MemoryUsage(
        rss_bytes=rss,
        rss_peak_bytes=kilobytes(status, "VmHWM"),
        rss_anon_bytes=kilobytes(status, "RssAnon"),
        rss_file_bytes=kilobytes(status, "RssFile"),
        rss_shmem_bytes=kilobytes(status, "RssShmem"),
        vms_bytes=kilobytes(status, "VmSize"),
        swap_bytes=kilobytes(status, "VmSwap"),
        locked_bytes=kilobytes(status, "VmLck"),
        pss_bytes=kilobytes(rollup, "Pss"),
        transparent_huge_bytes=_added(rollup, "AnonHugePages", "ShmemPmdMapped", "FilePmdMapped"),
        hugetlb_bytes=hugetlb,
        node_bytes=spread,
    )


def _added(fields: dict[str, str], *names: str) -> int | None:
    found = [count for name in names if (count := kilobytes(fields, name)) is not None]
    return sum(found) if found else None


def _spread(maps: str | None) -> dict[str, int] | None:
    """The bytes on each node by numa_maps: `... N0=12 N1=3 kernelpagesize_kB=4` a mapping."""
    if maps is None:
        return None
    found: dict[str, int] = {}
    for line in maps.splitlines():
        page = re.search(r" kernelpagesize_kB=(\d+)", line)
        for node, pages in re.findall(r" N(\d+)=(\d+)", line) if page else []:
            count = kernelfile.whole(pages) or 0
            size = kernelfile.whole(page[1]) or 0  # type: ignore[index]
            found[node] = found.get(node, 0) + count * size * 1024
    return found
