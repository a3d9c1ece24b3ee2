"""Version 1 of `usage.json`, one sample of fewer figures: the only place that still knows it."""

from __future__ import annotations

import msgspec

from qmpsnap.engine.sample import Sample
from qmpsnap.host.cgroup import CgroupUsage
from qmpsnap.host.counters import GroupFigures
from qmpsnap.host.filesystem import Filesystem
from qmpsnap.host.limits import GroupLimits
from qmpsnap.host.load import HostUsage
from qmpsnap.host.memory import MemoryUsage
from qmpsnap.host.tasks import ProcessUsage


class _Process(msgspec.Struct, frozen=True, kw_only=True):
    """Its count of context switches is left out: it was that of one thread."""

    pid: int
    cpu_user_seconds: float | None
    cpu_system_seconds: float | None
    rss_bytes: int | None
    vms_bytes: int | None
    swap_bytes: int | None
    read_bytes: int | None
    write_bytes: int | None
    read_count: int | None
    write_count: int | None
    thread_count: int | None
    open_fd_count: int | None
    cpu_affinity: list[int] | None


class _Cgroup(msgspec.Struct, frozen=True, kw_only=True):
    groups: dict[str, str]
    memory_bytes: int | None
    memory_max_bytes: int | None
    cpu_seconds: float | None
    cpu_max_count: float | None
    pids_count: int | None


class _Usage(msgspec.Struct, frozen=True, kw_only=True):
    sampled_at: str
    process: _Process | None
    cgroup: _Cgroup | None
    host: HostUsage
    local_root: Filesystem


def decode(text: str | bytes) -> Sample:
    """The sample of a file of version 1. Raises msgspec.DecodeError."""
    old = msgspec.json.decode(text, type=_Usage)
    return Sample(
        sampled_at=old.sampled_at,
        process=_process(old.process) if old.process else None,
        memory=_memory(old.process) if old.process else None,
        cgroup=_cgroup(old.cgroup) if old.cgroup else None,
        host=old.host,
        local_root=old.local_root,
    )


def _process(old: _Process) -> ProcessUsage:
    return ProcessUsage(
        pid=old.pid,
        cpu_user_seconds=old.cpu_user_seconds,
        cpu_system_seconds=old.cpu_system_seconds,
        read_bytes=old.read_bytes,
        write_bytes=old.write_bytes,
        read_count=old.read_count,
        write_count=old.write_count,
        thread_count=old.thread_count,
        open_fd_count=old.open_fd_count,
        cpu_affinity=old.cpu_affinity,
    )


def _memory(old: _Process) -> MemoryUsage:
    return MemoryUsage(rss_bytes=old.rss_bytes, vms_bytes=old.vms_bytes, swap_bytes=old.swap_bytes)


def _cgroup(old: _Cgroup) -> CgroupUsage:
    return CgroupUsage(
        version=None,
        groups=old.groups,
        limits=GroupLimits(cpu_max_count=old.cpu_max_count, memory_max_bytes=old.memory_max_bytes),
        figures=GroupFigures(
            cpu_seconds=old.cpu_seconds,
            memory_bytes=old.memory_bytes,
            pids_count=old.pids_count,
        ),
        ancestors=[],
    )
