"""The figures of one snapshot, flat: what tables, CSV and charts show of its usage."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from qmpsnap.engine.history import Record
from qmpsnap.engine.interval import Interval
from qmpsnap.engine.sample import Sample
from qmpsnap.engine.usage import Usage


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one snapshot that a history shows, flat; None is what is not known.

    Those over an interval are since the snapshot before (*interval_seconds*): shares count CPUs, or
    are of the time. Sums are over the disks of the guest, over its taps. The others are of the
    first sample.
    """

    vm: str
    id: str
    state: str
    taken_at: str | None
    interval_seconds: float | None = None
    cpu_seconds: float | None = None
    cpu_share: float | None = None
    vcpu_share: float | None = None
    iothread_share: float | None = None
    main_share: float | None = None
    worker_share: float | None = None
    vcpu_run_delay_share: float | None = None
    cgroup_throttled_share: float | None = None
    rss_bytes: int | None = None
    pss_bytes: int | None = None
    swap_bytes: int | None = None
    hugetlb_bytes: int | None = None
    balloon_bytes: int | None = None
    cgroup_memory_bytes: int | None = None
    process_read_bytes_per_second: float | None = None
    process_write_bytes_per_second: float | None = None
    disk_read_bytes_per_second: float | None = None
    disk_write_bytes_per_second: float | None = None
    disk_read_count_per_second: float | None = None
    disk_write_count_per_second: float | None = None
    sent_bytes_per_second: float | None = None
    received_bytes_per_second: float | None = None
    thread_count: int | None = None
    open_fd_count: int | None = None
    host_cpu_share: float | None = None
    host_load_1_minute: float | None = None
    host_memory_available_bytes: int | None = None
    host_pressure_cpu_share: float | None = None
    host_pressure_memory_share: float | None = None
    host_pressure_io_share: float | None = None
    local_root_free_bytes: int | None = None
    store_root_free_bytes: int | None = None


def row(record: Record) -> Row:
    """The figures of *record*; one that could not be read has none."""
    found = Row(vm=record.vm, id=record.id, state=record.state, taken_at=record.taken_at)
    if record.usage is None:
        return found
    found = _of_sample(found, record.usage.before)
    if record.usage.since_last is not None:
        found = _of_interval(found, record.usage.since_last)
    return msgspec.structs.replace(found, store_root_free_bytes=_store(record.usage))


def _of_sample(found: Row, now: Sample) -> Row:
    memory, process, host = now.memory, now.process, now.host
    return msgspec.structs.replace(
        found,
        rss_bytes=memory.rss_bytes if memory else None,
        pss_bytes=memory.pss_bytes if memory else None,
        swap_bytes=memory.swap_bytes if memory else None,
        hugetlb_bytes=memory.hugetlb_bytes if memory else None,
        balloon_bytes=now.guest.balloon_bytes if now.guest else None,
        cgroup_memory_bytes=now.cgroup.figures.memory_bytes if now.cgroup else None,
        thread_count=process.thread_count if process else None,
        open_fd_count=process.open_fd_count if process else None,
        host_load_1_minute=host.load_1_minute,
        host_memory_available_bytes=host.memory_available_bytes,
        local_root_free_bytes=now.local_root.free_bytes,
    )


def _of_interval(found: Row, over: Interval) -> Row:
    return msgspec.structs.replace(
        found,
        interval_seconds=over.seconds,
        cpu_seconds=over.cpu_seconds,
        cpu_share=over.cpu_share,
        vcpu_share=over.vcpu_share,
        iothread_share=over.iothread_share,
        main_share=over.main_share,
        worker_share=over.worker_share,
        vcpu_run_delay_share=over.vcpu_run_delay_share,
        cgroup_throttled_share=over.cgroup_throttled_share,
        process_read_bytes_per_second=over.read_bytes_per_second,
        process_write_bytes_per_second=over.write_bytes_per_second,
        disk_read_bytes_per_second=_sum(one.read_bytes_per_second for one in over.disks or []),
        disk_write_bytes_per_second=_sum(one.write_bytes_per_second for one in over.disks or []),
        disk_read_count_per_second=_sum(one.read_count_per_second for one in over.disks or []),
        disk_write_count_per_second=_sum(one.write_count_per_second for one in over.disks or []),
        sent_bytes_per_second=_sum(one.sent_bytes_per_second for one in over.interfaces or []),
        received_bytes_per_second=_sum(
            one.received_bytes_per_second for one in over.interfaces or []
        ),
        host_cpu_share=over.host_cpu_share,
        host_pressure_cpu_share=over.host_pressure_cpu_share,
        host_pressure_memory_share=over.host_pressure_memory_share,
        host_pressure_io_share=over.host_pressure_io_share,
    )


def _store(used: Usage) -> int | None:
    return used.store_root.free_bytes if used.store_root else None


def _sum(parts: Iterable[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None
