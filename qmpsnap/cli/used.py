"""What `show --usage` prints of one snapshot: its samples and intervals as readable tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpsnap.cli import grouped, units
from qmpsnap.cli.units import ABSENT, cpus, duration, per_second, percent

if TYPE_CHECKING:
    from qmpsnap.cli.render import Output
    from qmpsnap.engine.history import Record
    from qmpsnap.engine.interval import Interval
    from qmpsnap.engine.sample import Sample
    from qmpsnap.engine.usage import Usage
    from qmpsnap.host.load import Pressure


def show(out: Output, record: Record) -> None:
    """Print *record*, whose usage is known."""
    from qmpsnap.cli.render import in_bytes

    used = record.usage
    assert used is not None
    now, over = used.before, used.since_last
    since = f"{duration(over.seconds)} since {over.since or 'the snapshot before'}" if over else (
        "not known: no snapshot of this process before")  # fmt: skip
    store = used.store_root
    out.facts([
        ("snapshot", f"{record.id} of {record.vm}, {record.state}"),
        ("sampled", now.sampled_at + (f", and {used.after.sampled_at}" if used.after else "")),
        ("interval", since),
        *_of_process(now, over),
        *grouped.facts(now),
        *_of_host(now, over),
        ("local root", f"{in_bytes(now.local_root.free_bytes)} free of "
                       f"{in_bytes(now.local_root.total_bytes)}"),
        ("store root", f"{in_bytes(store.free_bytes)} free of {in_bytes(store.total_bytes)}"
                       if store else None),
    ])  # fmt: skip
    _threads(out, now, over)
    _disks(out, now, over)
    _taps(out, now, over)
    grouped.limits(out, now)
    _instant(out, used)


def _of_process(now: Sample, over: Interval | None) -> list[tuple[str, object]]:
    from qmpsnap.cli.render import in_bytes

    process, memory, guest = now.process, now.memory, now.guest
    told: list[tuple[str, object]] = []
    if process is not None:
        used = (process.cpu_user_seconds or 0) + (process.cpu_system_seconds or 0)
        recent = f", {cpus(over.cpu_share)} in the interval" if over else ""
        told += [
            ("CPUs", f"{cpus(process.cpu_share_since_start)} since its start{recent}; "
                     f"{duration(used)} of CPU time"),
            ("storage", f"read {in_bytes(process.read_bytes)}, "
                        f"written {in_bytes(process.write_bytes)}"),
            ("process", f"{process.pid}: {units.count(process.thread_count)} threads, "
                        f"{units.count(process.open_fd_count)} open files, context switches "
                        f"{units.count(process.voluntary_switch_count)} voluntary, "
                        f"{units.count(process.involuntary_switch_count)} not"),
        ]  # fmt: skip
    if memory is not None:
        spread = ", ".join(
            f"node {node}: {in_bytes(size)}" for node, size in (memory.node_bytes or {}).items()
        )
        told += [
            ("memory", f"RSS {in_bytes(memory.rss_bytes)} (at most "
                       f"{in_bytes(memory.rss_peak_bytes)}), PSS {in_bytes(memory.pss_bytes)}, "
                       f"swap {in_bytes(memory.swap_bytes)}"),
            ("huge pages", f"transparent {in_bytes(memory.transparent_huge_bytes)}, "
                           f"hugetlbfs {in_bytes(memory.hugetlb_bytes)}"),
            ("NUMA", spread or None),
        ]  # fmt: skip
    if guest is not None:
        rate, balloon = guest.dirty_rate, guest.balloon_bytes
        told += [
            ("balloon", f"leaves {in_bytes(balloon)}" if balloon is not None else None),
            ("dirty rate", f"{per_second(rate.bytes_per_second)}, measured "
                           f"{duration(rate.age_seconds)} before" if rate else None),
        ]  # fmt: skip
    return told


def _of_host(now: Sample, over: Interval | None) -> list[tuple[str, object]]:
    from qmpsnap.cli.render import in_bytes

    host = now.host
    busy = f", {cpus(over.host_cpu_share)} of them busy in the interval" if over else ""
    stalls = {"CPU": host.pressure_cpu, "memory": host.pressure_memory, "I/O": host.pressure_io}
    told = ", ".join(f"{word} {_stall(one)}" for word, one in stalls.items() if one)
    return [
        ("host", f"{host.cpu_count} CPUs{busy}; load {host.load_1_minute:.2f} "
                 f"{host.load_5_minutes:.2f} {host.load_15_minutes:.2f}"),
        ("host memory", f"{in_bytes(host.memory_available_bytes)} available of "
                        f"{in_bytes(host.memory_total_bytes)}; swap "
                        f"{in_bytes(host.swap_free_bytes)} free of "
                        f"{in_bytes(host.swap_total_bytes)}"),
        ("pressure", f"{told} of the last 60 s" if told else None),
    ]  # fmt: skip


def _stall(one: Pressure) -> str:
    return f"{one.some.average_60_seconds_percent:.1f} %" if one.some else ABSENT


def _threads(out: Output, now: Sample, over: Interval | None) -> None:
    found = now.threads
    if found is None:
        return
    rows = [
        [f"vCPU {one.name}", "1", duration(_cpu(one.cpu_user_seconds, one.cpu_system_seconds)),
         cpus(over.vcpu_shares.get(one.name) if over else None), duration(one.run_delay_seconds),
         units.numbers(one.cpu_affinity)]
        for one in found.vcpus
    ]  # fmt: skip
    rows += [
        [f"iothread {one.name}", "1", duration(_cpu(one.cpu_user_seconds, one.cpu_system_seconds)),
         cpus(over.iothread_shares.get(one.name) if over else None),
         duration(one.run_delay_seconds), units.numbers(one.cpu_affinity)]
        for one in found.iothreads
    ]  # fmt: skip
    for name, several, share in (
        ("all vCPUs", found.vcpu, over.vcpu_share if over else None),
        ("all iothreads", found.iothread, over.iothread_share if over else None),
        ("workers", found.worker, over.worker_share if over else None),
    ):
        taken = duration(_cpu(several.cpu_user_seconds, several.cpu_system_seconds))
        rows.append([name, str(several.thread_count), taken, cpus(share),
                     duration(several.run_delay_seconds), ""])  # fmt: skip
    if (main := found.main) is not None:
        taken = duration(_cpu(main.cpu_user_seconds, main.cpu_system_seconds))
        recent = cpus(over.main_share if over else None)
        waited, pinned = duration(main.run_delay_seconds), units.numbers(main.cpu_affinity)
        rows.append(["main", "1", taken, recent, waited, pinned])
    out.line()
    out.table(("THREADS", "COUNT", "CPU TIME", "CPUS", "WAITED FOR CPU", "MAY RUN ON"), rows)


def _cpu(user: float | None, system: float | None) -> float | None:
    return None if user is None or system is None else user + system


def _disks(out: Output, now: Sample, over: Interval | None) -> None:
    from qmpsnap.cli.render import in_bytes

    if now.guest is None or not now.guest.disks:
        return
    recent = {one.disk: one for one in (over.disks or [] if over else [])}
    rows = []
    for disk in now.guest.disks:
        one = recent.get(disk.disk)
        latencies = (
            (one.read_latency_seconds, one.write_latency_seconds, one.flush_latency_seconds)
            if one else ()
        )  # fmt: skip
        rows.append([
            disk.disk, in_bytes(disk.read_bytes), in_bytes(disk.write_bytes),
            str(disk.read_count), str(disk.write_count), str(disk.flush_count),
            per_second(one.read_bytes_per_second if one else None),
            per_second(one.write_bytes_per_second if one else None),
            " / ".join(map(duration, latencies)) or ABSENT,
        ])  # fmt: skip
    out.line()
    out.table(("DISK", "READ", "WRITTEN", "READS", "WRITES", "FLUSHES", "READ RATE", "WRITE RATE",
               "LATENCY R / W / F"), rows)  # fmt: skip


def _taps(out: Output, now: Sample, over: Interval | None) -> None:
    from qmpsnap.cli.render import in_bytes

    if not now.interfaces:
        return
    recent = {one.name: one for one in (over.interfaces or [] if over else [])}
    rows = []
    for tap in now.interfaces:
        one = recent.get(tap.name)
        rows.append([
            tap.name, tap.bridge or ABSENT, in_bytes(tap.sent_bytes), in_bytes(tap.received_bytes),
            f"{tap.sent_dropped_count} / {tap.received_dropped_count}",
            per_second(one.sent_bytes_per_second if one else None),
            per_second(one.received_bytes_per_second if one else None),
        ])  # fmt: skip
    out.line()
    out.table(("TAP", "BRIDGE", "GUEST SENT", "RECEIVED", "DROPPED", "SEND RATE", "RECEIVE RATE"),
              rows)  # fmt: skip


def _instant(out: Output, used: Usage) -> None:
    over = used.around
    if over is None:
        return
    out.line()
    out.line(
        f"The point in time took {duration(over.seconds)} from sample to sample: "
        f"{duration(over.cpu_seconds)} of QEMU's CPU time, {units.size(over.write_bytes)} "
        f"written; the host's tasks waited {percent(over.host_pressure_io_share)} of it for I/O."
    )
