"""What a control group may use: the only place that reads its limits, of v1 and of v2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from qmpsnap.host import kernelfile
from qmpsnap.host.kernelfile import whole

_UNLIMITED = 1 << 62  # v1 writes "no limit" as the largest multiple of a page
Folders = Mapping[str, Path]
"""The folder of a group for each v1 controller, and for "" (v2)."""


class IoLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a group may do a second on one device; None: as much as it likes."""

    read_bytes_per_second: int | None = None
    write_bytes_per_second: int | None = None
    read_count_per_second: int | None = None
    write_count_per_second: int | None = None


class GroupLimits(msgspec.Struct, frozen=True, kw_only=True):
    """None: there is no such limit, or no such controller. Devices are called `8:0`.

    *cpu_max_count*: how many CPUs at a time. *cpu_weight* is v2's (100 is usual), *cpu_shares* v1's
    (1024). *swap_max_bytes* is v2's, *memory_and_swap_max_bytes* v1's, of both together.
    *memory_high_bytes*: above it, v2 slows the group down; v1's soft limit is
    *memory_soft_max_bytes*. *hugetlb_max_bytes* is by page size, called as the kernel does: `2MB`.
    """

    cpu_max_count: float | None = None
    cpu_weight: int | None = None
    cpu_shares: int | None = None
    cpus: list[int] | None = None
    memory_nodes: list[int] | None = None
    memory_high_bytes: int | None = None
    memory_max_bytes: int | None = None
    memory_soft_max_bytes: int | None = None
    swap_max_bytes: int | None = None
    memory_and_swap_max_bytes: int | None = None
    io_max: dict[str, IoLimits] | None = None
    pids_max_count: int | None = None
    hugetlb_max_bytes: dict[str, int] | None = None


def limits(folders: Folders) -> GroupLimits:
    """The group's own limits; those of the groups above it hold as well."""
    return GroupLimits(
        cpu_max_count=_cpu_max(folders),
        cpu_weight=number(folders, "", "cpu.weight"),
        cpu_shares=number(folders, "cpu", "cpu.shares"),
        cpus=_list(folders, "cpus"),
        memory_nodes=_list(folders, "mems"),
        memory_high_bytes=number(folders, "", "memory.high"),
        memory_max_bytes=either(folders, "memory", "memory.limit_in_bytes", "memory.max"),
        memory_soft_max_bytes=number(folders, "memory", "memory.soft_limit_in_bytes"),
        swap_max_bytes=number(folders, "", "memory.swap.max"),
        memory_and_swap_max_bytes=number(folders, "memory", "memory.memsw.limit_in_bytes"),
        io_max=_io_max(folders),
        pids_max_count=either(folders, "pids", "pids.max", "pids.max"),
        hugetlb_max_bytes=_hugetlb(folders),
    )


def number(folders: Folders, controller: str, file: str) -> int | None:
    """The number in a file of the group; None where there is none, or no limit."""
    found = kernelfile.number(folders[controller] / file) if controller in folders else None
    return None if found is None or found >= _UNLIMITED else found


def either(folders: Folders, controller: str, first: str, second: str) -> int | None:
    """v1's file where the controller is v1's, else v2's: a hybrid has each controller in one."""
    if controller in folders:
        return number(folders, controller, first)
    return number(folders, "", second)


def pairs(row: str) -> dict[str, int]:
    """The numbers of `rbytes=4096 wbytes=max`."""
    words = [word.partition("=") for word in row.split()]
    found = {key: whole(value) for key, _, value in words}
    return {key: count for key, count in found.items() if count is not None}


def _cpu_max(folders: Folders) -> float | None:
    if "cpu" in folders:
        quota = kernelfile.number(folders["cpu"] / "cpu.cfs_quota_us")
        period = kernelfile.number(folders["cpu"] / "cpu.cfs_period_us")
    else:
        words = (kernelfile.text(folders[""] / "cpu.max") if "" in folders else None) or "max"
        quota, period = (*map(whole, words.split()), None)[:2]
    return quota / period if quota is not None and quota > 0 and period else None


def _list(folders: Folders, kind: str) -> list[int] | None:
    if "cpuset" in folders:
        v1 = folders["cpuset"]
        text = kernelfile.text(v1 / f"cpuset.effective_{kind}")
        return kernelfile.cpu_list(text or kernelfile.text(v1 / f"cpuset.{kind}"))
    path = folders[""] / f"cpuset.{kind}.effective" if "" in folders else None
    return kernelfile.cpu_list(kernelfile.text(path)) if path else None


def _hugetlb(folders: Folders) -> dict[str, int] | None:
    name, last = ("hugetlb", "limit_in_bytes") if "hugetlb" in folders else ("", "max")
    if name not in folders:
        return None
    # hugetlb.2MB.rsvd.max is another one, of what is reserved
    files = folders[name].glob(f"hugetlb.[0-9]*B.{last}")
    sizes = {
        path.name: number(folders, name, path.name) for path in files if "rsvd" not in path.name
    }
    return {file.split(".")[1]: most for file, most in sizes.items() if most is not None} or None


def _io_max(folders: Folders) -> dict[str, IoLimits] | None:
    if "blkio" in folders:
        found: dict[str, dict[str, int]] = {}
        for key, file in (
            ("rbps", "read_bps_device"), ("wbps", "write_bps_device"),
            ("riops", "read_iops_device"), ("wiops", "write_iops_device"),
        ):  # fmt: skip
            table = kernelfile.numbers(folders["blkio"] / f"blkio.throttle.{file}")
            for device, count in table.items():
                found.setdefault(device, {})[key] = count
    elif "" in folders:
        # 8:16 rbps=2097152 wbps=max riops=max wiops=120
        rows = kernelfile.table(folders[""] / "io.max")
        found = {device: pairs(row) for device, row in rows.items()}
    else:
        return None
    return {device: _io_limits(words) for device, words in found.items()} or None


def _io_limits(words: Mapping[str, int]) -> IoLimits:
    return IoLimits(
        read_bytes_per_second=words.get("rbps"),
        write_bytes_per_second=words.get("wbps"),
        read_count_per_second=words.get("riops"),
        write_count_per_second=words.get("wiops"),
    )
