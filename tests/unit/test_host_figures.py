"""Figures of processes and of the host: from trees of files, and of this process itself."""

from __future__ import annotations

import mmap
import os
import resource
from pathlib import Path

import pytest

from qmpsnap.errors import LocalFailed
from qmpsnap.host import interfaces, kernelfile, load, memory, tasks

STAT = (
    "{pid} (qemu (x) y) S 1 1 1 0 -1 4194560 {minor} 0 3 0 {user} {system} "
    "0 0 20 0 3 0 {start} 9 9\n"
)
TICK = 1 / os.sysconf("SC_CLK_TCK")


def task(top: Path, pid: int, thread: int, user: int, system: int, switches: int = 2) -> None:
    home = top / str(pid) / "task" / str(thread)
    home.mkdir(parents=True)
    text = STAT.format(pid=thread, minor=7, user=user, system=system, start=100)
    (home / "stat").write_text(text)
    (home / "schedstat").write_text("1000 2500000000 3\n")
    told = f"Name:\tqemu\nvoluntary_ctxt_switches:\t{switches}\nnonvoluntary_ctxt_switches:\t1\n"
    (home / "status").write_text(told)


def test_a_process_of_four_threads(tmp_path: Path) -> None:
    for thread, user in ((7, 1), (8, 200), (9, 30), (10, 4)):
        task(tmp_path, 7, thread, user, 10)
    (tmp_path / "7/stat").write_text(STAT.format(pid=7, minor=7, user=500, system=100, start=100))
    (tmp_path / "7/io").write_text("rchar: 5\nwchar: 6\nsyscr: 7\nsyscw: 8\nread_bytes: 4096\n"
                                   "write_bytes: 0\ncancelled_write_bytes: 1\n")  # fmt: skip
    used = tasks.usage(7, proc=tmp_path)
    assert used.cpu_user_seconds == pytest.approx(500 * TICK)
    assert (used.start_ticks, used.minor_fault_count, used.major_fault_count) == (100, 7, 3)
    assert (used.read_bytes, used.write_bytes, used.read_count, used.write_count) == (4096, 0, 7, 8)
    assert (used.thread_count, used.voluntary_switch_count) == (4, 8)
    assert used.open_fd_count is None  # not for us to see
    found = tasks.threads(7, [("0", 8), ("1", 8), ("2", 99)], [("io0", 9)], proc=tmp_path)
    # one thread may run several vCPUs; one that has ended is left out
    assert [one.name for one in found.vcpus] == ["0", "1"]
    assert found.vcpu.thread_count == 1
    assert found.vcpu.cpu_user_seconds == pytest.approx(200 * TICK)
    assert found.iothread.cpu_user_seconds == pytest.approx(30 * TICK)
    assert found.main is not None
    assert found.main.cpu_user_seconds == pytest.approx(1 * TICK)
    assert found.worker.cpu_user_seconds == pytest.approx(4 * TICK)
    assert found.worker.run_delay_seconds == 2.5
    with pytest.raises(LocalFailed):
        tasks.usage(6, proc=tmp_path)


def test_this_process() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF)
    used = tasks.usage(os.getpid())
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert used.cpu_user_seconds is not None
    assert before.ru_utime - 2 * TICK <= used.cpu_user_seconds <= after.ru_utime + 2 * TICK
    assert used.cpu_affinity == sorted(os.sched_getaffinity(0))
    assert used.open_fd_count
    assert 0 < (used.cpu_share_since_start or 0) <= (os.cpu_count() or 1)


STATUS = (
    "VmHWM:\t 2048 kB\nVmRSS:\t 1024 kB\nVmSize:\t 9 kB\nVmSwap:\t 3 kB\nHugetlbPages:\t 4096 kB\n"
)
ROLLUP = (
    "00400000-7fff ---p 00000000 00:00 0 [rollup]\nRss: 1024 kB\nPss: 900 kB\n"
    "AnonHugePages: 512 kB\nShmemPmdMapped: 0 kB\nFilePmdMapped: 0 kB\n"
)
MAPS = (
    "7f00 default anon=16 dirty=16 active=0 N0=10 N1=6 kernelpagesize_kB=4\n"
    "7f80 default file=/dev/hugepages/x huge dirty=2 N1=2 kernelpagesize_kB=2048\n"
    "7fc0 default file=/lib/x mapped=1\n"
)


@pytest.fixture
def held(tmp_path: Path) -> Path:
    home = tmp_path / "7"
    home.mkdir()
    for name, text in {"status": STATUS, "smaps_rollup": ROLLUP, "numa_maps": MAPS}.items():
        (home / name).write_text(text)
    (tmp_path / "one").write_text("0\n")
    (tmp_path / "two").write_text("0-1\n")
    return tmp_path


