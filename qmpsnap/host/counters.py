"""What a control group has used: the only place that reads its counters, of v1 and of v2."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from qmpsnap.host import kernelfile, load
from qmpsnap.host.limits import Folders, either, number, pairs

_TICK = 1 / os.sysconf("SC_CLK_TCK")


class IoFigures(msgspec.Struct, frozen=True, kw_only=True):
    read_bytes: int
    write_bytes: int
    read_count: int
    write_count: int


class GroupFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What the group has used since it was made; None: no such controller, or not told.

    *cpu_period_count* counts the periods of its CPU quota in which it ran, *cpu_throttled_count*
    those at whose end it had to wait. The events are how often the group met the limit in their
    name; *memory_node_bytes* is by NUMA node.
    """

    cpu_seconds: float | None = None
    cpu_user_seconds: float | None = None
    cpu_system_seconds: float | None = None
    cpu_period_count: int | None = None
    cpu_throttled_count: int | None = None
    cpu_throttled_seconds: float | None = None
    memory_bytes: int | None = None
    memory_peak_bytes: int | None = None
    memory_node_bytes: dict[str, int] | None = None
    swap_bytes: int | None = None
    memory_high_event_count: int | None = None
    memory_max_event_count: int | None = None
    oom_kill_count: int | None = None
    io: dict[str, IoFigures] | None = None
    pids_count: int | None = None
    pressure_cpu: load.Pressure | None = None
    pressure_memory: load.Pressure | None = None
    pressure_io: load.Pressure | None = None


def figures(folders: Folders) -> GroupFigures:
    """What the group has used."""
    second, memory = folders.get(""), folders.get("memory")
    cpu = kernelfile.numbers(second / "cpu.stat") if second else {}
    events = kernelfile.numbers(second / "memory.events") if second else {}
    oom = kernelfile.numbers(memory / "memory.oom_control") if memory else {}
    throttled = kernelfile.numbers(folders["cpu"] / "cpu.stat") if "cpu" in folders else cpu
    waited = _scaled(throttled.get("throttled_time"), 1e-9)
    used, user, system = _cpu_times(folders, cpu)
    highest = number(folders, "memory", "memory.max_usage_in_bytes")
    missed = number(folders, "memory", "memory.failcnt")
    return GroupFigures(
        cpu_seconds=used,
        cpu_user_seconds=user,
        cpu_system_seconds=system,
        cpu_period_count=throttled.get("nr_periods"),
        cpu_throttled_count=throttled.get("nr_throttled"),
        cpu_throttled_seconds=_scaled(throttled.get("throttled_usec"), 1e-6)
        if waited is None
        else waited,
        memory_bytes=either(folders, "memory", "memory.usage_in_bytes", "memory.current"),
        memory_peak_bytes=number(folders, "", "memory.peak") if highest is None else highest,
        memory_node_bytes=_nodes(folders),
        swap_bytes=_swap(folders),
        memory_high_event_count=events.get("high"),
        memory_max_event_count=events.get("max") if missed is None else missed,
        oom_kill_count=oom.get("oom_kill", events.get("oom_kill")),
        io=_io(folders),
        pids_count=either(folders, "pids", "pids.current", "pids.current"),
        pressure_cpu=load.pressure(second / "cpu.pressure") if second else None,
        pressure_memory=load.pressure(second / "memory.pressure") if second else None,
        pressure_io=load.pressure(second / "io.pressure") if second else None,
    )


def _scaled(count: int | None, factor: float) -> float | None:
    return None if count is None else count * factor


def _cpu_times(
    folders: Folders, stat: Mapping[str, int]
) -> tuple[float | None, float | None, float | None]:
    if "cpuacct" not in folders:
        user, system = stat.get("user_usec"), stat.get("system_usec")
        return _scaled(stat.get("usage_usec"), 1e-6), _scaled(user, 1e-6), _scaled(system, 1e-6)
    ticks = kernelfile.numbers(folders["cpuacct"] / "cpuacct.stat")
    user, system = ticks.get("user"), ticks.get("system")
    nanoseconds = number(folders, "cpuacct", "cpuacct.usage")
    return _scaled(nanoseconds, 1e-9), _scaled(user, _TICK), _scaled(system, _TICK)


def _swap(folders: Folders) -> int | None:
    if "memory" not in folders:
        return number(folders, "", "memory.swap.current")
    stat = kernelfile.numbers(folders["memory"] / "memory.stat")
    return stat.get("swap")


def _nodes(folders: Folders) -> dict[str, int] | None:
    """v1: `total=9 N0=9`, in pages; v2: a line a kind, `anon N0=36864`, in bytes."""
    name = "memory" if "memory" in folders else ""
    if name not in folders:
        return None
    rows = (kernelfile.text(folders[name] / "memory.numa_stat") or "").splitlines()
    wanted = ("total=",) if name else ("anon ", "file ", "kernel_stack ", "pagetables ")
    size = os.sysconf("SC_PAGE_SIZE") if name else 1
    found: dict[str, int] = {}
    for row in rows:
        for node, count in re.findall(r" N(\d+)=(\d+)", row) if row.startswith(wanted) else []:
            found[node] = found.get(node, 0) + (kernelfile.whole(count) or 0) * size
    return found or None


def _io(folders: Folders) -> dict[str, IoFigures] | None:
    if "blkio" not in folders:
        path = folders[""] / "io.stat" if "" in folders else None
        if path is None or kernelfile.text(path) is None:
            return None
        rows = {device: pairs(row) for device, row in kernelfile.table(path).items()}
        return {
            device: IoFigures(
                read_bytes=words.get("rbytes", 0),
                write_bytes=words.get("wbytes", 0),
                read_count=words.get("rios", 0),
                write_count=words.get("wios", 0),
            )
            for device, words in rows.items()
        }
    size, count = (_operations(folders["blkio"], f"blkio.throttle.io_{kind}")
                   for kind in ("service_bytes", "serviced"))  # fmt: skip
    if size is None or count is None:
        return None
    return {
        device: IoFigures(
            read_bytes=words.get("Read", 0),
            write_bytes=words.get("Write", 0),
            read_count=count.get(device, {}).get("Read", 0),
            write_count=count.get(device, {}).get("Write", 0),
        )
        for device, words in size.items()
    }


def _operations(folder: Path, name: str) -> dict[str, dict[str, int]] | None:
    """`8:0 Read 4096`, a line a device and operation; with what was done in groups below."""
    text = kernelfile.text(folder / f"{name}_recursive")
    text = kernelfile.text(folder / name) if text is None else text
    if text is None:
        return None
    found: dict[str, dict[str, int]] = {}
    for row in text.splitlines():
        words = row.split()
        if len(words) == 3:  # the last line is a sum over all
            found.setdefault(words[0], {})[words[1]] = kernelfile.whole(words[2]) or 0
    return found
