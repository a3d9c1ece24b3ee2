"""Groups and their files, as kernels of v2, v1 and hybrid lay them out, and this host's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qmpsnap.host import cgroup
from qmpsnap.host.counters import GroupFigures, IoFigures
from qmpsnap.host.limits import GroupLimits, IoLimits

PSI = (
    "some avg10=1.50 avg60=0.00 avg300=0.25 total=2500000\n"
    "full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n"
)
PAGE = os.sysconf("SC_PAGE_SIZE")


def tree(top: Path, groups: str, mounts: list[str], files: dict[str, str]) -> cgroup.CgroupUsage:
    """A /proc with process 7, and the file systems that its table names; AT is *top*."""
    for folder in ("7", "self"):
        (top / folder).mkdir()
    (top / "7/cgroup").write_text(groups)
    table = "".join(f"{mount}\n".replace("AT", str(top)) for mount in mounts)
    (top / "self/mountinfo").write_text(f"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n{table}")
    for name, content in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(content)
    return cgroup.usage(7, proc=top)


def test_v2(tmp_path: Path) -> None:
    own = "two/machine.slice/vm.scope"
    seen = tree(
        tmp_path,
        "0::/machine.slice/vm.scope\n",
        ["31 23 0:28 / AT/two rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"],
        {
            f"{own}/cpu.max": "150000 100000\n",
            f"{own}/cpu.weight": "200\n",
            f"{own}/cpu.stat": "usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\n"
            "nr_periods 40\nnr_throttled 3\nthrottled_usec 120000\nnr_bursts 0\n",
            f"{own}/cpu.pressure": PSI,
            f"{own}/memory.current": "4096\n",
            f"{own}/memory.peak": "8192\n",
            f"{own}/memory.high": "max\n",
            f"{own}/memory.max": "1073741824\n",
            f"{own}/memory.swap.max": "0\n",
            f"{own}/memory.swap.current": "12288\n",
            f"{own}/memory.events": "low 0\nhigh 5\nmax 2\noom 1\noom_kill 0\noom_group_kill 0\n",
            f"{own}/memory.numa_stat": "anon N0=4096 N1=8192\nfile N0=1 N1=0\nanon_thp N0=9 N1=9\n",
            f"{own}/io.max": "8:16 rbps=2097152 wbps=max riops=max wiops=120\n",
            f"{own}/io.stat": "8:16 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n8:0 \n",
            f"{own}/pids.current": "9\n",
            f"{own}/pids.max": "max\n",
            f"{own}/cpuset.cpus.effective": "0-2,5\n",
            f"{own}/cpuset.mems.effective": "0\n",
            "two/machine.slice/cpu.max": "max 100000\n",
            "two/machine.slice/memory.max": "4294967296\n",
            "two/machine.slice/memory.high": "2147483648\n",
            "two/machine.slice/pids.max": "1000\n",
            "two/cpu.stat": "usage_usec 1\n",
        },
    )
    assert seen.version == "v2"
    assert seen.groups == {"": "/machine.slice/vm.scope"}
    assert seen.limits == GroupLimits(
        cpu_max_count=1.5,
        cpu_weight=200,
        cpus=[0, 1, 2, 5],
        memory_nodes=[0],
        memory_max_bytes=1 << 30,
        swap_max_bytes=0,  # a limit, and not none
        io_max={"8:16": IoLimits(read_bytes_per_second=2 << 20, write_count_per_second=120)},
    )
    used = seen.figures
    assert (used.cpu_seconds, used.cpu_user_seconds, used.cpu_system_seconds) == (2.5, 2.0, 0.5)
    assert (used.cpu_period_count, used.cpu_throttled_count) == (40, 3)
    assert used.cpu_throttled_seconds == pytest.approx(0.12)
    assert (used.memory_bytes, used.memory_peak_bytes, used.swap_bytes) == (4096, 8192, 12288)
    assert used.memory_node_bytes == {"0": 4097, "1": 8192}
    events = (used.memory_high_event_count, used.memory_max_event_count, used.oom_kill_count)
    assert events == (5, 2, 0)
    assert used.io is not None
    assert used.io["8:16"] == IoFigures(read_bytes=10, write_bytes=20, read_count=1, write_count=2)
    assert used.pids_count == 9
    assert used.pressure_cpu is not None
    assert used.pressure_cpu.some is not None
    assert used.pressure_cpu.some.average_10_seconds_percent == 1.5
    assert used.pressure_cpu.some.total_seconds == 2.5
    assert used.pressure_memory is None
    slice, root = seen.ancestors
    assert (slice.hierarchy, slice.path, root.path) == ("", "/machine.slice", "/")
    assert slice.limits == GroupLimits(
        memory_max_bytes=4 << 30, memory_high_bytes=2 << 30, pids_max_count=1000
    )
    assert root.limits == GroupLimits()


V1 = [
    "31 23 0:28 / AT/cpu rw - cgroup cgroup rw,cpu,cpuacct",
    "32 23 0:29 /box AT/mem rw - cgroup cgroup rw,memory",
    "33 23 0:31 / AT/blk rw - cgroup cgroup rw,blkio",
    "34 23 0:32 / AT/pids rw - cgroup cgroup rw,pids",
    "35 23 0:33 / AT/set rw - cgroup cgroup rw,cpuset",
    "36 23 0:34 / AT/sys rw - cgroup cgroup rw,xattr,name=systemd",
]
GROUPS = (
    "9:cpuset:/vm\n8:pids:/vm\n7:blkio:/vm\n5:cpu,cpuacct:/vm\n"
    "4:memory:/box/vm\n1:name=systemd:/x\n"
)
UNLIMITED = "9223372036854771712\n"
FILES = {
    "cpu/vm/cpuacct.usage": "1500000000\n",
    "cpu/vm/cpuacct.stat": "user 100\nsystem 50\n",
    "cpu/vm/cpu.cfs_quota_us": "-1\n",
    "cpu/vm/cpu.cfs_period_us": "100000\n",
    "cpu/vm/cpu.shares": "512\n",
    "cpu/vm/cpu.stat": "nr_periods 4\nnr_throttled 1\nthrottled_time 250000000\n",
    "cpu/cpu.cfs_quota_us": "400000\n",
    "cpu/cpu.cfs_period_us": "100000\n",
    "mem/vm/memory.usage_in_bytes": "8192\n",
    "mem/vm/memory.max_usage_in_bytes": "16384\n",
    "mem/vm/memory.limit_in_bytes": UNLIMITED,
    "mem/vm/memory.soft_limit_in_bytes": UNLIMITED,
    "mem/vm/memory.memsw.limit_in_bytes": "65536\n",
    "mem/vm/memory.failcnt": "6\n",
    "mem/vm/memory.stat": "cache 1\nrss 2\nswap 4096\n",
    "mem/vm/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    "mem/vm/memory.numa_stat": "total=3 N0=2 N1=1\nfile=1 N0=1 N1=0\nhierarchical_total=9 N0=9\n",
    "mem/memory.limit_in_bytes": "1048576\n",
    "blk/vm/blkio.throttle.io_service_bytes": "8:0 Read 1\n8:0 Write 2\nTotal 3\n",
    "blk/vm/blkio.throttle.io_service_bytes_recursive": "8:0 Read 11\n8:0 Write 22\nTotal 33\n",
    "blk/vm/blkio.throttle.io_serviced": "8:0 Read 3\n8:0 Write 4\n8:0 Total 7\nTotal 7\n",
    "blk/vm/blkio.throttle.read_bps_device": "8:0 1048576\n",
    "blk/vm/blkio.throttle.write_iops_device": "8:0 50\n",
    "pids/vm/pids.current": "0\n",
    "pids/vm/pids.max": "max\n",
    "set/vm/cpuset.effective_cpus": "1\n",
    "set/vm/cpuset.cpus": "\n",
}


def test_v1(tmp_path: Path) -> None:
    seen = tree(tmp_path, GROUPS, V1, FILES)
    assert seen.version == "v1"
    assert seen.groups["cpuacct"] == "/vm"
    assert seen.limits == GroupLimits(
        cpu_shares=512,
        cpus=[1],
        memory_and_swap_max_bytes=65536,
        io_max={"8:0": IoLimits(read_bytes_per_second=1 << 20, write_count_per_second=50)},
    )
    tick = os.sysconf("SC_CLK_TCK")
    assert seen.figures == GroupFigures(
        cpu_seconds=1.5,
        cpu_user_seconds=100 / tick,
        cpu_system_seconds=50 / tick,
        cpu_period_count=4,
        cpu_throttled_count=1,
        cpu_throttled_seconds=0.25,
        memory_bytes=8192,
        memory_peak_bytes=16384,
        memory_node_bytes={"0": 2 * PAGE, "1": PAGE},
        swap_bytes=4096,
        memory_max_event_count=6,
        oom_kill_count=2,
        io={"8:0": IoFigures(read_bytes=11, write_bytes=22, read_count=3, write_count=4)},
        pids_count=0,  # none, and yet told
    )
    above = {one.hierarchy: one for one in seen.ancestors}
    assert above["cpu,cpuacct"].limits == GroupLimits(cpu_max_count=4.0)
    assert (above["memory"].path, above["memory"].limits.memory_max_bytes) == ("/box", 1 << 20)


def test_hybrid_takes_each_controller_from_where_it_is(tmp_path: Path) -> None:
    seen = tree(
        tmp_path,
        f"{GROUPS}0::/v\n",
        [*V1, "37 23 0:35 / AT/uni rw - cgroup2 cgroup2 rw"],
        FILES
        | {
            # v2 counts CPU time also where the controller is v1's
            "uni/v/cpu.stat": "usage_usec 99\nuser_usec 9\nsystem_usec 90\n",
            "uni/v/cgroup.controllers": "hugetlb\n",
            "uni/v/io.pressure": PSI,
        },
    )
    assert seen.version == "hybrid"
    assert seen.groups[""] == "/v"
    assert seen.figures.cpu_seconds == 1.5
    assert seen.figures.memory_bytes == 8192
    assert seen.limits.cpu_weight is None
    assert seen.figures.pressure_io is not None
    assert {one.path for one in seen.ancestors if one.hierarchy == ""} == {"/"}


@pytest.mark.parametrize(
    ("groups", "mounts"),
    [
        ("0::/../elsewhere\n", ["31 23 0:28 / AT/two rw - cgroup2 cgroup2 rw"]),
        ("0::/vm\n", []),
        ("0::/vm\n", ["31 23 0:28 / AT/two rw - cgroup2 cgroup2 rw"]),
        ("4:memory:/vm\n", ["32 23 0:29 /box AT/mem rw - cgroup cgroup rw,memory"]),
    ],
    ids=["of another namespace", "not mounted", "no controllers", "above what is mounted"],
)
def test_what_is_not_there_is_absent(tmp_path: Path, groups: str, mounts: list[str]) -> None:
    seen = tree(tmp_path, groups, mounts, {"two/../elsewhere/memory.current": "1\n"})
    assert seen.limits == GroupLimits()
    assert seen.figures == GroupFigures()


def test_this_host() -> None:
    seen = cgroup.usage(os.getpid())
    told = Path("/proc/self/cgroup").read_text()
    assert seen.groups
    for name, path in seen.groups.items():
        assert f"{name}:{path}" in told or f"{name}," in told or f",{name}" in told
    memory = Path(f"/sys/fs/cgroup/memory{seen.groups.get('memory')}/memory.usage_in_bytes")
    if "memory" in seen.groups and memory.exists():
        assert seen.figures.memory_bytes == pytest.approx(int(memory.read_text()), rel=0.2)
    elif seen.version == "v2":
        current = Path(f"/sys/fs/cgroup{seen.groups['']}/memory.current")
        assert (seen.figures.memory_bytes is not None) == current.exists()
