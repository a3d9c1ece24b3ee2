"""The only place that says as options what was plugged into a running machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qmpsnap.errors import Blocked
from qmpsnap.hypervisor.machine.backends import BackEnds, referred
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.drives import slots
from qmpsnap.hypervisor.machine.inventory import DeviceFacts
from qmpsnap.hypervisor.machine.keyval import Fields, Json, from_json
from qmpsnap.hypervisor.machine.options import Blockdev, Object, fields_of, option_of
from qmpsnap.hypervisor.machine.plugged_disks import Image
from qmpsnap.hypervisor.machine.processors import Processors
from qmpsnap.hypervisor.machine.properties import Properties
from qmpsnap.hypervisor.machine.relocate import refusal
from qmpsnap.hypervisor.machine.relocation.characters import refers
from qmpsnap.hypervisor.machine.usb import Ports, on_usb

_NO_BUS = "main-system-bus"


@dataclass(slots=True)
class Plugged:
    """*line* with the devices that were added, and the back ends that they need.

    Devices are JSON, which QEMU makes after all others, so that every bus is there. *troubles*:
    those that no option brings back, with the reason; they are not in *line*.
    """

    ends: BackEnds
    properties: Properties
    ports: Ports
    images: Sequence[Image]
    cpus: Processors | None
    line: CommandLine
    troubles: list[str] = field(default_factory=list)
    _left_out: set[str] = field(default_factory=set)

    async def add(self, devices: Sequence[DeviceFacts]) -> None:
        """Add *devices*, each behind the one whose bus it is on. Raises MonitorLost."""
        hubs = [one for one in devices if one.type == "usb-hub"]
        depths = {hub.path: len(await self.ports.of(hub) or "") for hub in hubs}
        # what is on a hub is on the bus of the controller: the hub is only in its port
        hubs.sort(key=lambda hub: depths[hub.path])
        rest = [one for one in devices if one not in hubs]
        for device in _in_order([*hubs, *rest]):
            name = device.id or device.path
            try:
                options = await self._options(device)
            except Blocked as no:
                self._left_out.add(name)
                told = str(no)
                self.troubles.append(told if name in told else f"device {name}: {told}")
            else:
                self.line = self.line.append(*options)

    async def _options(self, facts: DeviceFacts) -> list[Option]:
        if (owner := _owner(facts.bus)) in self._left_out:
            raise Blocked(f"it is on a bus of {owner}")
        device, image = await self._device(facts)
        options = []
        if image is not None and not self._has_disk(image.origin):
            options.append(image.option())
        for name, ident in referred(device):
            end = await self._end(name, ident)
            if end is not None and end not in self.line.options:
                options += await self._behind(end)
                options.append(end)
        options.append(option_of("device", device))
        for option in options:
            if option.name not in ("blockdev", "drive") and (
                no := refusal(self.line.append(*options), option)
            ):
                raise Blocked(no)
        for option in options:
            self._replace(option)
        return options

    async def _device(self, facts: DeviceFacts) -> tuple[Fields, Image | None]:
        tree: dict[str, Json] = {"driver": facts.type}
        if facts.id is not None:
            tree["id"] = facts.id
        if facts.type.endswith("-cpu"):
            slot = self.cpus.at(facts.path) if self.cpus is not None else None
            if slot is None:
                raise Blocked("QEMU does not tell its place")
            return from_json(tree | dict(slot.props.items())), None
        if facts.bus and facts.bus != _NO_BUS:
            tree["bus"] = facts.bus
        tree |= await self.properties.changed(facts.path, facts.type)
        if on_usb(facts) and "port" not in tree:
            port = await self.ports.of(facts)
            if port is None:
                raise Blocked("its USB port cannot be told")
            tree["port"] = port
        image = next((one for one in self.images if one.of(facts.path, facts.id)), None)
        if image is not None and image.disk.chain:
            for node in image.disk.filters:
                self.ends.notes.append(f"disk {image.disk.name}: without its {node.driver} filter")
            told = "discard, aio and cache sizes are as by default"
            self.ends.notes.append(f"disk {image.disk.name}: plugged at run time, {told}")
            return from_json(tree | {"drive": image.origin}), image
        if tree.get("drive"):
            raise Blocked(f"its disk {tree['drive']} cannot be told")
        return from_json(tree), None

    def _has_disk(self, origin: str) -> bool:
        nodes = (Blockdev.of(option).node_name for option in self.line.all("blockdev"))
        return origin in {slot.key for slot in slots(self.line)} or origin in nodes

    async def _end(self, name: str, ident: str) -> Option | None:
        """The option of a back end; None where the one that is there says it."""
        there = _called(self.line, name, ident)
        if there is not None and any(refers(one, ident) for one in self.line.all("device")):
            return None  # a device of the command line uses it, so it has stayed
        match name:
            case "chardev":
                return None if there else await self.ends.chardev(ident)
            case "netdev":
                told = (await self.ends.networks()).get(ident)
                same = told and there is not None and fields_of(there).get("type") == told.type
                return None if same else await self.ends.netdev(ident)
            case _:
                kind = (await self.ends.objects()).get(ident, "")
                same = there is not None and Object.of(there).qom_type == kind
                # memory may have come again in another size
                keeps = same and not kind.startswith("memory-backend-")
                return None if keeps else await self.ends.object_(ident)

    async def _behind(self, end: Option) -> list[Option]:
        """What the back end itself needs: an entropy daemon's chardev."""
        ident = fields_of(end).get("chardev") if end.name == "object" else None
        if ident is None or _called(self.line, "chardev", ident) is not None:
            return []
        return [await self.ends.chardev(ident)]

    def _replace(self, new: Option) -> None:
        """Takes away an option whose back end went, and whose id another one has by now."""
        if new.name == "device" or (ident := fields_of(new).get("id", "node-name")) is None:
            return
        kept = [
            one
            for one in self.line.options
            if one.name != new.name or fields_of(one).get("id", "node-name") != ident
        ]
        self.line = CommandLine(self.line.binary, tuple(kept))


def _called(line: CommandLine, name: str, ident: str) -> Option | None:
    found = (one for one in line.all(name) if fields_of(one).get("id") == ident)
    return next(found, None)


def _owner(bus: str | None) -> str | None:
    """The id of the device that a bus is on, if the bus is called after one."""
    return (bus.rpartition(".")[0] or bus) if bus else None


def _in_order(devices: Sequence[DeviceFacts]) -> list[DeviceFacts]:
    waiting, out = list(devices), []
    while waiting:
        names = {one.id for one in waiting}
        free = [one for one in waiting if not {_owner(one.bus), one.bus} & names]
        out += free or waiting
        waiting = [one for one in waiting if one not in out]
    return out
