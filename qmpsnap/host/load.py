"""What the host as a whole has, uses and lacks: its CPUs, memory, load and pressure."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from qmpsnap.errors import LocalFailed
from qmpsnap.host import kernelfile
from qmpsnap.host.kernelfile import kilobytes, whole
from qmpsnap.host.tasks import PROC

_TICK = 1 / os.sysconf("SC_CLK_TCK")


class Stall(msgspec.Struct, frozen=True, kw_only=True):
    """The share of time, in percent, in which tasks waited, and how long in all since boot."""

    average_10_seconds_percent: float
    average_60_seconds_percent: float
    average_300_seconds_percent: float
    total_seconds: float


class Pressure(msgspec.Struct, frozen=True, kw_only=True):
    """Pressure on one resource (PSI): *some* task waited, or *full*: all that could have run."""

    some: Stall | None = None
    full: Stall | None = None


class HostUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What the host has and uses; CPU times are sums over all CPUs since *booted_at*.

    *uptime_seconds* goes on while the host sleeps; *boot_id* is a new one after each boot. Pressure
    is None where the kernel does not measure it.
    """

    cpu_count: int
    load_1_minute: float
    load_5_minutes: float
    load_15_minutes: float
    memory_total_bytes: int
    memory_available_bytes: int
    swap_total_bytes: int
    swap_free_bytes: int
    booted_at: str
    cpu_user_seconds: float
    cpu_system_seconds: float
    cpu_idle_seconds: float
    cpu_iowait_seconds: float | None
    cpu_steal_seconds: float | None
    cpu_guest_seconds: float | None = None
    memory_free_bytes: int | None = None
    memory_cached_bytes: int | None = None
    hugetlb_total_bytes: int | None = None
    hugetlb_free_bytes: int | None = None
    boot_id: str | None = None
    uptime_seconds: float | None = None
    pressure_cpu: Pressure | None = None
    pressure_memory: Pressure | None = None
    pressure_io: Pressure | None = None


def usage(*, proc: Path = PROC) -> HostUsage:
    """What the host uses now. Raises LocalFailed where /proc does not tell."""
    loads = (kernelfile.text(proc / "loadavg") or "").split()[:3]
    memory, stat = kernelfile.table(proc / "meminfo", ":"), kernelfile.table(proc / "stat")
    try:
        one, five, fifteen = map(float, loads)
        ticks = [int(word) for word in stat.get("cpu", "").split()]
        booted = _moment(int(stat["btime"]))
        # user nice system idle iowait irq softirq steal guest guest_nice; user has the guests' too
        seconds = [tick * _TICK for tick in ticks] + [0.0] * (10 - len(ticks))
    except (LookupError, ValueError, ArithmeticError) as odd:
        raise LocalFailed(f"{proc}: stat or loadavg cannot be read") from odd
    if len(ticks) < 4 or "MemTotal" not in memory:
        raise LocalFailed(f"{proc}: stat or meminfo cannot be read")
    page = kilobytes(memory, "Hugepagesize") or 0
    return HostUsage(
        cpu_count=os.cpu_count() or 1,
        load_1_minute=one,
        load_5_minutes=five,
        load_15_minutes=fifteen,
        memory_total_bytes=kilobytes(memory, "MemTotal") or 0,
        memory_available_bytes=kilobytes(memory, "MemAvailable") or 0,
        swap_total_bytes=kilobytes(memory, "SwapTotal") or 0,
        swap_free_bytes=kilobytes(memory, "SwapFree") or 0,
        booted_at=booted,
        cpu_user_seconds=seconds[0] + seconds[1],
        cpu_system_seconds=seconds[2] + seconds[5] + seconds[6],
        cpu_idle_seconds=seconds[3],
        cpu_iowait_seconds=seconds[4] if len(ticks) > 4 else None,
        cpu_steal_seconds=seconds[7] if len(ticks) > 7 else None,
        cpu_guest_seconds=seconds[8] + seconds[9] if len(ticks) > 8 else None,
        memory_free_bytes=kilobytes(memory, "MemFree"),
        memory_cached_bytes=kilobytes(memory, "Cached"),
        hugetlb_total_bytes=_pages(memory, "HugePages_Total", page),
        hugetlb_free_bytes=_pages(memory, "HugePages_Free", page),
        boot_id=kernelfile.text(proc / "sys/kernel/random/boot_id"),
        uptime_seconds=time.clock_gettime(time.CLOCK_BOOTTIME),
        pressure_cpu=pressure(proc / "pressure/cpu"),
        pressure_memory=pressure(proc / "pressure/memory"),
        pressure_io=pressure(proc / "pressure/io"),
    )


def pressure(path: Path) -> Pressure | None:
    """What a file of PSI says, the host's or a group's; None where nothing is measured."""
    lines = kernelfile.table(path)  # `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`
    if not lines:
        return None
    return Pressure(some=_stall(lines.get("some")), full=_stall(lines.get("full")))


def _stall(line: str | None) -> Stall | None:
    fields = dict(word.partition("=")[::2] for word in (line or "").split())
    try:
        return Stall(
            average_10_seconds_percent=float(fields["avg10"]),
            average_60_seconds_percent=float(fields["avg60"]),
            average_300_seconds_percent=float(fields["avg300"]),
            total_seconds=int(fields["total"]) / 1e6,
        )
    except (LookupError, ValueError, ArithmeticError):
        return None


def _pages(memory: dict[str, str], name: str, page: int) -> int | None:
    count = whole(memory.get(name))
    return None if count is None else count * page


def _moment(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return moment.replace("+00:00", "Z")
