"""What the benchmarks ask of the guest and of the host: silence, CPU, memory, write latency."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import psutil

from scripts.bare import Qmp

# a process of its own: one that shares our interpreter would take our work for the guest's silence
_LISTENER = """
import array, socket, sys, threading, time
wire = socket.socket(socket.AF_UNIX); wire.connect(sys.argv[1])
seen = array.array("q")
def read():
    while wire.recv(65536):
        seen.append(time.monotonic_ns())
threading.Thread(target=read, daemon=True).start()
print("on", flush=True); sys.stdin.read(); seen.tofile(sys.stdout.buffer)
"""
_BOUNDARIES = [int(100_000 * 1.15**step) for step in range(100)]  # ns: 0.1 ms to 100 s


@contextlib.contextmanager
def listening(path: Path, silence: list[float]) -> Iterator[None]:
    """Adds the guest's longest silence during the block, in milliseconds."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _LISTENER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    since = time.monotonic_ns()
    yield
    until = time.monotonic_ns()
    said, _ = child.communicate()
    seen = array("q")
    seen.frombytes(said)
    inside = [since, *(one for one in seen if since <= one <= until), until]
    silence.append(max(b - a for a, b in itertools.pairwise(inside)) / 1e6)


def cpu_seconds(pid: int, without: frozenset[int] = frozenset()) -> float:
    """What QEMU has used, but for its threads *without*, and we and our children that ended."""
    process, ours = psutil.Process(pid), psutil.Process().cpu_times()
    times = process.cpu_times()
    left_out = sum(
        one.user_time + one.system_time for one in process.threads() if one.id in without
    )
    mine = ours.user + ours.system + ours.children_user + ours.children_system
    return float(times.user + times.system + mine - left_out)


def vcpus(qmp: Qmp) -> frozenset[int]:
    """The threads that are the guest's own work."""
    return frozenset(one["thread-id"] for one in qmp("query-cpus-fast"))


class Growth:
    """How much more memory some processes held at their peaks than at the start."""

    def __init__(self, *pids: int) -> None:
        self._before = {}
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is as of now
            self._before[pid] = _kib(pid, "VmRSS")

    def mib(self) -> float:
        return sum(_kib(pid, "VmHWM") - before for pid, before in self._before.items()) / 1024


def _kib(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def watch_latency(qmp: Qmp, device: str) -> None:
    """Count the guest's requests to the virtio-blk *device* by their latency, from now on."""
    qmp("block-latency-histogram-set", id=_qdev(device), boundaries=_BOUNDARIES)


def longest(qmp: Qmp, device: str) -> tuple[float, float]:
    """The longest write and the longest flush since then: ms, rounded up by at most 15 %."""
    [found] = [one for one in qmp("query-blockstats") if one.get("qdev") == _qdev(device)]
    stats = found["stats"]
    return _slowest(stats["wr_latency_histogram"]), _slowest(stats["flush_latency_histogram"])


def _slowest(histogram: dict[str, list[int]]) -> float:
    last = max((at for at, count in enumerate(histogram["bins"]) if count), default=-1)
    if last < 0:
        return 0
    return histogram["boundaries"][min(last, len(_BOUNDARIES) - 1)] / 1e6


def _qdev(device: str) -> str:
    return f"/machine/peripheral/{device}/virtio-backend"
