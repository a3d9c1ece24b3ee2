"""What the control groups of a running VM leave for a snapshot of it: limits, and room below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from qmpsnap.engine.survey import Site, Survey
from qmpsnap.errors import Blocked, LocalFailed
from qmpsnap.host import bounds, cgroup, headroom
from qmpsnap.host.bounds import Bound
from qmpsnap.host.headroom import Ceiling
from qmpsnap.host.limits import GroupLimits
from qmpsnap.units import in_bytes

_THREADS = 2  # that of a migration and one to spare, beside one for each disk, of the I/O pool
_BUFFERS = 16 << 20  # of a migration, and of a connection
_PAGES = 4096 * 8  # bytes of RAM that one byte of a dirty bitmap tells of
_BITMAPS = 2  # QEMU keeps one of all RAM, and the migration its own
# An overlay's table of clusters is kept in memory: up to 32 MiB, 8 bytes for 64 KiB of the disk
_CACHE, _CACHED = 32 << 20, 8192


@dataclass(frozen=True, slots=True)
class Needed:
    """What a snapshot takes of QEMU at most, beside what it has."""

    memory_bytes: int
    task_count: int


class GroupInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One group with limits, the VM's own or one above it. None: not limited.

    *enough*: whether what is left is what a snapshot takes of QEMU; *why* not, or what to expect.
    """

    folder: str
    limits: GroupLimits
    memory_left_bytes: int | None = None
    tasks_left_count: int | None = None
    enough: bool = True
    why: str = ""


class Allowance(msgspec.Struct, frozen=True, kw_only=True):
    """The groups that limit the VM, the nearest first, and what a snapshot takes at most.

    *why*: why they are not known, empty if they are.
    """

    needed_memory_bytes: int
    needed_task_count: int
    groups: list[GroupInfo]
    why: str = ""


def look(facts: Survey) -> Allowance:
    """Now. Reads files of the kernel only."""
    taken = [one for one in facts.sites if one.disk.chain and not one.disk.read_only]
    needed = Needed(_memory(taken, facts.ram_bytes), _THREADS + len(taken))
    found, why = [], "the QEMU process could not be found on this host"
    if facts.process is not None:
        try:
            folders = cgroup.folders_of(facts.process.pid)
            above, ceilings = bounds.bounds(folders), headroom.under(folders)
            cpus = None if facts.inventory.cpus is None else len(facts.inventory.cpus)
            found, why = groups(above, ceilings, needed, cpus), ""
        except LocalFailed as failed:
            why = str(failed)
    return Allowance(
        needed_memory_bytes=needed.memory_bytes,
        needed_task_count=needed.task_count,
        groups=found,
        why=why,
    )


def refuse(facts: Survey) -> None:
    """Raises Blocked where a group of the VM has too few tasks left: QEMU would end, and the guest.

    Seen on 7.2 and 11.1 with none left: `qemu_thread_create` aborts (util/qemu-thread-posix.c).
    """
    known = look(facts)
    for one in known.groups:
        left, most = one.tasks_left_count, one.limits.pids_max_count
        if left is not None and left < known.needed_task_count:
            raise Blocked(
                f"{one.folder}/pids.max: {left} of {most} tasks are left, and a snapshot makes "
                f"QEMU start up to {known.needed_task_count} threads; it ends when it cannot",
                hint="raise that limit: the guest may end at any burst of I/O",
            )


def groups(
    above: Sequence[Bound], ceilings: Sequence[Ceiling], needed: Needed, cpus: int | None
) -> list[GroupInfo]:
    """Those of *above* that limit something; *cpus* are the guest's."""
    rooms = {one.group: max(0, one.limit_bytes - one.used_bytes) for one in ceilings}
    found = []
    for one in above:
        left, tasks = rooms.get(one.folder), None
        if one.limits.pids_max_count is not None and one.pids_count is not None:
            tasks = max(0, one.limits.pids_max_count - one.pids_count)
        short = []
        if left is not None and left < needed.memory_bytes:
            told = in_bytes(needed.memory_bytes)
            short.append(f"a snapshot takes up to {told}: the group may run out of it")
        if tasks is not None and tasks < needed.task_count:
            told = f"a snapshot starts up to {needed.task_count} threads"
            short.append(f"{told}, and QEMU ends when it cannot start one: refused")
        most = one.limits.cpu_max_count
        slow = most is not None and cpus is not None and most < cpus + 1
        note = "the guest shares its CPU time with the saving of its RAM" if slow else ""
        if short or most is not None or _limited(one.limits):
            found.append(
                GroupInfo(
                    folder=one.folder,
                    limits=one.limits,
                    memory_left_bytes=left,
                    tasks_left_count=tasks,
                    enough=not short,
                    why="; ".join(short) or note,
                )
            )
    return found


def _limited(limits: GroupLimits) -> bool:
    """Whether there is more than what every group has: a weight, all CPUs and all nodes."""
    usual = msgspec.structs.replace(
        limits, cpu_weight=None, cpu_shares=None, cpus=None, memory_nodes=None
    )
    return usual != GroupLimits()


def _memory(taken: Sequence[Site], ram: int) -> int:
    """The most memory that QEMU takes beside what it has: overlays, dirty bitmaps, buffers."""
    tables = sum(min(_CACHE, one.disk.top.virtual_size // _CACHED) for one in taken)
    return _BUFFERS + tables + _BITMAPS * ram // _PAGES
