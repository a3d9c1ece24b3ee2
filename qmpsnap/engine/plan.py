"""What a snapshot will do, decided from facts alone: a value that `--dry-run` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmpsnap.engine.levels import Chosen, scratch
from qmpsnap.engine.ram import ram_modes
from qmpsnap.engine.survey import Site, Survey
from qmpsnap.engine.wishes import Level, Quiesce, RamChoice, Wishes
from qmpsnap.errors import Blocked, UsageError, VmBusy
from qmpsnap.hypervisor.block import bitmap
from qmpsnap.hypervisor.block.overlay import Overlay
from qmpsnap.hypervisor.block.transaction import Action, AddBitmap, Snapshot, wire
from qmpsnap.hypervisor.guest.runstate import RunState
from qmpsnap.hypervisor.vmstate.session import RamMode
from qmpsnap.ids import SnapshotId, disk_labels
from qmpsnap.store.manifest import LeftOut

MAX_PAUSE = 0.2  # seconds, unless the caller says otherwise
_ELSEWHERE = {
    "vhost-user-blk": "its data is in another process",
    "vhost-user-scsi": "its data is in another process",
    "vhost-scsi": "its data is in the host's kernel",
    "vhost-user-fs": "a folder of the host",
    "virtio-9p": "a folder of the host",
    "usb-mtp": "a folder of the host",
}
_OVERLAY = Chosen(Level.OVERLAY, "asked for")


@dataclass(frozen=True, slots=True)
class PlannedDisk:
    """A disk of the snapshot: its chain is frozen, *overlay* takes the writes from then on.

    At level `overlay` that is all. Else what is frozen is copied as *chosen* says, the overlay is
    folded back, and *bitmap* has recorded from the instant on what the guest changes.
    """

    label: str
    site: Site
    overlay: Overlay
    chosen: Chosen
    bitmap: str | None

    @property
    def copied(self) -> bool:
        return self.chosen.level is not Level.OVERLAY

    @property
    def actions(self) -> list[Action]:
        top = self.site.disk.top
        laid: list[Action] = [Snapshot(top.name, self.overlay.node)]
        if self.bitmap is not None:
            # raw has no room for one: it ends with this QEMU
            laid.insert(0, AddBitmap(top.name, self.bitmap, persistent=top.keeps_bitmaps))
        return laid

    def shown(self) -> dict[str, Any]:
        beneath = self.chosen.beneath
        return {
            "disk": self.site.name,
            "label": self.label,
            "node": self.site.disk.top.name,
            "frozen": self.site.paths[0],
            "overlay": str(self.overlay.path),
            "level": self.chosen.level.value,
            "level_reason": self.chosen.reason,
            "encrypted": self.chosen.sealed,
            "parent": beneath.name if beneath is not None else None,
            "bitmap": self.bitmap,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """One snapshot, decided. *modes* are tried in this order; *why* says how they were chosen.

    *freeze*: the agent freezes the guest, for *max_freeze* seconds at most. *max_pause* in seconds,
    None for no bound.
    """

    id: SnapshotId
    vm: str
    level: Level
    disks: tuple[PlannedDisk, ...]
    left_out: tuple[LeftOut, ...]
    asked: RamChoice
    modes: tuple[RamMode, ...]
    why: str
    freeze: bool
    freeze_why: str
    running: bool
    max_pause: float | None
    max_freeze: float
    pause: float
    budget: float
    ram_bytes: int

    def transaction(self) -> dict[str, object]:
        """The arguments of the one QMP transaction that fixes the disks."""
        return wire(self.actions)

    @property
    def actions(self) -> list[Action]:
        return [action for disk in self.disks for action in disk.actions]

    def shown(self) -> dict[str, Any]:
        """The plan for people and programs: plain JSON."""
        return {
            "id": str(self.id),
            "vm": self.vm,
            "level": self.level.value,
            "disks": [disk.shown() for disk in self.disks],
            "left_out": [{"disk": left.device, "reason": left.reason} for left in self.left_out],
            "ram": [mode.value for mode in self.modes],
            "ram_reason": self.why,
            "quiesce": "agent" if self.freeze else "none",
            "quiesce_reason": self.freeze_why,
            "max_pause_ms": None if self.max_pause is None else self.max_pause * 1000,
            "max_freeze_ms": self.max_freeze * 1000 if self.freeze else None,
            "before": [
                {"execute": "blockdev-add", "arguments": disk.overlay.wire()} for disk in self.disks
            ],
            "at_the_instant": {"execute": "transaction", "arguments": self.transaction()},
        }


def plan(
    facts: Survey,
    wishes: Wishes,
    id: SnapshotId,
    layers: Path,
    chosen: Mapping[str, Chosen] | None = None,
) -> Plan:
    """Decide. *chosen* is the level of each disk, by label; a disk without one gets an overlay.

    Raises Blocked, VmBusy or UsageError with the reason; nothing was touched then.
    """
    if facts.state not in {RunState.RUNNING, RunState.PAUSED}:
        raise Blocked(f"the guest is {facts.state}: only a running or a paused one can be taken")
    if facts.jobs:
        raise VmBusy(f"QEMU is busy with {', '.join(facts.jobs)}")
    taken, left_out = wanted(facts, wishes)
    labels = disk_labels([site.name for site in taken])
    disks = tuple(
        _planned(facts.machine.name, label, site, id, layers, (chosen or {}).get(label, _OVERLAY))
        for label, site in zip(labels, taken, strict=True)
    )
    modes, why = ram_modes(facts, wishes.ram)
    freeze, freeze_why = _freeze(facts, wishes, modes)
    bound = wishes.max_pause
    if bound is None and wishes.ram is not RamChoice.PAUSED:
        bound = MAX_PAUSE
    return Plan(
        id=id,
        vm=facts.machine.name,
        level=cheapest(disk.chosen.level for disk in disks),
        disks=disks,
        left_out=left_out,
        asked=wishes.ram,
        modes=modes,
        why=why,
        freeze=freeze,
        freeze_why=freeze_why,
        running=facts.state is RunState.RUNNING,
        max_pause=bound,
        max_freeze=wishes.max_freeze,
        pause=wishes.pause if bound is None else min(wishes.pause, bound * 0.5),
        budget=wishes.budget,
        ram_bytes=facts.ram_bytes,
    )


def _planned(
    vm: str, label: str, site: Site, id: SnapshotId, layers: Path, chosen: Chosen
) -> PlannedDisk:
    node = id.overlay_of(label)
    copied = chosen.level is not Level.OVERLAY
    path = scratch(site, node, layers) if copied else layers / f"{node}.qcow2"
    overlay = Overlay(node, path, site.disk.top, site.options)
    name = bitmap.name_of(vm, label, str(id)) if copied else None
    return PlannedDisk(label, site, overlay, chosen, name)


def cheapest(levels: Iterable[Level]) -> Level:
    """What the snapshot as a whole is called, of what its disks are."""
    found = set(levels)
    order = (Level.DIFF, Level.INC, Level.FULL, Level.OVERLAY)
    return next((level for level in order if level in found), Level.OVERLAY)


def wanted(facts: Survey, wishes: Wishes) -> tuple[list[Site], tuple[LeftOut, ...]]:
    """The disks that are taken, and those that are not. Raises Blocked, UsageError."""
    _check_names(facts, (*wishes.include, *wishes.exclude))
    chosen: list[Site] = []
    left_out: list[LeftOut] = []
    for site in facts.sites:
        disk = site.disk
        if reason := _left_out(site, wishes):
            size = disk.top.virtual_size if disk.chain and not disk.read_only else None
            left_out.append(
                LeftOut(
                    device=site.name, reason=reason, origin=site.origin, virtual_size_bytes=size
                )
            )
        elif disk.trouble:
            raise Blocked(f"disk {site.name}: {disk.trouble}", hint=f"-x {site.name} leaves it out")
        elif not all(site.paths):
            raise Blocked(f"disk {site.name}: its file cannot be told")
        else:
            chosen.append(site)
    return chosen, (*left_out, *_elsewhere(facts))


def _elsewhere(facts: Survey) -> Iterator[LeftOut]:
    """What the guest stores in another process, or sees of the host: no disk of QEMU's."""
    for device in facts.inventory.devices or []:
        for start, reason in _ELSEWHERE.items():
            if device.type.startswith(start):
                yield LeftOut(device=device.id or device.path, reason=f"{device.type}: {reason}")
                break


