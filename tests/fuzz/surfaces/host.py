"""What the kernel tells in files: control groups of both kinds, a process, the host as a whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

from qmpsnap.errors import SnapError
from qmpsnap.host import (
    cgroup,
    headroom,
    hugepages,
    interfaces,
    kernelfile,
    limits,
    load,
    memory,
    tasks,
    unixsocket,
)
from qmpsnap.host.filesystem import parsed
from tests.fuzz import mutation
from tests.fuzz.surface import Surface
from tests.fuzz.surfaces.stores import Tree, laid

_WORDS = ("max", "-1", "9" * 30, "9" * 5000, "0-9999999999", "5-1", "0-", ",", " ", "\n", "\0", "=",
          ":", "N0=", "N9999=1", "kB", "nan", "inf", "1e400", "\\777", "\\400", "٣", "²", "/..",
          " - ", "some ", "total=", "\x85", "\u2028")  # fmt: skip
_PSI = (
    b"some avg10=1.50 avg60=0.25 avg300=0.00 total=2500000\n"
    b"full avg10=0.00 avg60=0 avg300=0 total=0\n"
)
_SECOND = {
    "cpu.max": b"150000 100000\n", "cpu.weight": b"200\n", "cpu.pressure": _PSI,
    "cpu.stat": b"usage_usec 2500000\nuser_usec 2\nsystem_usec 5\nnr_periods 4\n",
    "cpuset.cpus.effective": b"0-2,5\n", "cpuset.mems.effective": b"0\n",
    "memory.max": b"1073741824\n", "memory.current": b"4096\n", "memory.swap.max": b"max\n",
    "memory.stat": b"anon 1\ninactive_file 4096\nactive_file 2\n",
    "memory.events": b"high 5\nmax 2\n",
    "memory.numa_stat": b"anon N0=4096 N1=8192\nfile N0=1 N1=0\n", "memory.peak": b"8192\n",
    "io.max": b"8:16 rbps=2097152 wbps=max riops=max wiops=120\n", "cgroup.procs": b"7\n",
    "io.stat": b"8:16 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n",
    "pids.max": b"max\n", "pids.current": b"9\n", "hugetlb.2MB.max": b"4194304\n",
}  # fmt: skip
_FIRST = {
    "cpuacct.usage": b"1500000000\n", "cpuacct.stat": b"user 100\nsystem 50\n",
    "cpu.cfs_quota_us": b"50000\n", "cpu.cfs_period_us": b"100000\n", "cpu.shares": b"512\n",
    "cpu.stat": b"nr_periods 4\nnr_throttled 1\nthrottled_time 250000000\n",
    "memory.usage_in_bytes": b"8192\n", "memory.limit_in_bytes": b"9223372036854771712\n",
    "memory.numa_stat": b"total=3 N0=2 N1=1\nfile=1 N0=1\n", "memory.failcnt": b"6\n",
    "memory.stat": b"cache 1\nswap 4096\ntotal_inactive_file 3\n", "cgroup.procs": b"7\n",
    "blkio.throttle.io_service_bytes": b"8:0 Read 1\n8:0 Write 2\nTotal 3\n",
    "blkio.throttle.io_serviced": b"8:0 Read 3\nTotal 7\n", "pids.max": b"max\n",
    "blkio.throttle.read_bps_device": b"8:0 1048576\n", "cpuset.cpus": b"0-3\n",
}  # fmt: skip
_MOUNTS = (
    "36 35 98:0 /root /a\\040b rw,noatime master:1 - ext3 /dev/root rw,errors=x\n"
    "31 1 0:1 / / rw - nfs4 s:/x rw"
)
_PROCESS = {
    "7/stat": b"7 (qemu (x) y) S 1 7 7 0 -1 4194304 50 0 2 0 120 30 0 0 20 0 4 0 5000 1000 200\n",
    "7/status": b"Name:\tqemu\nVmRSS:\t  1024 kB\nVmHWM:\t 2048 kB\nHugetlbPages:\t 0 kB\n"
    b"voluntary_ctxt_switches:\t9\nnonvoluntary_ctxt_switches:\t3\n",
    "7/io": b"rchar: 1\nwchar: 2\nsyscr: 3\nsyscw: 4\nread_bytes: 5\nwrite_bytes: 6\n",
    "7/smaps_rollup": b"55-7f ---p 00000000 00:00 0 [rollup]\nPss:  100 kB\nAnonHugePages: 4 kB\n",
    "7/numa_maps": b"55d0 default anon=3 dirty=3 N0=2 N1=1 kernelpagesize_kB=4\n",
    "7/task/7/stat": b"7 (qemu) S 1 7 7 0 -1 4194304 50 0 2 0 120 30 0 0 20 0 4 0 5000 1000 200\n",
    "7/task/7/status": b"voluntary_ctxt_switches:\t9\nnonvoluntary_ctxt_switches:\t3\n",
    "7/task/7/schedstat": b"1000 2000 3\n", "7/fdinfo/9": b"pos:\t0\niff:\ttap0\n",
    "nodes": b"0-1\n",
    "7/net/dev": b"Inter-| Receive\n face |bytes\n  tap0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n",
    "sys/class/net/tap0/statistics/rx_bytes": b"12\n", "7/mountinfo": b"",
    "loadavg": b"0.10 0.20 0.30 1/200 4000\n", "sys/kernel/random/boot_id": b"ab-cd\n",
    "stat": b"cpu  10 0 20 300 4 0 1 0 0 0\ncpu0 10 0 20 300 4\nbtime 1700000000\n",
    "meminfo": b"MemTotal:  1000 kB\nMemAvailable: 500 kB\nHugepagesize: 2048 kB\nCached: 1 kB\n",
    "pressure/cpu": _PSI, "pressure/io": _PSI,
    "pools/hugepages-2048kB/free_hugepages": b"4\n",
    "pools/hugepages-2048kB/resv_hugepages": b"1\n",
}  # fmt: skip


def _spoil(dice: Random, seed: Tree) -> Tree:
    made = dict(seed)
    for _ in range(dice.choice((1, 1, 2, 3))):
        name = dice.choice(list(made))
        if dice.random() < 0.1 and len(made) > 1:
            del made[name]
        elif dice.random() < 0.7:
            said = made[name].decode(errors="replace")
            made[name] = mutation.text(dice, said, _WORDS).encode(errors="surrogatepass")
        else:
            made[name] = mutation.content(dice, made[name])
    return made


def _groups() -> list[Tree]:
    second = {f"two/vm/{name}": content for name, content in _SECOND.items()}
    first = {f"one/vm/{name}": content for name, content in _FIRST.items()}
    names = b"cpu,cpuacct,memory,blkio,pids,cpuset"
    rows = b"31 23 0:28 / AT/two rw - cgroup2 cgroup2 rw\n"
    old = b"32 23 0:29 / AT/one rw shared:9 - cgroup cgroup rw,%b\n" % names
    return [
        {"7/cgroup": b"0::/vm\n", "self/mountinfo": rows, **second},
        {"7/cgroup": b"5:%b:/vm\n" % names, "self/mountinfo": old, **first},
        {
            "7/cgroup": b"5:%b:/vm\n0::/vm\n" % names,
            "self/mountinfo": old + rows,
            **first,
            **second,
        },
    ]


def _grouped(given: Tree, scratch: Path) -> object:
    table = given.get("self/mountinfo", b"").replace(b"AT", bytes(scratch / "proc"))
    laid(scratch / "proc", {**given, "self/mountinfo": table})
    for ask in (headroom.ceilings, cgroup.folders_of):
        with suppress(SnapError):
            ask(7, proc=scratch / "proc")
    return cgroup.usage(7, proc=scratch / "proc")


def _seen(given: Tree, scratch: Path) -> object:
    proc = scratch / "proc"
    laid(proc, given)
    asked: tuple[Callable[[], object], ...] = (
        lambda: tasks.usage(7, proc=proc),
        lambda: tasks.threads(7, [("0", 7)], [("io", 8)], proc=proc),
        lambda: memory.usage(7, proc=proc, nodes=proc / "nodes"),
        lambda: interfaces.usage(7, proc=proc, sys=proc / "sys"),
        lambda: load.usage(proc=proc),
        lambda: hugepages.default(proc / "meminfo"),
        lambda: hugepages.free_bytes(proc / "pools"),
    )
    for ask in asked:
        with suppress(SnapError):
            ask()
    return None


def _words(given: str, scratch: Path) -> object:
    (scratch / "x").write_text(given, errors="surrogatepass")
    return (
        kernelfile.cpu_list(given), kernelfile.numbers(scratch / "x"), limits.pairs(given),
        kernelfile.number(scratch / "x"), load.pressure(scratch / "x"),
        unixsocket.may_be(given, "/run/x"), list(parsed(given)),
    )  # fmt: skip


def _netlink(given: bytes, _scratch: Path) -> object:
    with suppress(OSError):
        return unixsocket.ends(given, "/run/qmp.sock")
    return None


def _answers() -> list[bytes]:
    import struct

    name = b"/run/qmp.sock\0"
    attributes = struct.pack("=HH", 4 + len(name), 0) + name + bytes(-len(name) % 4)
    attributes += struct.pack("=HHI", 8, 2, 4711)
    body = bytes(16) + attributes
    one = struct.pack("=IHHII", 16 + len(body), 20, 2, 1, 0) + body
    return [one + one + struct.pack("=IHHIIi", 20, 3, 2, 1, 0, 0), one, one[:16] + bytes(20)]


ALL = [
    Surface("cgroup", _groups, _grouped, _spoil, slow=True),
    Surface("proc", lambda: [_PROCESS], _seen, _spoil, slow=True),
    Surface("kernel-words",
            lambda: ["0-3,8", "5", "8:16 rbps=2 wbps=max", "usage_usec 25\nuser_usec 2",
                     _PSI.decode(), _MOUNTS],
            _words, lambda dice, seed: mutation.text(dice, seed, _WORDS)),
    Surface("socket-diag", _answers, _netlink),
]  # fmt: skip
