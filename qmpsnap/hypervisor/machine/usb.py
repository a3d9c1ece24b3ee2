"""The only place that finds out which USB port a device is on: no QMP query tells of those."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qmpsnap.errors import CommandRefused
from qmpsnap.hypervisor.machine.inventory import DeviceFacts, Inventory
from qmpsnap.hypervisor.monitor import Monitor

_BUS = re.compile(r"( *)bus: (\S+)")
_DEVICE = re.compile(r'( *)dev: (\S+), id "(.*)"')
_PORT = re.compile(r" *addr [\d.]+, port ([\d.]+), speed")


@dataclass(frozen=True, slots=True)
class Seat:
    """A device on a port, as HMP's `info qtree` has it; *id* is empty where it has none."""

    bus: str
    type: str
    id: str
    port: str


def on_usb(facts: DeviceFacts) -> bool:
    """Whether it is a device on a USB bus; a host controller has an address on PCI."""
    return facts.type.startswith(("usb-", "u2f-", "ccid-card")) and facts.addr is None


class Ports:
    """The ports of one QEMU, asked once (2 to 6 ms of its main loop)."""

    def __init__(self, monitor: Monitor, inventory: Inventory) -> None:
        self._monitor = monitor
        self._inventory = inventory
        self._seats: list[Seat] | None = None

    async def of(self, facts: DeviceFacts) -> str | None:
        """The port of *facts*, `2.1` behind a hub; None if QEMU does not tell. MonitorLost."""
        if self._seats is None:
            self._seats = list(_seats(await self._tree()))
        alike = [one for one in self._seats if (one.bus, one.type) == (facts.bus, facts.type)]
        if facts.id is not None:
            return next((one.port for one in alike if one.id == facts.id), None)
        # QEMU lists a bus newest first; what it made by itself, at the start, comes last
        nameless = [one for one in alike if not one.id]
        known = [
            one.path
            for one in self._inventory.devices or []
            if one.id is None and (one.bus, one.type) == (facts.bus, facts.type)
        ]
        newest_first = sorted(known, key=lambda path: (len(path), path), reverse=True)
        place = newest_first.index(facts.path)
        return nameless[place].port if place < len(nameless) else None

    async def _tree(self) -> str:
        line = {"command-line": "info qtree"}
        try:
            return str(await self._monitor.execute("human-monitor-command", line))
        except CommandRefused:
            return ""


def _seats(tree: str) -> Iterator[Seat]:
    buses: dict[int, str] = {}
    device = (0, "", "")
    for line in tree.splitlines():
        if found := _BUS.match(line):
            buses[len(found[1])] = found[2]
        elif found := _DEVICE.match(line):
            device = (len(found[1]), found[2], found[3])
        elif found := _PORT.match(line):
            indent, kind, ident = device
            yield Seat(buses.get(indent - 2, ""), kind, ident, found[1])
