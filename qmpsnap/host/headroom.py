"""What this host has left for one more machine: the only place that adds it up."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.host import cgroup, kernelfile, load
from qmpsnap.host.limits import Folders, number

_NET_ADMIN = 12  # capability.h
_SYS = Path("/sys")


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A control group of ours, or one above it, whose memory is limited; all in bytes.

    *used_bytes* is without the page cache, which gives way. *swap_bytes*: what its limit of swap
    leaves, None without such a limit.
    """

    group: str
    limit_bytes: int
    used_bytes: int
    swap_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Headroom:
    """Bytes of memory and swap of the whole host, and the ceilings that hold below that.

    *memory_free_bytes* is what the kernel calls available: page cache that can go is free.
    """

    memory_total_bytes: int
    memory_free_bytes: int
    swap_free_bytes: int
    cpu_count: int
    ceilings: tuple[Ceiling, ...]


def look() -> Headroom:
    """Now, for a process that we start. Raises LocalFailed."""
    host = load.usage()
    return Headroom(
        memory_total_bytes=host.memory_total_bytes,
        memory_free_bytes=host.memory_available_bytes,
        swap_free_bytes=host.swap_free_bytes,
        cpu_count=host.cpu_count,
        ceilings=ceilings(os.getpid()),
    )


def ceilings(pid: int, *, proc: Path = Path("/proc")) -> tuple[Ceiling, ...]:
    """The memory limits over process *pid*, v1 or v2, its own group's first. Raises LocalFailed."""
    return under(cgroup.folders_of(pid, proc=proc))


def under(folders: Folders) -> tuple[Ceiling, ...]:
    """The memory limits of the groups in *folders* and of those above, as `ceilings`."""
    own = folders.get("memory", folders.get(""))
    read = _first if "memory" in folders else _second
    above = [] if own is None else [own, *own.parents]
    found = (read(folder) for folder in above if (folder / "cgroup.procs").exists())
    return tuple(one for one in found if one is not None)


def interfaces(sys: Path = _SYS) -> frozenset[str]:
    """The network interfaces of this host, bridges among them."""
    try:
        return frozenset(one.name for one in (sys / "class/net").iterdir())
    except OSError:
        return frozenset()


def node_trouble(path: Path) -> str:
    """Why the device *path* cannot be opened for reading and writing; "" if it can."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"there is no {path}"
    except OSError as failed:
        return f"{path}: {failed.strerror}"
    return ""


def tap_trouble() -> str:
    """Why we cannot make a tap interface; "" if we can."""
    if trouble := node_trouble(Path("/dev/net/tun")):
        return trouble
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and not int(line.split()[1], 16) >> _NET_ADMIN & 1:
            return "making a tap interface takes CAP_NET_ADMIN"
    return ""


def _second(folder: Path) -> Ceiling | None:
    own = {"": folder}
    limit, used = number(own, "", "memory.max"), number(own, "", "memory.current")
    if limit is None or used is None:
        return None
    swap, swapped = number(own, "", "memory.swap.max"), number(own, "", "memory.swap.current")
    left = None if swap is None else max(0, swap - (swapped or 0))
    return Ceiling(str(folder), limit, max(0, used - _cache(folder, "")), left)


def _first(folder: Path) -> Ceiling | None:
    own = {"memory": folder}
    limit = number(own, "memory", "memory.limit_in_bytes")
    used = number(own, "memory", "memory.usage_in_bytes")
    if limit is None or used is None:
        return None
    return Ceiling(str(folder), limit, max(0, used - _cache(folder, "total_")))


def _cache(folder: Path, prefix: str) -> int:
    figures = kernelfile.numbers(folder / "memory.stat")
    return sum(figures.get(f"{prefix}{kind}", 0) for kind in ("inactive_file", "active_file"))
