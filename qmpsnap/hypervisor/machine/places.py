"""The only place that holds the devices of a command line where they are when others go."""

from __future__ import annotations

from qmpsnap.errors import CommandRefused
from qmpsnap.hypervisor.machine.changes import Changes
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.drives import slots
from qmpsnap.hypervisor.machine.inventory import DeviceFacts
from qmpsnap.hypervisor.machine.keyval import Fields, Pair
from qmpsnap.hypervisor.machine.options import DRIVES, Device, option_of
from qmpsnap.hypervisor.machine.usb import Ports, on_usb
from qmpsnap.hypervisor.monitor import Monitor

# What else than `addr` says where a device is on its bus; QEMU chooses what is not said.
_PLACES = ("channel", "scsi-id", "lun", "nr", "unit", "slot")
# QEMU chooses them by the number of vCPUs at the start, of those who would use them all.
_QUEUES = ("num-queues", "num_queues", "vectors")
_NO_BUS = "main-system-bus"


class Places:
    """Asks one QEMU where its devices are. *fewer*: it has lost vCPUs that it started with."""

    def __init__(self, monitor: Monitor, ports: Ports, *, fewer: bool) -> None:
        self._monitor = monitor
        self._ports = ports
        self._names = (*_PLACES, *_QUEUES) if fewer else _PLACES
        self._fewer = fewer

    async def pinned(self, line: CommandLine, found: Changes) -> tuple[CommandLine, list[str]]:
        """*line* without the devices that have gone; the others say their bus and address.

        Also told: the names of those whose place QEMU does not tell.
        """
        drives = {slot.index: slot for slot in slots(line)}
        # these are made in their turn, between the others, wherever there is room
        moved = self._fewer or any(line.options[index].name == "device" for index in found.gone)
        out: list[Option] = []
        troubles = []
        for index, option in enumerate(line.options):
            if index in found.gone:
                continue
            facts = found.there.get(index)
            if facts is None:
                out.append(option)
            elif option.name == "device":
                fields = Device.of(option).fields
                if _chosen_usb(facts, fields) and await self._ports.of(facts) is None:
                    troubles.append(f"device {facts.id or facts.path}: its USB port cannot be told")
                out.append(option_of("device", await self._placed(facts, fields)))
            elif option.name in DRIVES and moved:
                slot = drives[index]
                fields = slot.drive.fields.without("if", "index", "bus", "unit")
                fields = fields.set("if", "none").set("id", slot.backend)
                pairs: tuple[Pair, ...] = (("driver", facts.type), ("drive", slot.backend))
                out.append(option_of("drive", fields))
                out.append(option_of("device", await self._placed(facts, Fields(pairs))))
            else:
                out.append(option)
        return CommandLine(line.binary, tuple(out)), troubles

    async def _placed(self, facts: DeviceFacts, fields: Fields) -> Fields:
        found: dict[str, int | str] = {}
        if facts.addr is not None:
            found["addr"] = facts.addr
        for name in self._names:
            number = await self._number(facts.path, name)
            if number is not None:
                found[name] = number
        if _chosen_usb(facts, fields) and (port := await self._ports.of(facts)):
            found["port"] = port
        if not found:
            return fields
        if facts.bus and facts.bus != _NO_BUS:
            found["bus"] = facts.bus
        for name, value in found.items():
            fields = fields.default(name, value if fields.json else str(value))
        return fields

    async def _number(self, path: str, name: str) -> int | None:
        try:
            value = await self._monitor.execute("qom-get", {"path": path, "property": name})
        except CommandRefused:
            return None
        return value if isinstance(value, int) and 0 <= value < 1 << 16 else None


def _chosen_usb(facts: DeviceFacts, fields: Fields) -> bool:
    """Whether it is on a USB port that QEMU chose."""
    return on_usb(facts) and not fields.has("port")