def test_memory_of_two_nodes(held: Path) -> None:
    used = memory.usage(7, proc=held, nodes=held / "two")
    assert (used.rss_bytes, used.rss_peak_bytes) == (1 << 20, 2 << 20)
    assert (used.pss_bytes, used.transparent_huge_bytes) == (900 << 10, 512 << 10)
    assert used.hugetlb_bytes == 4 << 20
    assert used.node_bytes == {"0": 40 << 10, "1": (24 << 10) + (4 << 20)}
    assert used.rss_anon_bytes is None


def test_memory_of_one_node_takes_no_walk(held: Path) -> None:
    used = memory.usage(7, proc=held, nodes=held / "one", walk=False)
    assert used.node_bytes == {"0": 5 << 20}
    assert used.pss_bytes is None


def test_memory_that_is_too_large_to_be_walked(held: Path) -> None:
    used = memory.usage(7, proc=held, nodes=held / "two", walked_bytes=(1 << 20) - 1)
    assert used.rss_bytes == 1 << 20
    assert (used.pss_bytes, used.transparent_huge_bytes, used.node_bytes) == (None, None, None)


def test_memory_of_this_process_grows_with_what_it_touches() -> None:
    before = memory.usage(os.getpid())
    with mmap.mmap(-1, 32 << 20) as room:
        room.write(b"x" * (32 << 20))
        after = memory.usage(os.getpid())
    for name in ("rss_bytes", "pss_bytes"):
        grown = getattr(after, name) - getattr(before, name)
        assert 30 << 20 <= grown <= 36 << 20, name


def test_taps_are_found_by_the_descriptors(tmp_path: Path) -> None:
    home = tmp_path / "7"
    for folder in ("fd", "fdinfo", "net"):
        (home / folder).mkdir(parents=True)
    (tmp_path / "self/net").mkdir(parents=True)
    for number, at in (
        (3, "/dev/net/tun"),
        (4, "/dev/net/tun"),
        (5, "/dev/kvm"),
        (6, "/dev/net/tun"),
    ):
        (home / f"fd/{number}").symlink_to(at)
        name = "tap9" if number == 6 else "tap0"
        (home / f"fdinfo/{number}").write_text(f"pos:\t0\nflags:\t0104002\niff:\t{name}\n")
    head = "Inter-|   Receive\n face |bytes    packets\n"
    (home / "net/dev").write_text(f"{head}    lo: {'1 ' * 16}\n")
    row = " ".join(str(number) for number in range(1, 17))
    (tmp_path / "self/net/dev").write_text(f"{head}  tap0: {row}\n")
    (tmp_path / "sys/tap0").mkdir(parents=True)
    (tmp_path / "sys/tap0/master").symlink_to("../br0")
    (one,) = interfaces.usage(7, proc=tmp_path, sys=tmp_path / "sys") or []  # tap9 is elsewhere
    assert (one.name, one.bridge, one.queue_count) == ("tap0", "br0", 2)
    assert (one.sent_bytes, one.sent_packet_count, one.sent_dropped_count) == (1, 2, 4)
    received = (one.received_bytes, one.received_packet_count, one.received_dropped_count)
    assert received == (9, 10, 12)
    assert interfaces.usage(8, proc=tmp_path) is None


def test_this_host() -> None:
    host = load.usage()
    assert host.cpu_count == os.cpu_count()
    assert 0 < host.memory_available_bytes <= host.memory_total_bytes
    assert host.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    told = Path("/proc/pressure/cpu")
    assert (host.pressure_cpu is not None) == told.exists()
    total = sum(os.times()[:2])
    assert host.cpu_user_seconds > total / 2


def test_a_host_without_pressure_has_none(tmp_path: Path) -> None:
    assert load.pressure(tmp_path / "cpu") is None
    (tmp_path / "cpu").write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    seen = load.pressure(tmp_path / "cpu")
    assert seen is not None
    assert seen.full is None
    assert seen.some is not None
    assert seen.some.total_seconds == 0
    with pytest.raises(LocalFailed):
        load.usage(proc=tmp_path)


@pytest.mark.parametrize("said", ["0-9999999999", "5-1", "-1", "3-x", "9" * 5000])
def test_a_list_of_cpus_that_no_host_has(said: str) -> None:
    assert kernelfile.cpu_list(said) is None


@pytest.mark.parametrize("said", ["some avg10=", "some a", "full avg10=1 avg60=1 avg300=1"])
def test_pressure_that_is_not_told_in_full(tmp_path: Path, said: str) -> None:
    (tmp_path / "cpu").write_text(said)
    found = load.pressure(tmp_path / "cpu")
    assert found is not None
    assert (found.some, found.full) == (None, None)
