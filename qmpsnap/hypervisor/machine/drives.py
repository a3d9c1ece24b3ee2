"""The only place that knows which block back end QEMU makes of which -drive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qmpsnap.hypervisor.machine.cmdline import CommandLine
from qmpsnap.hypervisor.machine.options import DRIVES, Drive, Machine

# blockdev.c: if_max_devs; an interface that is not here has a single bus without end
_UNITS = {"ide": 2, "scsi": 7}


@dataclass(frozen=True, slots=True)
class Slot:
    """A -drive of a command line and what QEMU calls it.

    *index* is its place in `CommandLine.options`; *backend* the `device` of query-block, such as
    `ide0-hd0`; *key* its name among the disks of a snapshot: its id, or `drive:INDEX`; *interface*
    what its `if` says, or the machine's own.
    """

    index: int
    key: str
    backend: str
    drive: Drive
    interface: str = "none"


def slots(line: CommandLine) -> list[Slot]:
    """The drives of *line*, in order. -set must have been applied (`options.applied_sets`)."""
    return list(_slots(line))


def _slots(line: CommandLine) -> Iterator[Slot]:
    default, units = _default_interface(line)
    taken: set[tuple[str, int, int]] = set()
    for index, option in enumerate(line.options):
        if option.name not in DRIVES:
            continue
        drive = Drive.of(option)
        interface = drive.interface or default
        bus, unit = _place(drive, interface, units, taken)
        taken.add((interface, bus, unit))
        backend = drive.id or _backend(drive, interface, bus, unit, units)
        yield Slot(index, drive.id or f"drive:{index}", backend, drive, interface)


def _place(
    drive: Drive, interface: str, units: dict[str, int], taken: set[tuple[str, int, int]]
) -> tuple[int, int]:
    most = units.get(interface, 0)
    if (index := drive.fields.get("index")) is not None:
        return divmod(int(index), most) if most else (0, int(index))
    bus = int(drive.fields.get("bus") or 0)
    if (given := drive.fields.get("unit")) is not None:
        return bus, int(given)
    unit = 0
    while (interface, bus, unit) in taken:
        unit += 1
        if most and unit >= most:
            bus, unit = bus + 1, 0
    return bus, unit


def _backend(drive: Drive, interface: str, bus: int, unit: int, units: dict[str, int]) -> str:
    if interface not in units:
        return f"{interface}{unit}"
    return f"{interface}{bus}-{'cd' if drive.media == 'cdrom' else 'hd'}{unit}"


def _default_interface(line: CommandLine) -> tuple[str, dict[str, int]]:
    types = [Machine.of(option).type for option in line.all("machine", "M")]
    machine = next((name for name in reversed(types) if name), "pc")
    if "q35" in machine:
        return "ide", _UNITS | {"ide": 1}  # an AHCI port takes one disk
    if machine.startswith(("microvm", "virt")):
        return "virtio", _UNITS
    return "ide", _UNITS
