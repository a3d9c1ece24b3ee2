"""The only place that tells which devices a machine has gained and lost since its start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.drives import slots
from qmpsnap.hypervisor.machine.inventory import DeviceFacts, Inventory
from qmpsnap.hypervisor.machine.options import Device

_ANONYMOUS = "/machine/peripheral-anon/device["


@dataclass(frozen=True, slots=True)
class Changes:
    """*plugged*: devices that came at run time. *there*: those of the command line that it still
    has, by the index of the option that made them; *gone*: the indices whose device it has not.

    A device whose unplug is asked for, and which the guest has not released, is still there.
    *unclear*: paths of devices of which it cannot be told what option made them.
    """

    plugged: tuple[DeviceFacts, ...] = ()
    there: dict[int, DeviceFacts] = field(default_factory=dict)
    gone: tuple[int, ...] = ()
    unclear: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.plugged or self.gone)


def changes(inventory: Inventory, line: CommandLine) -> Changes:
    """What *line* does not say of the machine of *inventory*; nothing if that is not known."""
    if inventory.devices is None:
        return Changes()
    cold = [one for one in inventory.devices if not one.hotplugged]
    by_id = {one.id: one for one in cold if one.id is not None}
    by_number = {_number(one): one for one in cold if one.id is None}
    anonymous = list(_anonymous(line))
    there = {index: by_number[n] for n, index in enumerate(anonymous) if n in by_number}
    gone = [index for n, index in enumerate(anonymous) if n not in by_number]
    for index, ident in _named(line):
        if ident in by_id:
            there[index] = by_id[ident]
        else:
            gone.append(index)
    strange = [one.path for n, one in by_number.items() if n >= len(anonymous)]
    return Changes(
        plugged=tuple(sorted(filter(lambda one: one.hotplugged, inventory.devices), key=_order)),
        there=there,
        gone=tuple(sorted(gone)),
        unclear=tuple(strange),
    )


def name_of(option: Option) -> str:
    """What a -device, or the device of a -drive, is called: by its id, else by its driver."""
    if option.name != "device":
        return str(option)
    view = Device.of(option)
    return view.id or view.driver or str(option)


def _named(line: CommandLine) -> Iterator[tuple[int, str]]:
    for index, option in enumerate(line.options):
        if option.name == "device" and (ident := Device.of(option).id):
            yield index, ident


def _anonymous(line: CommandLine) -> Iterator[int]:
    """The options that make devices without an id, in the order in which QEMU makes them.

    vl.c: `key=value` devices, and those that -virtfs stands for, as they are parsed; -drive with
    if=virtio once all is parsed; devices that are JSON at the end.
    """
    plain: list[int] = []
    json: list[int] = []
    for index, option in enumerate(line.options):
        if option.name == "virtfs":
            plain.append(index)
        elif option.name == "device" and not (view := Device.of(option)).id:
            (json if view.fields.json else plain).append(index)
    yield from plain
    yield from (slot.index for slot in slots(line) if slot.interface == "virtio")
    yield from json


def _number(one: DeviceFacts) -> int:
    return int(one.path.removeprefix(_ANONYMOUS).rstrip("]"))


def _order(one: DeviceFacts) -> tuple[bool, int, str]:
    return (one.id is not None, 0 if one.id is not None else _number(one), one.path)
