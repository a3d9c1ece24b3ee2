"""Which limits a restored machine gets, and why: decided from what was captured and measured."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from qmpsnap.engine import captured
from qmpsnap.engine.captured import Held, Value
from qmpsnap.engine.measured import Measured
from qmpsnap.errors import Blocked
from qmpsnap.host.bounds import Bound
from qmpsnap.host.limits import GroupLimits
from qmpsnap.units import in_bytes

_MIB = 1 << 20
_QEMU = 256 * _MIB  # what QEMU itself may hold beside the guest's RAM, at least
_QEMU_PART = 16  # or this part of the RAM
_POOL = 64  # threads that QEMU may start for the I/O of its main loop, and of each iothread
_SPARE = 16  # threads: those of VNC, of a migration, of device hotplug


class Choice(StrEnum):
    """`restore --limits`."""

    NONE = "none"  # it starts where we are, in no group of its own
    SAME = "same"  # what held for the captured VM
    SUGGEST = "suggest"  # what follows from what it used


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """One limit; units are in the name. *measured*: the most that the VM used of it.

    *chosen* is what is set, None: nothing. An I/O limit is `io_max.DEVICE.RATE`, one of huge pages
    `hugetlb_max_bytes.SIZE`.
    """

    limit: str
    captured: Value = None
    measured: Value = None
    suggested: Value = None
    chosen: Value = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """What a choice is made from. *held* is None where no usage.json tells of a group.

    *ram_bytes*, *vcpu_count* and *iothread_count* are the machine's. *device*: the disk that takes
    its files here; *devices*: which of the captured ones are here; *same_host*: they mean the same.
    """

    held: Mapping[str, Held] | None
    measured: Measured
    ram_bytes: int | None
    vcpu_count: int | None
    iothread_count: int
    same_host: bool
    device: str | None
    devices: Collection[str]


def decided(choice: Choice, case: Case, above: Sequence[Bound] = ()) -> list[Limit]:
    """Each limit that was captured or is suggested. Suggestions stay below the limits *above*.

    Raises Blocked when the captured limits are not known, or mean nothing on this host.
    """
    if choice is Choice.SAME and case.held is None:
        raise Blocked(
            "the limits of the captured VM are not known",
            hint="`--limits suggest` goes by what it used, `--limits none` sets none",
        )
    held = _moved(choice, case)
    suggested = dict(_suggested(case, above)) if choice is Choice.SUGGEST else {}
    found = []
    for name in dict.fromkeys([*captured.FIELDS, *held, *suggested]):
        was, most = held.get(name), _measured(name, case.measured)
        better, why = suggested.get(name, (None, ""))
        if was is None and better is None and not why:
            continue
        chosen: Value = better
        if was is not None and choice is Choice.SAME:
            chosen, why = was.value, f"of {was.of}, above its group" if was.of else "of its group"
        elif was is not None and not why:
            why = "what is measured says nothing of it"
        found.append(
            Limit(
                limit=name,
                captured=was.value if was else None,
                measured=most,
                suggested=better,
                chosen=chosen,
                why=why,
            )
        )
    return found


def limits_of(rows: Sequence[Limit]) -> GroupLimits:
    """What *rows* set."""
    return captured.as_limits({one.limit: one.chosen for one in rows if one.chosen is not None})


def _moved(choice: Choice, case: Case) -> dict[str, Held]:
    """The captured limits, those of I/O on the disks of this host."""
    held = dict(case.held or {})
    rates = [name for name in held if name.startswith("io_max.")]
    if choice is not Choice.SAME or not rates:
        return held
    devices = sorted({name.split(".")[1] for name in rates})
    if case.same_host:
        if gone := [one for one in devices if one not in case.devices]:
            raise Blocked(f"io: io.max: there is no disk {', '.join(gone)} any more")
        return held
    if len(devices) > 1:
        raise Blocked(
            f"io: io.max: it was limited on the disks {', '.join(devices)} of another host; "
            "which of them are meant here is not known"
        )
    if case.device is None:
        raise Blocked("io: io.max: the new files lie on no disk of this host")
    for name in rates:
        was = held.pop(name)
        held[f"io_max.{case.device}.{name.split('.')[2]}"] = was
    return held


def _measured(name: str, most: Measured) -> Value:
    head, _, rest = name.partition(".")
    found = {
        "cpu_max_count": most.cpu_share,
        "memory_max_bytes": most.memory_bytes,
        "memory_high_bytes": most.memory_bytes,
        "memory_soft_max_bytes": most.memory_bytes,
        "memory_and_swap_max_bytes": most.memory_bytes,
        "swap_max_bytes": most.swap_bytes,
        "pids_max_count": most.thread_count,
        "hugetlb_max_bytes": most.hugetlb_bytes,
        "read_bytes_per_second": most.read_bytes_per_second,
        "write_bytes_per_second": most.write_bytes_per_second,
    }.get(rest.rpartition(".")[2] if head == "io_max" else head)
    return round(found, 3) if isinstance(found, float) else found


def _suggested(case: Case, above: Sequence[Bound]) -> Iterator[tuple[str, tuple[Value, str]]]:
    for name, part in (
        ("cpu_max_count", _cpus),
        ("memory_max_bytes", _memory),
        ("pids_max_count", _pids),
    ):
        value, why = part(case)
        for bound in above if value is not None else ():
            most = getattr(bound.limits, name)
            if most is not None and most < value:
                value, why = most, f"no more than {bound.folder} allows; else {why}"
        yield name, (value, why)


def _cpus(case: Case) -> tuple[float | None, str]:
    used = case.measured.cpu_share
    if used is None:
        return None, "its use of CPUs is not known"
    several = max(1.0, math.ceil(used * 4) / 2)
    told = f"twice the highest mean of {_snapshots(case)}, in halves, at least 1"
    if case.vcpu_count is not None and several > case.vcpu_count + 1:
        return case.vcpu_count + 1.0, f"all {case.vcpu_count} vCPUs, and one for QEMU itself"
    return several, told


def _memory(case: Case) -> tuple[int | None, str]:
    used, ram = case.measured.memory_bytes, case.ram_bytes
    if ram is None:
        return None, "how much RAM it has is not known"
    beside = max(_QEMU, ram // _QEMU_PART, 2 * max(0, (used or 0) - ram))
    most = math.ceil((ram + beside) / _MIB) * _MIB
    told = f"all its RAM, {in_bytes(ram)}, and {in_bytes(beside)} for QEMU: less would end it"
    return most, told


def _pids(case: Case) -> tuple[int | None, str]:
    used = case.measured.thread_count
    if used is None:
        return None, "its threads were not counted"
    more = _POOL * (1 + case.iothread_count)
    told = f"{used} threads of {_snapshots(case)}, {more} that I/O may start, {_SPARE} to spare"
    return used + more + _SPARE, told


def _snapshots(case: Case) -> str:
    count = case.measured.snapshot_count
    return "1 snapshot" if count == 1 else f"{count} snapshots"
