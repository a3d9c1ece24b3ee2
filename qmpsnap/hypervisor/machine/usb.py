"""The only place that finds out which USB port a device is on: no QMP query tells of those."""

from __future__ import annotations

from qmpsnap.hypervisor.machine import tree
from qmpsnap.hypervisor.machine.asking import Asking
from qmpsnap.hypervisor.machine.inventory import DeviceFacts, Inventory
from qmpsnap.hypervisor.machine.tree import Found
from qmpsnap.hypervisor.monitor import Monitor


def on_usb(facts: DeviceFacts) -> bool:
    """Whether it is a device on a USB bus; a host controller has an address on PCI."""
    return facts.type.startswith(("usb-", "u2f-", "ccid-card")) and facts.addr is None


class Ports:
    """The ports of one QEMU, asked once (2 to 6 ms of its main loop)."""

    def __init__(self, monitor: Monitor, inventory: Inventory) -> None:
        self._monitor = monitor
        self._inventory = inventory
        self._seats: list[Found] | None = None

    async def of(self, facts: DeviceFacts) -> str | None:
        """The port of *facts*, `2.1` behind a hub; None if QEMU does not tell. MonitorLost."""
        if self._seats is None:
            told = await tree.take(Asking(self._monitor)) or []
            self._seats = [one for one in told if one.usb_port is not None]
        alike = [one for one in self._seats if (one.bus, one.type) == (facts.bus, facts.type)]
        if facts.id is not None:
            return next((one.usb_port for one in alike if one.id == facts.id), None)
        # QEMU lists a bus newest first; what it made by itself, at the start, comes last
        nameless = [one for one in alike if not one.id]
        known = [
            one.path
            for one in self._inventory.devices or []
            if one.id is None and (one.bus, one.type) == (facts.bus, facts.type)
        ]
        newest_first = sorted(known, key=lambda path: (len(path), path), reverse=True)
        place = newest_first.index(facts.path)
        return nameless[place].usb_port if place < len(nameless) else None
