"""What QEMU itself has counted of its guest: disks, balloon, dirty rate. Asking changes nothing."""

from __future__ import annotations

import time

import msgspec

from qmpsnap.errors import CommandRefused
from qmpsnap.hypervisor.monitor import Monitor


class DiskUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest has done with one drive since QEMU started; the seconds are sums of latencies.

    *disk* is the name that people use, *qdev* is QEMU's of its device. *idle_seconds*: since the
    last request; None without one.
    """

    disk: str
    qdev: str
    read_bytes: int
    write_bytes: int
    discard_bytes: int | None
    read_count: int
    write_count: int
    flush_count: int
    discard_count: int | None
    read_seconds: float
    write_seconds: float
    flush_seconds: float
    failed_read_count: int
    failed_write_count: int
    failed_flush_count: int
    idle_seconds: float | None


class DirtyRate(msgspec.Struct, frozen=True, kw_only=True):
    """The last rate that somebody has had QEMU measure; *age_seconds* since that began."""

    bytes_per_second: int
    measured_seconds: int
    age_seconds: float | None


class GuestUsage(msgspec.Struct, frozen=True, kw_only=True):
    """*balloon_bytes* is what the balloon leaves to the guest, None without a balloon.

    *dirty_rate* is None unless somebody has had it measured: to measure costs the guest.
    """

    disks: list[DiskUsage] | None
    balloon_bytes: int | None
    dirty_rate: DirtyRate | None


class _Stats(msgspec.Struct):
    rd_bytes: int
    wr_bytes: int
    rd_operations: int
    wr_operations: int
    flush_operations: int
    rd_total_time_ns: int
    wr_total_time_ns: int
    flush_total_time_ns: int
    failed_rd_operations: int
    failed_wr_operations: int
    failed_flush_operations: int
    unmap_bytes: int | None = None
    unmap_operations: int | None = None
    idle_time_ns: int | None = None


class _Blockstats(msgspec.Struct):
    stats: _Stats
    device: str = ""
    qdev: str = ""


class _Balloon(msgspec.Struct):
    actual: int


class _Measured(msgspec.Struct, rename="kebab"):
    status: str
    start_time: int
    calc_time: int
    dirty_rate: int | None = None


async def query(monitor: Monitor) -> GuestUsage:
    """Ask now. Raises MonitorLost, ReplyMalformed."""
    return GuestUsage(
        disks=await _disks(monitor),
        balloon_bytes=await _balloon(monitor),
        dirty_rate=await _dirty_rate(monitor),
    )


async def _disks(monitor: Monitor) -> list[DiskUsage] | None:
    try:
        rows = await monitor.query("query-blockstats", list[_Blockstats])
    except CommandRefused:
        return None
    return [_disk(row) for row in rows if row.qdev]  # others are no disks of the guest


def _disk(row: _Blockstats) -> DiskUsage:
    stats = row.stats
    return DiskUsage(
        disk=row.device or row.qdev,
        qdev=row.qdev,
        read_bytes=stats.rd_bytes,
        write_bytes=stats.wr_bytes,
        discard_bytes=stats.unmap_bytes,
        read_count=stats.rd_operations,
        write_count=stats.wr_operations,
        flush_count=stats.flush_operations,
        discard_count=stats.unmap_operations,
        read_seconds=stats.rd_total_time_ns / 1e9,
        write_seconds=stats.wr_total_time_ns / 1e9,
        flush_seconds=stats.flush_total_time_ns / 1e9,
        failed_read_count=stats.failed_rd_operations,
        failed_write_count=stats.failed_wr_operations,
        failed_flush_count=stats.failed_flush_operations,
        idle_seconds=None if stats.idle_time_ns is None else stats.idle_time_ns / 1e9,
    )


async def _balloon(monitor: Monitor) -> int | None:
    try:
        return (await monitor.query("query-balloon", _Balloon)).actual
    except CommandRefused:
        return None  # there is none


async def _dirty_rate(monitor: Monitor) -> DirtyRate | None:
    try:
        last = await monitor.query("query-dirty-rate", _Measured)
    except CommandRefused:
        return None
    if last.status != "measured" or last.dirty_rate is None:
        return None
    # the host's monotonic clock in 7.2, the time of day in 11.1: 31 years apart
    now = time.time() if last.start_time > 1_000_000_000 else time.monotonic()
    return DirtyRate(
        bytes_per_second=last.dirty_rate << 20,
        measured_seconds=last.calc_time,
        age_seconds=max(0.0, now - last.start_time),
    )
