"""The only place that says as options which virtual CPUs a machine has by now."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from qmpsnap.errors import CommandRefused
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.inventory import Inventory
from qmpsnap.hypervisor.machine.keyval import Fields, Json, Pair, from_json
from qmpsnap.hypervisor.machine.options import option_of
from qmpsnap.hypervisor.monitor import Monitor

_OF_START = "/machine/unattached/"  # where QEMU keeps those that -smp made
# a machine that does not know one of these takes it as 1, if at all
_LEVELS = ("drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads")


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for a vCPU: its type and topology ids, and the QOM path of the one in it, if any."""

    type: str
    props: dict[str, int | str]
    path: str | None

    def option(self, ident: str | None) -> Option:
        tree: dict[str, Json] = {"driver": self.type, **({"id": ident} if ident else {})}
        return option_of("device", from_json(tree | dict(self.props.items())))


@dataclass(frozen=True, slots=True)
class Processors:
    """*slots* in the order in which -smp fills them; *smp* as the machine has it, at its start."""

    slots: tuple[Slot, ...]
    smp: dict[str, int]

    @property
    def at_start(self) -> int:
        return int(self.smp.get("cpus", 0))

    def at(self, path: str) -> Slot | None:
        return next((slot for slot in self.slots if slot.path == path), None)

    @property
    def gone(self) -> list[Slot]:
        """Those of -smp that were unplugged, and not made good at the same place."""
        return [slot for slot in self.slots[: self.at_start] if not _started(slot)]

    def spelled(self, line: CommandLine) -> CommandLine:
        """*line* without the vCPUs that have gone.

        -smp makes those before the first gap, devices the others; all of the topology is said,
        since QEMU derives it from a number that is another one now.
        """
        if not self.gone:
            return line
        first = next(n for n, slot in enumerate(self.slots) if not _started(slot))
        later = [slot.option(None) for slot in self.slots[first : self.at_start] if _started(slot)]
        pairs: list[Pair] = [("cpus", str(first)), ("maxcpus", str(self.smp["maxcpus"]))]
        pairs += [
            (level, str(self.smp[level]))
            for level in _LEVELS
            if self.smp.get(level, 1) > 1 or level in ("sockets", "cores", "threads")
        ]
        smp = option_of("smp", Fields(tuple(pairs)))
        return line.without(("smp",)).append(smp, *later)


class _Place(msgspec.Struct, frozen=True, rename="kebab"):
    type: str
    props: dict[str, int | str]
    qom_path: str | None = None


async def query(monitor: Monitor, inventory: Inventory) -> Processors | None:
    """None where nothing has changed since the start, or the machine does not tell."""
    cpus = inventory.cpus or []
    try:
        asked = {"path": "/machine", "property": "smp"}
        smp = await monitor.query("qom-get", dict[str, int], asked)
        of_start = [cpu for cpu in cpus if cpu.qom_path.startswith(_OF_START)]
        if not cpus or len(of_start) == len(cpus) == smp.get("cpus"):
            return None
        told = await monitor.query("query-hotpluggable-cpus", list[_Place])
    except CommandRefused:
        return None
    # QEMU lists them last first
    slots = [Slot(one.type, one.props, one.qom_path) for one in reversed(told)]
    return Processors(tuple(slots), smp)


def _started(slot: Slot) -> bool:
    return slot.path is not None and slot.path.startswith(_OF_START)
