"""What is written for limits, into files of v1 and of v2."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from qmpsnap.host.limits import GroupLimits, IoLimits
from qmpsnap.host.settings import settings

V1 = ("cpu", "cpuacct", "memory", "pids", "cpuset", "blkio", "hugetlb")
GIB = 1 << 30
ALL = GroupLimits(
    cpu_max_count=1.5,
    cpus=[0, 2],
    memory_nodes=[1],
    memory_max_bytes=GIB,
    pids_max_count=90,
    io_max={
        "8:0": IoLimits(read_bytes_per_second=4096, write_count_per_second=7),
        "8:16": IoLimits(write_bytes_per_second=1, read_count_per_second=2),
    },
    hugetlb_max_bytes={"2MB": 4 << 20},
)


def written(limits: GroupLimits, first: Collection[str] = ()) -> list[tuple[str, str, str]]:
    return [(one.hierarchy, one.file, one.text) for one in settings(limits, first)]


def troubles(limits: GroupLimits, first: Collection[str] = ()) -> list[str]:
    return [one.file for one in settings(limits, first) if one.trouble]


def test_v2() -> None:
    assert written(ALL) == [
        ("", "cpu.max", "150000 100000"),
        ("", "memory.max", str(GIB)),
        ("", "pids.max", "90"),
        ("", "cpuset.cpus", "0,2"),
        ("", "cpuset.mems", "1"),
        ("", "io.max", "8:0 rbps=4096 wiops=7"),
        ("", "io.max", "8:16 wbps=1 riops=2"),
        ("", "hugetlb.2MB.max", str(4 << 20)),
    ]


def test_v1() -> None:
    assert written(ALL, V1) == [
        ("cpu", "cpu.cfs_period_us", "100000"),
        ("cpu", "cpu.cfs_quota_us", "150000"),
        ("memory", "memory.limit_in_bytes", str(GIB)),
        ("pids", "pids.max", "90"),
        ("cpuset", "cpuset.cpus", "0,2"),
        ("cpuset", "cpuset.mems", "1"),
        ("blkio", "blkio.throttle.read_bps_device", "8:0 4096"),
        ("blkio", "blkio.throttle.write_iops_device", "8:0 7"),
        ("blkio", "blkio.throttle.write_bps_device", "8:16 1"),
        ("blkio", "blkio.throttle.read_iops_device", "8:16 2"),
        ("hugetlb", "hugetlb.2MB.limit_in_bytes", str(4 << 20)),
    ]


def test_a_hybrid_takes_each_controller_where_it_is() -> None:
    found = written(GroupLimits(cpu_max_count=0.00001, pids_max_count=1), ["pids"])
    assert found == [("", "cpu.max", "1000 100000"), ("pids", "pids.max", "1")]  # the least quota


@pytest.mark.parametrize(
    ("weight", "shares"), [(100, 1024), (1, 10), (10000, 102400), (50, 512), (300, 3072)]
)
def test_weights_of_the_one_kind_in_the_other(weight: int, shares: int) -> None:
    assert written(GroupLimits(cpu_weight=weight), V1) == [("cpu", "cpu.shares", str(shares))]
    assert written(GroupLimits(cpu_shares=shares)) == [("", "cpu.weight", str(weight))]


def test_the_ends_of_the_weights() -> None:
    assert written(GroupLimits(cpu_shares=2)) == [("", "cpu.weight", "1")]
    assert written(GroupLimits(cpu_shares=262144)) == [("", "cpu.weight", "10000")]


@pytest.mark.parametrize(
    ("limits", "first", "files"),
    [
        (
            GroupLimits(memory_max_bytes=7, swap_max_bytes=3),
            V1,
            {"memory.limit_in_bytes": "7", "memory.memsw.limit_in_bytes": "10"},
        ),
        (
            GroupLimits(memory_max_bytes=7, memory_and_swap_max_bytes=10),
            (),
            {"memory.max": "7", "memory.swap.max": "3"},
        ),
        (
            # the kernel of v1 takes no limit of both that is below that of memory
            GroupLimits(memory_max_bytes=7, memory_and_swap_max_bytes=5),
            V1,
            {"memory.limit_in_bytes": "5", "memory.memsw.limit_in_bytes": "5"},
        ),
        (
            GroupLimits(memory_and_swap_max_bytes=5),
            V1,
            {"memory.limit_in_bytes": "5", "memory.memsw.limit_in_bytes": "5"},
        ),
        (
            GroupLimits(memory_high_bytes=2, memory_max_bytes=3, swap_max_bytes=0),
            (),
            {"memory.high": "2", "memory.max": "3", "memory.swap.max": "0"},
        ),
        (GroupLimits(memory_soft_max_bytes=2), V1, {"memory.soft_limit_in_bytes": "2"}),
    ],
)
def test_memory_and_swap(limits: GroupLimits, first: Collection[str], files: object) -> None:
    assert {file: text for _, file, text in written(limits, first)} == files
    assert troubles(limits, first) == []


@pytest.mark.parametrize(
    ("limits", "first", "file"),
    [
        (GroupLimits(memory_high_bytes=2), V1, "memory.high"),
        (GroupLimits(swap_max_bytes=2), V1, "memory.swap.max"),
        (GroupLimits(memory_soft_max_bytes=2), (), "memory.soft_limit_in_bytes"),
        (GroupLimits(memory_and_swap_max_bytes=2), (), "memory.memsw.limit_in_bytes"),
    ],
)
def test_what_the_other_kind_has_not(
    limits: GroupLimits, first: Collection[str], file: str
) -> None:
    assert troubles(limits, first) == [file]