def _left_out(site: Site, wishes: Wishes) -> str:
    disk = site.disk
    if not disk.chain:
        return "empty drive"
    if disk.read_only:
        return "read-only"
    if site.names & set(wishes.exclude):
        return "excluded"
    if wishes.include and not site.names & set(wishes.include) and not site.flash:
        return "not included"
    return ""


def _check_names(facts: Survey, names: tuple[str, ...]) -> None:
    known = set().union(*(site.names for site in facts.sites)) if facts.sites else set()
    for name in names:
        if name not in known:
            there = ", ".join(site.name for site in facts.sites) or "none"
            raise UsageError(f"no disk {name!r}; there are: {there}")


def _freeze(facts: Survey, wishes: Wishes, modes: tuple[RamMode, ...]) -> tuple[bool, str]:
    if wishes.quiesce is Quiesce.NONE:
        return False, "asked for"
    running = facts.state is RunState.RUNNING
    if wishes.quiesce is Quiesce.AGENT:
        if not running:
            raise Blocked("a paused guest's agent cannot freeze it", hint="`--quiesce none`")
        if facts.agent_trouble:
            raise Blocked(f"no freeze: {facts.agent_trouble}", hint="`--quiesce none`")
        return True, "asked for"
    if modes != (RamMode.NONE,):
        return False, "the RAM is taken too: it holds what is not on the disks"
    if not running:
        return False, "the guest is paused"
    if facts.agent_trouble:
        return False, facts.agent_trouble
    return True, "no RAM is taken, and the agent answers"
