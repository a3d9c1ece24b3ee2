"""Dirty bitmaps: what ours are called, where in a chain one lies, and whether it can be trusted."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import msgspec

from qmpsnap.errors import CommandRefused, ReplyMalformed
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.ids import NodeName, is_snapshot_id, is_vm_name

PREFIX = "qmpsnap:"
GRANULARITY = 65536  # bytes: a cluster of the increments
_LABEL = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One dirty bitmap of a node, in QEMU's words; *count* and *granularity* in bytes."""

    name: str = ""
    recording: bool = False
    busy: bool = False
    persistent: bool = False
    inconsistent: bool = False  # told only where it is true
    count: int = 0
    granularity: int = 0

    @property
    def ours(self) -> bool:
        return self.name.startswith(PREFIX)

    @property
    def usable(self) -> bool:
        """Whether it holds all changes since it was added, whoever may be reading it now."""
        return self.recording and not self.inconsistent


class Layer(Protocol):
    """What `classify` wants to know of a node."""

    @property
    def name(self) -> NodeName: ...
    @property
    def keeps_bitmaps(self) -> bool: ...
    @property
    def bitmaps(self) -> tuple[Bitmap, ...]: ...


@dataclass(frozen=True, slots=True)
class Name:
    """What the name of a bitmap of ours says: *point* is `ID`, or `ID/REVISION`."""

    vm: str
    label: str
    point: str


class Standing(StrEnum):
    """How a bitmap that is looked for stands; only a RECORDING one is good for an increment."""

    RECORDING = "recording"
    BUSY = "busy"
    DISABLED = "disabled"
    INCONSISTENT = "inconsistent"
    WRONG_GRANULARITY = "wrong-granularity"
    FOREIGN = "foreign"
    MISSING = "missing"


def name_of(vm: str, label: str, point_id: str) -> str:
    """The name of the bitmap that records what the disk *label* changed since *point_id*."""
    return f"{PREFIX}{vm}:{label}:{point_id}"


def parse(name: str) -> Name | None:
    """What `name_of` put together; None for a bitmap that is not ours."""
    parts = name.removeprefix(PREFIX).split(":")
    if not name.startswith(PREFIX) or len(parts) != 3:
        return None
    vm, label, point = parts
    ids = point.split("/")
    fine = is_vm_name(vm) and _LABEL.fullmatch(label) and len(ids) <= 2
    return Name(vm, label, point) if fine and all(map(is_snapshot_id, ids)) else None


def listed(node: Mapping[str, Any]) -> tuple[Bitmap, ...]:
    """The bitmaps of one row of query-named-block-nodes.

    Those of jobs have no name (seen in 7.2 and 10.0) and are left out. A field that is missing
    reads as the value that makes the bitmap one not to be trusted. Raises ReplyMalformed.
    """
    try:
        found = msgspec.convert(node.get("dirty-bitmaps", ()), tuple[Bitmap, ...])
    except msgspec.ValidationError as odd:
        raise ReplyMalformed(f"query-named-block-nodes: dirty-bitmaps: {odd}") from odd
    return tuple(one for one in found if one.name)


def classify(chain: Sequence[Layer], wanted: str) -> tuple[Standing, int | None, str]:
    """How the bitmap *wanted* stands, on which layer of *chain* (top first), and why it is no use.

    Changes since its point are what it says, and all that is allocated in the layers above it.
    The reason is for people, and empty for a bitmap that can be used.
    """
    if parse(wanted) is None:
        return Standing.FOREIGN, None, f"{wanted!r} is no name that qmpsnap gives to a bitmap"
    for depth, layer in enumerate(chain):
        for one in layer.bitmaps:
            if one.name == wanted:
                standing, why = _judged(one)
                return standing, depth, f"bitmap {wanted} on {layer.name} {why}" if why else ""
    why = "QEMU was killed, or the image was changed without QEMU"
    if not all(layer.keeps_bitmaps for layer in chain):
        why = f"those of a raw image (or qcow2 of version 2) end with QEMU; else {why}"
    return Standing.MISSING, None, f"there is no bitmap {wanted}: {why}"


def _judged(one: Bitmap) -> tuple[Standing, str]:
    # what lasts comes before what passes: a busy one is worth waiting for
    if one.inconsistent:
        return Standing.INCONSISTENT, "is inconsistent: QEMU was killed while it was in use"
    if one.granularity != GRANULARITY:
        told = f"has a granularity of {one.granularity} bytes, not {GRANULARITY}"
        return Standing.WRONG_GRANULARITY, told
    if not one.recording:
        return Standing.DISABLED, "does not record: somebody has disabled it"
    if one.busy:
        return Standing.BUSY, "is busy: an export or a job holds it"
    return Standing.RECORDING, ""


async def query(monitor: Monitor) -> list[tuple[NodeName, Bitmap]]:
    """All named bitmaps of this QEMU, each with its node."""
    flat = {"flat": True}
    nodes = await monitor.query("query-named-block-nodes", list[dict[str, Any]], flat)
    return [(NodeName(str(node.get("node-name"))), one) for node in nodes for one in listed(node)]


async def remove(monitor: Monitor, node: NodeName, name: str) -> bool:
    """Remove one bitmap; False if QEMU refuses: busy, on a read-only node, or not there."""
    try:
        await monitor.execute("block-dirty-bitmap-remove", {"node": node, "name": name})
    except CommandRefused:
        return False
    return True


async def remove_all(monitor: Monitor, keep: Callable[[str], bool]) -> list[str]:
    """Remove each bitmap of ours, on whatever node, whose name *keep* does not want.

    Gives the names of those that are gone; what QEMU refuses stays for the next time.
    """
    return [
        one.name
        for node, one in await query(monitor)
        if one.ours and not keep(one.name) and await remove(monitor, node, one.name)
    ]
