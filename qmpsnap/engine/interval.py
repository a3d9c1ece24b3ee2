"""What was used between two samples of the same process: the only place that takes differences."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from qmpsnap.engine.sample import Sample
from qmpsnap.host.interfaces import InterfaceUsage
from qmpsnap.host.load import Pressure
from qmpsnap.host.tasks import Threads, ThreadUsage
from qmpsnap.hypervisor.machine.figures import DiskUsage


class DiskInterval(msgspec.Struct, frozen=True, kw_only=True):
    """One disk of the guest. The latencies are means of an operation; None where there was none."""

    disk: str
    read_bytes: int | None
    write_bytes: int | None
    read_count: int | None
    write_count: int | None
    flush_count: int | None
    read_bytes_per_second: float | None
    write_bytes_per_second: float | None
    read_count_per_second: float | None
    write_count_per_second: float | None
    read_latency_seconds: float | None
    write_latency_seconds: float | None
    flush_latency_seconds: float | None


class InterfaceInterval(msgspec.Struct, frozen=True, kw_only=True):
    """One tap, seen from the guest."""

    name: str
    sent_bytes: int | None
    received_bytes: int | None
    sent_bytes_per_second: float | None
    received_bytes_per_second: float | None


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """The figures over *seconds*, *since* the snapshot of that ID (or of this snapshot's own work).

    Shares count CPUs: 1.5 is one and a half of them all the time; *vcpu_shares* is by vCPU,
    *iothread_shares* by iothread. The shares of the run delay, of throttling and of pressure (some
    task waited) are of the time. None is what one of the two samples lacks, or what was counted
    anew in between.
    """

    since: str
    seconds: float
    cpu_seconds: float | None
    cpu_share: float | None
    vcpu_share: float | None
    iothread_share: float | None
    main_share: float | None
    worker_share: float | None
    vcpu_shares: dict[str, float]
    iothread_shares: dict[str, float]
    vcpu_run_delay_share: float | None
    read_bytes: int | None
    write_bytes: int | None
    read_bytes_per_second: float | None
    write_bytes_per_second: float | None
    voluntary_switch_count: int | None
    involuntary_switch_count: int | None
    disks: list[DiskInterval] | None
    interfaces: list[InterfaceInterval] | None
    cgroup_cpu_seconds: float | None
    cgroup_throttled_seconds: float | None
    cgroup_throttled_share: float | None
    host_cpu_share: float | None
    host_pressure_cpu_share: float | None
    host_pressure_memory_share: float | None
    host_pressure_io_share: float | None


def between(old: Sample, new: Sample, since: str) -> Interval | None:
    """What was used from *old* to *new*; None unless both are of one process of one boot."""
    before, now = old.process, new.process
    if before is None or now is None or old.host.boot_id is None or now.start_ticks is None:
        return None
    if (before.pid, before.start_ticks, old.host.boot_id) != (
        now.pid, now.start_ticks, new.host.boot_id,
    ):  # fmt: skip
        return None
    seconds = _grown(old.host, new.host, "uptime_seconds")
    if not seconds:
        return None
    per = _Rates(seconds)
    cpu = _cpu(before, now)
    own = (old.cgroup.figures if old.cgroup else None, new.cgroup.figures if new.cgroup else None)
    throttled = _grown(*own, "cpu_throttled_seconds")
    read, written = _counted(before, now, "read_bytes"), _counted(before, now, "write_bytes")
    first, last = old.threads, new.threads
    return Interval(
        since=since,
        seconds=seconds,
        cpu_seconds=cpu,
        cpu_share=per.second(cpu),
        vcpu_share=per.second(_cpu_of("vcpu", first, last)),
        iothread_share=per.second(_cpu_of("iothread", first, last)),
        main_share=per.second(_cpu_of("main", first, last)),
        worker_share=per.second(_cpu_of("worker", first, last)),
        vcpu_shares=per.threads(first.vcpus if first else [], last.vcpus if last else []),
        iothread_shares=per.threads(
            first.iothreads if first else [], last.iothreads if last else []
        ),
        vcpu_run_delay_share=per.second(
            _grown(first and first.vcpu, last and last.vcpu, "run_delay_seconds")
        ),
        read_bytes=read,
        write_bytes=written,
        read_bytes_per_second=per.second(read),
        write_bytes_per_second=per.second(written),
        voluntary_switch_count=_counted(before, now, "voluntary_switch_count"),
        involuntary_switch_count=_counted(before, now, "involuntary_switch_count"),
        disks=per.disks(old, new),
        interfaces=per.interfaces(old, new),
        cgroup_cpu_seconds=_grown(*own, "cpu_seconds"),
        cgroup_throttled_seconds=throttled,
        cgroup_throttled_share=per.second(throttled),
        host_cpu_share=per.second(
            _added(
                _grown(old.host, new.host, name)
                for name in ("cpu_user_seconds", "cpu_system_seconds")
            )
        ),
        host_pressure_cpu_share=per.second(_stalled(old.host.pressure_cpu, new.host.pressure_cpu)),
        host_pressure_memory_share=per.second(
            _stalled(old.host.pressure_memory, new.host.pressure_memory)
        ),
        host_pressure_io_share=per.second(_stalled(old.host.pressure_io, new.host.pressure_io)),
    )


class _Rates:
    """Figures over so many *seconds*."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def second(self, grown: float | None) -> float | None:
        return None if grown is None else grown / self._seconds

    def threads(self, old: list[ThreadUsage], new: list[ThreadUsage]) -> dict[str, float]:
        before = {(one.name, one.thread_id): one for one in old}
        pairs = [(before.get((one.name, one.thread_id)), one) for one in new]
        shares = {now.name: self.second(_cpu(then, now)) for then, now in pairs}
        return {name: share for name, share in shares.items() if share is not None}

    def disks(self, old: Sample, new: Sample) -> list[DiskInterval] | None:
        if not (old.guest and new.guest) or old.guest.disks is None or new.guest.disks is None:
            return None
        before = {one.qdev: one for one in old.guest.disks}
        return [self._disk(before[one.qdev], one) for one in new.guest.disks if one.qdev in before]

    def _disk(self, old: DiskUsage, new: DiskUsage) -> DiskInterval:
        read, written = _counted(old, new, "read_bytes"), _counted(old, new, "write_bytes")
        reads, writes = _counted(old, new, "read_count"), _counted(old, new, "write_count")
        flushes = _counted(old, new, "flush_count")
        return DiskInterval(
            disk=new.disk,
            read_bytes=read,
            write_bytes=written,
            read_count=reads,
            write_count=writes,
            flush_count=flushes,
            read_bytes_per_second=self.second(read),
            write_bytes_per_second=self.second(written),
            read_count_per_second=self.second(reads),
            write_count_per_second=self.second(writes),
            read_latency_seconds=_mean(_grown(old, new, "read_seconds"), reads),
            write_latency_seconds=_mean(_grown(old, new, "write_seconds"), writes),
            flush_latency_seconds=_mean(_grown(old, new, "flush_seconds"), flushes),
        )

    def interfaces(self, old: Sample, new: Sample) -> list[InterfaceInterval] | None:
        if old.interfaces is None or new.interfaces is None:
            return None
        before = {one.name: one for one in old.interfaces}
        pairs = [(before[one.name], one) for one in new.interfaces if one.name in before]
        return [self._interface(then, now) for then, now in pairs]

    def _interface(self, old: InterfaceUsage, new: InterfaceUsage) -> InterfaceInterval:
        sent, received = _counted(old, new, "sent_bytes"), _counted(old, new, "received_bytes")
        return InterfaceInterval(
            name=new.name,
            sent_bytes=sent,
            received_bytes=received,
            sent_bytes_per_second=self.second(sent),
            received_bytes_per_second=self.second(received),
        )


def _grown(old: msgspec.Struct | None, new: msgspec.Struct | None, name: str) -> float | None:
    """By how much the counter *name* has grown; None if one of the two lacks it, or it fell."""
    before, now = getattr(old, name, None), getattr(new, name, None)
    return now - before if before is not None and now is not None and now >= before else None


def _counted(old: msgspec.Struct | None, new: msgspec.Struct | None, name: str) -> int | None:
    grown = _grown(old, new, name)
    return None if grown is None else int(grown)


def _cpu(old: msgspec.Struct | None, new: msgspec.Struct | None) -> float | None:
    """The CPU time of a process, a thread or a class of threads."""
    return _added(_grown(old, new, name) for name in ("cpu_user_seconds", "cpu_system_seconds"))


def _cpu_of(kind: str, first: Threads | None, last: Threads | None) -> float | None:
    return _cpu(getattr(first, kind, None), getattr(last, kind, None))


def _added(parts: Iterable[float | None]) -> float | None:
    known = list(parts)
    return sum(part for part in known if part is not None) if None not in known else None


def _stalled(old: Pressure | None, new: Pressure | None) -> float | None:
    return _grown(old.some if old else None, new.some if new else None, "total_seconds")


def _mean(seconds: float | None, count: int | None) -> float | None:
    return seconds / count if seconds is not None and count else None
