"""Intervals between samples, and files of both versions."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from qmpsnap.engine import usage
from qmpsnap.engine.interval import between
from qmpsnap.engine.sample import Sample
from qmpsnap.errors import ManifestError
from qmpsnap.host import filesystem, load
from qmpsnap.host.cgroup import CgroupUsage
from qmpsnap.host.counters import GroupFigures
from qmpsnap.host.interfaces import InterfaceUsage
from qmpsnap.host.limits import GroupLimits
from qmpsnap.host.tasks import ProcessUsage, Threads, ThreadSum, ThreadUsage
from qmpsnap.hypervisor.machine.figures import DiskUsage, GuestUsage
from qmpsnap.store.layout import LocalRoot
from tests.rig.qemu import ROOT

replaced = msgspec.structs.replace
HOST = replaced(
    load.usage(), boot_id="this", uptime_seconds=1000.0, cpu_user_seconds=50.0, pressure_cpu=None
)


def sample(n: int, **other: Any) -> Sample:
    """A sample that is *n* steps of ten seconds on; each counter grows by a number of its own."""
    stall = load.Stall(
        average_10_seconds_percent=0,
        average_60_seconds_percent=0,
        average_300_seconds_percent=0,
        total_seconds=2.5 * n,
    )
    vcpus = [
        ThreadUsage(name=str(one), thread_id=50 + one, cpu_user_seconds=n * (one + 1.0),
                    cpu_system_seconds=0)
        for one in range(2)
    ]  # fmt: skip
    nothing = ThreadSum(thread_count=0, cpu_user_seconds=0, cpu_system_seconds=0)
    disk = DiskUsage(
        disk="vd0", qdev="/vd0", read_bytes=100 * n, write_bytes=0, discard_bytes=None,
        read_count=10 * n, write_count=0, flush_count=5 * n, discard_count=None,
        read_seconds=0.02 * n, write_seconds=0, flush_seconds=0.5 * n, failed_read_count=0,
        failed_write_count=0, failed_flush_count=0, idle_seconds=None,
    )  # fmt: skip
    tap = InterfaceUsage(
        name="tap0", bridge=None, queue_count=1, sent_bytes=10 * n, sent_packet_count=n,
        sent_dropped_count=0, received_bytes=1000 * n, received_packet_count=n,
        received_dropped_count=0,
    )  # fmt: skip
    made = Sample(
        sampled_at="2026-11-22T16:50:57.123Z",
        process=ProcessUsage(
            pid=7, start_ticks=9, cpu_user_seconds=15.0 * n, cpu_system_seconds=5.0 * n,
            read_bytes=4096 * n, write_bytes=0,
        ),
        threads=Threads(
            vcpus=vcpus, iothreads=[replaced(vcpus[1], name="io0")], main=None,
            iothread=nothing, worker=nothing,
            vcpu=ThreadSum(thread_count=2, cpu_user_seconds=3.0 * n, cpu_system_seconds=0,
                           run_delay_seconds=1.0 * n),
        ),
        interfaces=[tap],
        cgroup=CgroupUsage(
            version="v2", groups={}, limits=GroupLimits(), ancestors=[],
            figures=GroupFigures(cpu_seconds=7.0 * n, cpu_throttled_seconds=1.0 * n),
        ),
        guest=GuestUsage(disks=[disk], balloon_bytes=None, dirty_rate=None),
        host=replaced(
            HOST, uptime_seconds=1000.0 + 10 * n, cpu_user_seconds=50.0 + 20 * n,
            pressure_io=load.Pressure(some=stall),
        ),
        local_root=filesystem.examine(ROOT),
    )  # fmt: skip
    return replaced(made, **other)


def test_an_interval() -> None:
    over = between(sample(1), sample(3), "earlier")
    assert over is not None
    assert (over.since, over.seconds) == ("earlier", 20)
    assert (over.cpu_seconds, over.cpu_share) == (40, 2)
    assert (over.vcpu_share, over.vcpu_shares) == (0.3, {"0": 0.1, "1": 0.2})
    assert (over.iothread_shares, over.iothread_share, over.main_share) == ({"io0": 0.2}, 0, None)
    assert over.vcpu_run_delay_share == 0.1
    assert (over.read_bytes, over.read_bytes_per_second) == (8192, 409.6)
    assert over.write_bytes == 0
    assert over.voluntary_switch_count is None
    (disk,) = over.disks or []
    assert (disk.read_bytes, disk.read_count, disk.read_count_per_second) == (200, 20, 1)
    assert disk.read_latency_seconds == pytest.approx(0.002)
    assert disk.write_latency_seconds is None  # nothing was written
    assert disk.flush_latency_seconds == pytest.approx(0.1)
    (tap,) = over.interfaces or []
    assert (tap.sent_bytes, tap.received_bytes_per_second) == (20, 100)
    assert (over.cgroup_cpu_seconds, over.cgroup_throttled_share) == (14, 0.1)
    assert over.host_cpu_share == 2
    assert (over.host_pressure_io_share, over.host_pressure_cpu_share) == (0.25, None)


@pytest.mark.parametrize(
    "other",
    [
        {"process": ProcessUsage(pid=7, start_ticks=10)},
        {"process": ProcessUsage(pid=8, start_ticks=9)},
        {"process": ProcessUsage(pid=7)},
        {"process": None},
        {"host": replaced(HOST, boot_id="another", uptime_seconds=2000.0)},
    ],
    ids=["started again", "another", "unknown", "gone", "rebooted"],
)
def test_no_interval_between_two_processes(other: dict[str, Any]) -> None:
    assert between(sample(1), sample(2, **other), "earlier") is None
    assert between(sample(1, **other), sample(2), "earlier") is None


def test_what_was_counted_anew_or_came_meanwhile_has_no_figures() -> None:
    new = sample(2)
    assert new.guest is not None
    (disk,) = new.guest.disks or []
    fewer = replaced(disk, read_bytes=1, read_count=1)
    late = replaced(disk, qdev="/late")
    over = between(
        sample(1), replaced(new, guest=replaced(new.guest, disks=[fewer, late])), "earlier"
    )
    assert over is not None
    (one,) = over.disks or []
    assert (one.read_bytes, one.read_count, one.read_latency_seconds) == (None, None, None)
    assert one.flush_count == 5


def test_of_the_snapshot_before_the_last_sample_counts() -> None:
    first = usage.of("web", "a", sample(1), sample(2), store=None, earlier=None)
    assert first.since_last is None
    assert first.around is not None
    assert first.around.seconds == 10
    second = usage.of("web", "b", sample(5), None, store=None, earlier=first)
    assert second.since_last is not None
    assert (second.since_last.since, second.since_last.seconds) == ("a", 30)
    assert second.around is None
    third = usage.of("web", "c", sample(6), None, store=None, earlier=second)
    assert third.since_last is not None
    assert third.since_last.seconds == 10


def test_there_and_back(tmp_path: Any) -> None:
    used = usage.of("web", "a", sample(1), sample(2), store=None, earlier=None)
    assert usage.decode(usage.encode(used), "x") == used
    root = LocalRoot(tmp_path)
    root.vm("web").mkdir()
    assert usage.last(root, "web") is None
    usage.keep(root, used)
    assert usage.last(root, "web") == used
    root.usage("web").write_text("{")
    assert usage.last(root, "web") is None


FIRST = {
    "format": "qmpsnap-usage",
    "version": 1,
    "sampled_at": "2026-11-20T10:00:00.000Z",
    "process": {
        "pid": 5, "cpu_user_seconds": 1.5, "cpu_system_seconds": 0.5, "rss_bytes": 4096,
        "vms_bytes": 8192, "swap_bytes": None, "read_bytes": 1, "write_bytes": 2, "read_count": 3,
        "write_count": 4, "thread_count": 6, "open_fd_count": 7, "voluntary_switch_count": 8,
        "involuntary_switch_count": 9, "cpu_affinity": [0],
    },
    "cgroup": {
        "groups": {"": "/vm"}, "memory_bytes": 10, "memory_max_bytes": 20, "cpu_seconds": 2.0,
        "cpu_max_count": None, "pids_count": 6,
    },
    "host": {
        "cpu_count": 2, "load_1_minute": 0.5, "load_5_minutes": 0.25, "load_15_minutes": 0.0,
        "memory_total_bytes": 100, "memory_available_bytes": 50, "swap_total_bytes": 0,
        "swap_free_bytes": 0, "booted_at": "2026-11-20T09:00:00.000Z", "cpu_user_seconds": 1.0,
        "cpu_system_seconds": 1.0, "cpu_idle_seconds": 9.0, "cpu_iowait_seconds": None,
        "cpu_steal_seconds": None,
    },
    "local_root": {
        "path": "/srv", "device": 1, "magic": 2, "free_bytes": 3, "total_bytes": 4,
        "free_inodes": 5, "read_only": False,
        "mount": {"source": "/dev/sda", "point": "/srv", "fstype": "ext4", "network": False,
                  "options": ["rw"]},
    },
}  # fmt: skip


def test_version_1_stays_readable() -> None:
    old = usage.decode(json.dumps(FIRST), "usage.json")
    assert (old.version, old.id, old.after, old.since_last) == (1, None, None, None)
    assert old.before.process is not None
    assert (old.before.process.cpu_user_seconds, old.before.process.read_count) == (1.5, 3)
    assert old.before.process.voluntary_switch_count is None  # it was that of one thread
    assert old.before.memory is not None
    assert (old.before.memory.rss_bytes, old.before.memory.pss_bytes) == (4096, None)
    assert old.before.cgroup is not None
    assert old.before.cgroup.limits.memory_max_bytes == 20
    assert old.before.cgroup.figures.pids_count == 6
    assert old.before.host.load_1_minute == 0.5
    without = usage.decode(json.dumps(FIRST | {"process": None, "cgroup": None}), "usage.json")
    assert (without.before.process, without.before.cgroup) == (None, None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (json.dumps(FIRST | {"version": 3}), "version 3.*up to 2"),
        (json.dumps(FIRST | {"format": "other"}), "other"),
        (json.dumps(FIRST | {"host": 1}), r"\$.host"),
        ('{"format": "qmpsnap-usage", "version": 2}', "before"),
        ("{", "usage.json"),
    ],
)
def test_what_is_no_usage_is_told(text: str, told: str) -> None:
    with pytest.raises(ManifestError, match=told):
        usage.decode(text, "usage.json")


def test_the_committed_schema_is_current() -> None:
    for word, schema in usage.schemas().items():
        committed = ROOT / "docs/schemas" / f"{word}.json"
        assert json.loads(committed.read_text()) == schema, "run scripts/schemas"
