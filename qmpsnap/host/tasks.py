"""What a process and its threads have used: the only place that reads their CPU time and I/O."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from qmpsnap.errors import LocalFailed
from qmpsnap.host import kernelfile
from qmpsnap.host.kernelfile import whole

_TICK = 1 / os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


class ProcessUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a process has used since its start, or holds now; None where we may not look.

    *start_ticks* is the kernel's own moment of its start: with *pid* and the host's boot it tells
    whether this is still the same process. *cpu_share_since_start* counts CPUs: 1.5 is one and a
    half on average. CPU time includes threads that have ended. *read_bytes* and *write_bytes* went
    to and from storage, the `syscall` ones through system calls (proc(5), /proc/PID/io).
    """

    pid: int
    start_ticks: int | None = None
    cpu_user_seconds: float | None = None
    cpu_system_seconds: float | None = None
    cpu_share_since_start: float | None = None
    read_bytes: int | None = None
    write_bytes: int | None = None
    cancelled_write_bytes: int | None = None
    syscall_read_bytes: int | None = None
    syscall_write_bytes: int | None = None
    read_count: int | None = None
    write_count: int | None = None
    minor_fault_count: int | None = None
    major_fault_count: int | None = None
    thread_count: int | None = None
    open_fd_count: int | None = None
    voluntary_switch_count: int | None = None
    involuntary_switch_count: int | None = None
    cpu_affinity: list[int] | None = None


class ThreadUsage(msgspec.Struct, frozen=True, kw_only=True):
    """One thread. *name*: the index of a vCPU, the id of an iothread, "main".

    *run_delay_seconds*: how long it was ready to run and had no CPU. *cpu_affinity*: the CPUs that
    it may run on (sched_getaffinity(2)): its pinning.
    """

    name: str
    thread_id: int
    cpu_user_seconds: float | None = None
    cpu_system_seconds: float | None = None
    run_delay_seconds: float | None = None
    voluntary_switch_count: int | None = None
    involuntary_switch_count: int | None = None
    cpu_affinity: list[int] | None = None


class ThreadSum(msgspec.Struct, frozen=True, kw_only=True):
    """The living threads of one class, added up."""

    thread_count: int
    cpu_user_seconds: float
    cpu_system_seconds: float
    run_delay_seconds: float | None = None


class Threads(msgspec.Struct, frozen=True, kw_only=True):
    """The threads of QEMU by what they do; a thread that runs several vCPUs counts once in *vcpu*.

    *worker*: all that are no vCPU, no iothread and not the main one, such as those of the pool that
    does I/O, of VNC, of a migration.
    """

    vcpus: list[ThreadUsage]
    iothreads: list[ThreadUsage]
    main: ThreadUsage | None
    vcpu: ThreadSum
    iothread: ThreadSum
    worker: ThreadSum


def usage(pid: int, *, proc: Path = PROC) -> ProcessUsage:
    """The process as a whole. Raises LocalFailed when it is gone."""
    home = proc / str(pid)
    stat = _stat(home)
    if stat is None:
        raise LocalFailed(f"there is no process {pid} any more")
    io = kernelfile.table(home / "io", ":")
    status = [kernelfile.table(path / "status", ":") for path in _tasks(home)]
    # as the ticks of a start count, also while the host slept (proc(5): since boot)
    lived = time.clock_gettime(time.CLOCK_BOOTTIME) - stat[2] * _TICK
    return ProcessUsage(
        pid=pid,
        start_ticks=stat[2],
        cpu_user_seconds=stat[0] * _TICK,
        cpu_system_seconds=stat[1] * _TICK,
        cpu_share_since_start=(stat[0] + stat[1]) * _TICK / lived if lived > 0 else None,
        read_bytes=whole(io.get("read_bytes")),
        write_bytes=whole(io.get("write_bytes")),
        cancelled_write_bytes=whole(io.get("cancelled_write_bytes")),
        syscall_read_bytes=whole(io.get("rchar")),
        syscall_write_bytes=whole(io.get("wchar")),
        read_count=whole(io.get("syscr")),
        write_count=whole(io.get("syscw")),
        minor_fault_count=stat[3],
        major_fault_count=stat[4],
        thread_count=len(status) or None,
        open_fd_count=_open_fds(home),
        # the process' own status file tells those of its main thread alone
        voluntary_switch_count=_summed(status, "voluntary_ctxt_switches"),
        involuntary_switch_count=_summed(status, "nonvoluntary_ctxt_switches"),
        cpu_affinity=affinity(pid),
    )


