"""The control group that a restored machine would run in: its limits against what the VM used."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qmpsnap.engine import captured, limiting
from qmpsnap.engine.configuration import Configuration
from qmpsnap.engine.limiting import Case, Choice, Limit
from qmpsnap.engine.measured import Measured, measured
from qmpsnap.engine.roots import host_id
from qmpsnap.engine.usage import Usage
from qmpsnap.engine.verdict import Row, row
from qmpsnap.host import blockdevice, headroom, site
from qmpsnap.host.bounds import Bound
from qmpsnap.host.headroom import Ceiling
from qmpsnap.host.limits import GroupLimits
from qmpsnap.host.site import Site

_NEW = "the new group"
_LEAST = 4  # threads of any QEMU: the main one, RCU, a worker, the signals of TCG


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to decide for. *usages*: of this snapshot, last, and for `suggest` of earlier ones."""

    choice: Choice
    parent: str | None
    to: Path
    usages: Sequence[Usage]
    machine: Configuration
    host: str


@dataclass(frozen=True, slots=True)
class Confined:
    """Where it would run. *limits* is the table of what is set, *site* None without a new group.

    *bounds* and *ceilings*: the limits that it would meet, those of the new group first.
    """

    measured: Measured
    limits: list[Limit]
    site: Site | None
    bounds: list[Bound] = field(default_factory=list)
    ceilings: tuple[Ceiling, ...] = ()


async def look(wanted: Wanted) -> Confined:
    """Now, on this host; nothing is changed.

    Raises Blocked for limits that are not known or mean nothing here, LocalFailed.
    """
    return await asyncio.to_thread(_looked, wanted)


def _looked(wanted: Wanted) -> Confined:
    most = measured(wanted.usages)
    own = site.site(GroupLimits(), wanted.parent if wanted.choice is not Choice.NONE else None)
    if wanted.choice is Choice.NONE:
        return Confined(most, [], None, [*own.above], headroom.under(own.folders))
    case = _case(wanted, most)
    table = limiting.decided(wanted.choice, case)
    limits = limiting.limits_of(table)
    place = site.site(limits, wanted.parent)
    if wanted.choice is Choice.SUGGEST:
        table = limiting.decided(wanted.choice, case, place.above)
        limits = limiting.limits_of(table)
        place = site.site(limits, wanted.parent)
    above = headroom.under(place.folders)
    if not place.settings and not place.troubles:
        return Confined(most, table, None, [*own.above], headroom.under(own.folders))
    if limits.memory_max_bytes is not None:
        above = (Ceiling(_NEW, limits.memory_max_bytes, 0, _swap(limits)), *above)
    return Confined(most, table, place, [Bound(_NEW, limits, 0), *place.above], above)


def _case(wanted: Wanted, most: Measured) -> Case:
    inventory, now = wanted.machine.inventory, wanted.usages[-1].before if wanted.usages else None
    groups = now.cgroup if now else None
    held = captured.held(groups, now.host.cpu_count) if now and groups else None
    devices = {name.split(".")[1] for name in held or () if name.startswith("io_max.")}
    memory = inventory.memory
    return Case(
        held=held,
        measured=most,
        ram_bytes=memory.base_memory + (memory.plugged_memory or 0) if memory else None,
        vcpu_count=None if inventory.cpus is None else len(inventory.cpus),
        iothread_count=len(inventory.iothreads or []),
        same_host=wanted.host == host_id(),
        device=blockdevice.under(wanted.to),
        devices={one for one in devices if blockdevice.exists(one)},
    )


def _swap(limits: GroupLimits) -> int | None:
    both = limits.memory_and_swap_max_bytes
    if both is not None and limits.memory_max_bytes is not None:
        return max(0, both - limits.memory_max_bytes)
    return limits.swap_max_bytes


def rows(confined: Confined, machine: Configuration, cpu_count: int) -> Iterator[Row]:
    """What the groups allow, against what the VM used; memory is not among them.

    *cpu_count*: the CPUs of this host, which the groups may have fewer of.
    """
    if (place := confined.site) is not None:
        yield row("control group", None, f"in {place.told}", blocks="; ".join(place.troubles))
    inventory = machine.inventory
    several = None if inventory.cpus is None else len(inventory.cpus)
    start = _LEAST + (several or 1) + len(inventory.iothreads or [])
    for one in confined.bounds:
        yield from _time(one, confined.measured)
        yield from _pids(one, confined.measured, start)
    # a group has no CPU that those above it lack
    nearest = next((one for one in confined.bounds if one.limits.cpus is not None), None)
    if nearest is not None and len(nearest.limits.cpus or []) < cpu_count:
        yield _cpus(nearest, confined.measured, several)


def _time(bound: Bound, most: Measured) -> Iterator[Row]:
    limit, used = bound.limits.cpu_max_count, most.cpu_share
    if limit is not None:
        was = None if used is None else f"{used:.2f} used"
        why = "less than the VM used: it will be slower" if used and used > limit else ""
        yield row(f"CPU limit of {bound.folder}", was, f"{limit:g} CPUs", differs=why)


def _cpus(bound: Bound, most: Measured, several: int | None) -> Row:
    cpus, used = bound.limits.cpus or [], most.cpu_share
    why = "fewer than the guest has: it will be slower" if (several or 0) > len(cpus) else ""
    if used and used > len(cpus):
        why = "fewer than the VM used: it will be slower"
    told = None if several is None else f"{several} vCPUs"
    here = ",".join(map(str, cpus))
    return row(f"cpuset of {bound.folder}", told, f"{len(cpus)} CPUs: {here}", differs=why)


def _pids(bound: Bound, most: Measured, start: int) -> Iterator[Row]:
    limit, threads = bound.limits.pids_max_count, most.thread_count
    if limit is None:
        return
    left = max(0, limit - (bound.pids_count or 0))
    what, here = f"task limit of {bound.folder}", f"{left} left of {limit}"
    was = None if threads is None else f"{threads} threads"
    # QEMU ends when it cannot start a thread
    if left < start:
        yield row(what, was, here, blocks=f"QEMU has {start} threads at the least")
        return
    why = "fewer than the VM had: QEMU ends when it cannot start one"
    yield row(what, was, here, differs=why if (threads or 0) > left else "")
