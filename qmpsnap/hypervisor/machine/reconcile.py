"""The only place that writes a command line for a machine that is no longer what its own says."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qmpsnap.hypervisor.machine import defaults, processors
from qmpsnap.hypervisor.machine.backends import BackEnds
from qmpsnap.hypervisor.machine.changes import Changes, changes, name_of
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.drives import slots
from qmpsnap.hypervisor.machine.inventory import Inventory
from qmpsnap.hypervisor.machine.options import Blockdev, Netdev, fields_of
from qmpsnap.hypervisor.machine.places import Places
from qmpsnap.hypervisor.machine.plugged import Plugged
from qmpsnap.hypervisor.machine.plugged_disks import Image
from qmpsnap.hypervisor.machine.processors import Slot
from qmpsnap.hypervisor.machine.properties import Properties
from qmpsnap.hypervisor.machine.relocation.characters import refers
from qmpsnap.hypervisor.machine.usb import Ports
from qmpsnap.hypervisor.monitor import Monitor, understood


@dataclass(frozen=True, slots=True)
class Reconciled:
    """*line* makes the machine as it is now: cold-plugged, at the same places.

    *plugged*, *unplugged*: by id, or by QOM path or driver. *troubles*: what keeps the state from
    being loaded into it, by name; *line* is then good for a boot only. *notes*: what is not quite
    as it was. *origins*: drives that the other command line calls by another name: old to new.
    """

    line: CommandLine
    plugged: tuple[str, ...] = ()
    unplugged: tuple[str, ...] = ()
    troubles: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)


@understood("what came and went")
async def reconcile(
    monitor: Monitor,
    inventory: Inventory,
    line: CommandLine,
    images: Sequence[Image],
    nodes: Collection[str],
) -> Reconciled | None:
    """None if *line* says all that the machine of *inventory* is, as far as QEMU tells.

    *images* are its disks, *nodes* the names of all block nodes. Nothing is changed by asking.
    Raises MonitorLost and its kin.
    """
    found = changes(inventory, line)
    cpus = await processors.query(monitor, inventory)
    missing = cpus.gone if cpus is not None else []
    ends = BackEnds(monitor, inventory)
    users = await ends.user_networks(line)
    if not found and not missing and not users:
        return None
    ports = Ports(monitor, inventory)
    troubles = [f"device {path}: it cannot be told what made it" for path in found.unclear]
    new = line
    if found.gone or missing:
        new, unknown = await Places(monitor, ports, fewer=bool(missing)).pinned(line, found)
        troubles += unknown
        new = await _without_what_has_gone(new, ends, nodes)
    plugged = Plugged(ends, Properties(monitor), ports, images, cpus, new)
    await plugged.add(found.plugged)
    new = plugged.line
    for ident in users:
        if ident not in {Netdev.of(option).id for option in new.all("netdev")}:
            new = new.append(await ends.netdev(ident))  # it has a state, with or without a card
    if cpus is not None:
        new = cpus.spelled(new)
    new = defaults.kept(line, new)
    return Reconciled(
        line=new,
        plugged=(*(one.id or one.path for one in found.plugged), *users),
        unplugged=(*_names(line, found), *(f"{slot.type} {_where(slot)}" for slot in missing)),
        troubles=(*troubles, *plugged.troubles),
        notes=tuple(ends.notes),
        origins=_renamed(line, new),
    )


def numbered(found: Reconciled, numbers: Collection[int]) -> Reconciled:
    """*found* with as many user networks as it takes for those of *numbers* to be among them.

    QEMU counts them as they come, and a state is for a number: where one went before another one
    came, a network that nobody uses holds its place.
    """
    spoken = [fields_of(option) for option in found.line.all("netdev", "nic", "net")]
    if not spoken:
        return found
    there = sum(fields.get("type") == "user" for fields in spoken)
    spare = [
        Option("netdev", f"user,id=qmpsnap-spare{number},restrict=on")
        for number in range(there, max(numbers, default=-1) + 1)
    ]
    return replace(found, line=found.line.append(*spare))


async def _without_what_has_gone(
    line: CommandLine, ends: BackEnds, nodes: Collection[str]
) -> CommandLine:
    """*line* without the back ends that QEMU has no more and that nothing speaks of."""
    there = {
        "netdev": await ends.networks(),
        "chardev": {one.label for one in ends.inventory.chardevs or []},
        "object": await ends.objects(),
        "blockdev": nodes,
        "drive": await ends.drives(),
    }
    while True:
        gone = [
            option
            for option in line.options
            if option.name in there
            and (name := _called(option)) is not None
            and name not in there[option.name]
            and not any(refers(other, name) for other in line.options if other is not option)
        ]
        if not gone:
            return line
        line = CommandLine(line.binary, tuple(one for one in line.options if one not in gone))


def _called(option: Option) -> str | None:
    """The name of a back end; None for one that stays whatever happened.

    QEMU numbers user networks: those that come later keep their number when this one stays.
    """
    if option.name == "blockdev":
        return Blockdev.of(option).node_name
    if option.name == "netdev" and Netdev.of(option).type == "user":
        return None
    return fields_of(option).get("id")


def _names(line: CommandLine, found: Changes) -> list[str]:
    return [name_of(line.options[index]) for index in found.gone]


def _where(slot: Slot) -> str:
    return ", ".join(f"{name} {value}" for name, value in slot.props.items())


def _renamed(before: CommandLine, after: CommandLine) -> dict[str, str]:
    now = {slot.backend: slot.key for slot in slots(after)}
    pairs = {slot.key: now[slot.backend] for slot in slots(before) if slot.backend in now}
    return {old: new for old, new in pairs.items() if old != new}