def threads(
    pid: int,
    vcpus: Sequence[tuple[str, int]],
    iothreads: Sequence[tuple[str, int]],
    *,
    proc: Path = PROC,
) -> Threads:
    """The threads of *pid*; *vcpus* and *iothreads* are named with their thread ids.

    A thread that has ended meanwhile is left out. Raises LocalFailed when the process is gone.
    """
    home = proc / str(pid) / "task"
    ids = {int(path.name) for path in _tasks(home.parent)}
    if not ids:
        raise LocalFailed(f"there is no process {pid} any more")
    of_vcpus = {thread for _, thread in vcpus} & ids
    of_iothreads = {thread for _, thread in iothreads} & ids - of_vcpus
    seen = {one: _thread("", one, home / str(one)) for one in ids}
    return Threads(
        vcpus=_named(vcpus, seen),
        iothreads=_named(iothreads, seen),
        main=next(iter(_named([("main", pid)], seen)), None),
        vcpu=_sum(seen[one] for one in of_vcpus),
        iothread=_sum(seen[one] for one in of_iothreads),
        worker=_sum(seen[one] for one in ids - of_vcpus - of_iothreads - {pid}),
    )


def _named(
    names: Sequence[tuple[str, int]], seen: Mapping[int, ThreadUsage | None]
) -> list[ThreadUsage]:
    there = [(name, seen.get(thread)) for name, thread in names]
    return [
        msgspec.structs.replace(one, name=name, cpu_affinity=affinity(one.thread_id))
        for name, one in there
        if one is not None
    ]


def _thread(name: str, thread: int, home: Path) -> ThreadUsage | None:
    stat, delay = _stat(home), (kernelfile.text(home / "schedstat") or "").split()
    status = [kernelfile.table(home / "status", ":")]
    if stat is None:
        return None
    nanoseconds = whole(delay[1]) if len(delay) > 1 else None
    return ThreadUsage(
        name=name,
        thread_id=thread,
        cpu_user_seconds=stat[0] * _TICK,
        cpu_system_seconds=stat[1] * _TICK,
        run_delay_seconds=None if nanoseconds is None else nanoseconds / 1e9,
        voluntary_switch_count=_summed(status, "voluntary_ctxt_switches"),
        involuntary_switch_count=_summed(status, "nonvoluntary_ctxt_switches"),
    )


def _sum(threads: Iterable[ThreadUsage | None]) -> ThreadSum:
    living = [one for one in threads if one is not None]
    delays = [one.run_delay_seconds for one in living]
    known = [delay for delay in delays if delay is not None]
    return ThreadSum(
        thread_count=len(living),
        cpu_user_seconds=sum(one.cpu_user_seconds or 0 for one in living),
        cpu_system_seconds=sum(one.cpu_system_seconds or 0 for one in living),
        run_delay_seconds=sum(known) if len(known) == len(living) else None,
    )


def _stat(home: Path) -> tuple[int, int, int, int, int] | None:
    """User ticks, system ticks, the tick of the start, minor and major faults."""
    text = kernelfile.text(home / "stat")
    if text is None:
        return None
    # the name, in brackets, may hold anything; what is behind it starts with field 3 of proc(5)
    fields = text.rpartition(")")[2].split()
    try:
        user, system, start, minor, major = (int(fields[at - 3]) for at in (14, 15, 22, 10, 12))
    except (LookupError, ValueError):
        return None
    return user, system, start, minor, major


def _tasks(home: Path) -> list[Path]:
    try:
        return list((home / "task").iterdir())
    except OSError:
        return []


def _open_fds(home: Path) -> int | None:
    try:
        return sum(1 for _ in (home / "fd").iterdir())
    except OSError:
        return None


def _summed(tables: Iterable[dict[str, str]], name: str) -> int | None:
    found = [count for one in tables if (count := whole(one.get(name))) is not None]
    return sum(found) if found else None


def affinity(thread: int) -> list[int] | None:
    """The CPUs that *thread* may run on (sched_getaffinity(2)); None when it is gone."""
    try:
        return sorted(os.sched_getaffinity(thread))
    except OSError:
        return None
