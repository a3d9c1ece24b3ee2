"""The only place that reads QEMU's device tree as a whole, devices that nobody named among them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from qmpsnap.hypervisor.machine.asking import Asking

_LINE = re.compile(r"(?P<indent> *)(?P<word>bus|dev): (?P<name>.*)")
_DEVICE = re.compile(r'(?P<type>.*), id "(?P<id>.*)"')
_USB = re.compile(r" *addr \S+, port (?P<port>\S+), speed .*")
_PROPERTY = re.compile(r" *(?P<name>\S+) = (?P<value>.*)")
UNSET = frozenset({"", "<unset>", "<null>"})
# what says where on its bus a device is, by the kind of bus (hw/*: *_bus_info)
_PLACES = ("addr", "port", "nr", "unit", "slot", "iobase", "address")


class TreeDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device as QEMU's device tree has it, whoever made it.

    *id* is the user's, or None. *bus* is the name of the bus it is on, None for one on no bus;
    *bus_type* as QEMU calls it; *address* its place there, as the monitor prints it (`06.0` on
    PCI, `channel:target:lun` on SCSI). *parent* is the id, or else the type, of the device that
    has that bus.
    """

    type: str
    id: str | None
    bus: str | None = None
    bus_type: str | None = None
    address: str | None = None
    parent: str | None = None
    properties: dict[str, Any] | None = None


@dataclass(slots=True)
class Found:
    """A device with its properties as the monitor prints them."""

    type: str
    id: str | None
    bus: str | None = None
    bus_type: str | None = None
    parent: str | None = None
    usb_port: str | None = None
    properties: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str | None:
        told = self.properties
        if "lun" in told and "scsi-id" in told:
            return ":".join(told[key].split()[0] for key in ("channel", "scsi-id", "lun"))
        if self.usb_port is not None:
            return self.usb_port
        words = (_unquoted(told.get(key, "")) for key in _PLACES)
        return next((word for word in words if word not in UNSET), None)

    @property
    def romfile(self) -> str | None:
        """The option ROM that QEMU has loaded for it."""
        bar = self.properties.get("rombar", "").split(" ")[0]
        return None if bar == "0" else _unquoted(self.properties.get("romfile", "")) or None


async def take(asking: Asking) -> list[Found] | None:
    """All devices, from the outside in: one question, some 1.5 ms for 50 devices."""
    said = await asking.human("info qtree")
    return None if said is None else parsed(said)


def typed(
    found: Iterable[Found], properties: Iterable[Mapping[str, Any] | None]
) -> list[TreeDevice]:
    """For the record; *properties* of each that are to be in it."""
    return [
        TreeDevice(
            type=one.type,
            id=one.id,
            bus=one.bus,
            bus_type=one.bus_type,
            address=one.address,
            parent=one.parent,
            properties=None if told is None else dict(told),
        )
        for one, told in zip(found, properties, strict=True)
    ]


def parsed(said: Iterable[str]) -> list[Found]:
    """The devices that `info qtree` printed (softmmu/qdev-monitor.c: qdev_print)."""
    found: list[Found] = []
    above: list[tuple[int, Found | str]] = []  # buses by name and devices, with their indents
    kinds: dict[int, str] = {}  # the type of the bus whose indent it is
    for row in said:
        match = _LINE.fullmatch(row)
        if match is None:
            _detail(row, above, kinds)
            continue
        indent = len(match["indent"])
        above = [one for one in above if one[0] < indent]
        if match["word"] == "bus":
            above.append((indent, match["name"]))
            kinds.pop(indent, None)
            continue
        named = _DEVICE.fullmatch(match["name"])
        new = Found(named["type"] if named else match["name"], (named and named["id"]) or None)
        if above and isinstance(above[-1][1], str):
            new.bus, new.bus_type = above[-1][1], kinds.get(above[-1][0])
        owners = [one for _, one in above if isinstance(one, Found)]
        new.parent = (owners[-1].id or owners[-1].type) if owners else None
        found.append(new)
        above.append((indent, new))
    return found


def _detail(row: str, above: list[tuple[int, Found | str]], kinds: dict[int, str]) -> None:
    """A line about the bus, or the device, that is the innermost one."""
    if not above:
        return
    indent, last = above[-1]
    if isinstance(last, str):
        if row.strip().startswith("type "):
            kinds[indent] = row.strip().removeprefix("type ")
    elif (match := _PROPERTY.fullmatch(row)) is not None:
        last.properties.setdefault(match["name"], match["value"])
    elif (match := _USB.fullmatch(row)) is not None:
        last.usb_port = match["port"]


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text.split(" ")[0]
