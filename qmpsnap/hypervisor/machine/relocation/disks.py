"""The only place that decides which image a disk of a relocated machine is on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qmpsnap.errors import Blocked
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.drives import Slot, slots
from qmpsnap.hypervisor.machine.keyval import Fields
from qmpsnap.hypervisor.machine.options import (
    Blockdev,
    Device,
    Drive,
    fields_of,
    option_of,
)
from qmpsnap.hypervisor.machine.relocation.scene import Scene

# What is said about a node whatever its format, and what only qcow2 understands.
_OF_ANY = ("cache", "discard", "detect-zeroes", "read-only", "auto-read-only")
_OF_QCOW2 = (
    "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size", "cache-size",
    "cache-clean-interval", "lazy-refcounts", "overlap-check", "pass-discard-request",
    "pass-discard-snapshot", "pass-discard-other", "discard-no-unref",
)  # fmt: skip
_OF_DRIVE = (
    "if", "id", "index", "bus", "unit", "media", "node-name", "aio", "werror", "rerror",
    "readonly", "copy-on-read", "throttling", "stats-account-invalid", "stats-account-failed",
    "bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr", "bps_max", "bps_rd_max",
    "bps_wr_max", "iops_max", "iops_rd_max", "iops_wr_max", "iops_size", "group",
    *_OF_ANY,
)  # fmt: skip
_NO_CHILD = frozenset({"node-name", "driver", "filename", "id", "path", "export", "host", "port"})
_NO_STORAGE = frozenset({"null-co", "null-aio"})


@dataclass(slots=True)
class Graph:
    """The nodes that -blockdev options make, and what becomes of each."""

    nodes: dict[str, Blockdev]
    dropped: set[str] = field(default_factory=set)
    sealed: set[str] = field(default_factory=set)  # opened read-only from now on

    def children(self, name: str) -> list[str]:
        """The nodes that *name* refers to by their names."""
        return [
            value
            for key, value in self.nodes[name].fields
            if isinstance(value, str)
            and value in self.nodes
            and key.rpartition(".")[2] not in _NO_CHILD
        ]


def planned(line: CommandLine, disks: Mapping[str, Path], notes: list[str]) -> Graph:
    """What becomes of each node of *line* when *disks* are on new images.

    Raises Blocked, naming the device, for a disk that would be written in its old place.
    """
    views = (Blockdev.of(option) for option in line.all("blockdev"))
    graph = Graph({view.node_name: view for view in views if view.node_name})
    referred = {child for name in graph.nodes for child in graph.children(name)}
    tops = {name: list(_users(line, name)) for name in graph.nodes}
    roots = [name for name in graph.nodes if tops[name] or name not in referred]
    kept = _reached(graph, roots, disks)
    graph.dropped = set(graph.nodes) - kept
    for root in roots:
        _guard(graph, root, tops[root], disks, notes)
    return graph


def blockdev(graph: Graph, scene: Scene, option: Option) -> list[Option]:
    """-blockdev: a disk is on its overlay, what lay under it is left out, the rest is read."""
    view = Blockdev.of(option)
    name = view.node_name
    if name is None or name in graph.dropped:
        return []
    if name in scene.disks:
        return [option_of("blockdev", _overlaid(graph, scene, name))]
    fields = view.fields
    for key, value in view.fields:
        if key.rpartition(".")[2] == "filename" and isinstance(value, str):
            fields = fields.set(key, _image(scene, value, f"node {name}"))
    if name in graph.sealed and not view.read_only:
        fields = fields.set("read-only", True if fields.json else "on")
    return [option_of("blockdev", fields)]


def drive(scene: Scene, index: int, option: Option) -> list[Option]:
    """-drive and its short forms: on the overlay if it is a disk, else read where it is.

    Raises Blocked for a drive that would be written in its old place.
    """
    slot = next(slot for slot in slots(scene.line) if slot.index == index)
    view = slot.drive
    if slot.key in scene.disks:
        return [option_of("drive", _overlaid_drive(scene, slot))]
    fields = view.fields
    if fields.has("file") and not view.read_only:
        raise Blocked(f"{_title(slot)}: writable, and not among the disks of the snapshot")
    for key in ("file", "file.filename"):
        if name := fields.get(key):
            fields = fields.set(key, _image(scene, name, _title(slot)))
    return [option_of("drive", fields)] if fields.pairs != view.fields.pairs else [option]


def _overlaid(graph: Graph, scene: Scene, name: str) -> Fields:
    old = graph.nodes[name].fields
    beneath = old.below("file")
    child = old.get("file")
    if child in graph.dropped:
        beneath = graph.nodes[child].fields
    new = Fields((("driver", "qcow2"), ("node-name", name)), json=old.json)
    new = new.set("file.driver", "file").set("file.filename", str(scene.disks[name]))
    for key in ("aio", "cache"):
        for inner, value in beneath.keep(lambda it, key=key: it.split(".")[0] == key):  # type: ignore[misc]
            new = new.set(f"file.{inner}", value)
    if (aio := old.get("aio")) is not None:
        new = new.set("file.aio", aio)
    kept = _OF_ANY + (_OF_QCOW2 if old.get("driver") == "qcow2" else ())
    new = new.merged(old.keep(lambda key: key.split(".")[0] in kept))
    if old.has("encrypt"):
        scene.note(f"node {name}: was encrypted; its restored image is opened without a key")
    return new


def _overlaid_drive(scene: Scene, slot: Slot) -> Fields:
    view = slot.drive
    wanted = _OF_DRIVE + (_OF_QCOW2 if view.format == "qcow2" else ())
    fields = view.fields.keep(lambda key: key.split(".")[0] in wanted)
    left = {key for key, _ in view.fields if key.split(".")[0] not in wanted}
    if odd := sorted(left - {"file", "format", "driver", "file.filename", "file.driver"}):
        scene.note(f"{_title(slot)}: left out {', '.join(odd)}")
    if (aio := view.fields.get("file.aio")) is not None:
        fields = fields.default("aio", aio)
    return fields.set("file", str(scene.disks[slot.key])).set("format", "qcow2")


def _reached(graph: Graph, roots: list[str], disks: Mapping[str, Path]) -> set[str]:
    seen: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name not in disks:  # an overlay has all that is beneath it in its own file
            waiting += graph.children(name)
    return seen


def _guard(
    graph: Graph, root: str, users: list[Option], disks: Mapping[str, Path], notes: list[str]
) -> None:
    reads = bool(users) and all(_reads_only(option) for option in users)
    for path in _paths(graph, root, disks):
        first = next((i for i, name in enumerate(path) if graph.nodes[name].read_only), None)
        if first is None and users and not reads:
            who = Device.of(users[0]) if users[0].name == "device" else None
            title = f"device {who.id or who.driver}" if who else str(users[0])
            raise Blocked(
                f"{title}: node {root} is writable, and not among the disks of the snapshot"
            )
        if first is None:
            notes.append(f"node {root}: opened read-only, as it is not among the disks")
        graph.sealed.update(path[first or 0 :])


def _paths(
    graph: Graph, name: str, disks: Mapping[str, Path], above: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """The ways from *name* down to storage that is no disk of ours."""
    here = (*above, name)
    if name in disks or graph.nodes[name].driver in _NO_STORAGE:
        return
    children = graph.children(name)
    if not children:
        yield here
    for child in children:
        yield from _paths(graph, child, disks, here)


def _users(line: CommandLine, name: str) -> Iterator[Option]:
    for option in line.all("device", "machine", "M", "drive"):
        # drive=, the floppies' driveA=, the machine's pflash0=, and what -drive builds upon
        said = [key for key, value in fields_of(option) if value == name]
        if any(key.startswith(("drive", "pflash", "file")) and key != "driver" for key in said):
            yield option


def _reads_only(option: Option) -> bool:
    return option.name == "device" and (Device.of(option).driver or "").endswith("-cd")


def _image(scene: Scene, name: str, title: str) -> str:
    if name.startswith("/dev/fdset/"):
        raise Blocked(f"{title}: was given an open descriptor, which a restore cannot give")
    return scene.image(name)


def _title(slot: Slot) -> str:
    view: Drive = slot.drive
    return f"drive {view.id or slot.backend} ({view.file})"
