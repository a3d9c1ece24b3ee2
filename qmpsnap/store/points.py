"""Points in time of one VM, and which stands on which: the only place that resolves chains."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from qmpsnap.errors import HalfMissing, LocalFailed, ManifestError
from qmpsnap.store.files import read_small, told
from qmpsnap.store.layout import KEPT, MERGED, STORAGE, LocalRoot
from qmpsnap.store.manifest import Disk, Image, Merged, Storage, decode


@dataclass(frozen=True, slots=True)
class Point:
    """A sealed local half, or a revision of one, in *folder*; merges are already applied.

    *kept*: it was deleted, and only its images are there, because others stand on them.
    """

    storage: Storage
    folder: Path
    kept: bool

    @property
    def name(self) -> str:
        return self.storage.point

    def disk(self, label: str) -> Disk | None:
        return next((disk for disk in self.storage.disks if disk.label == label), None)


@dataclass(frozen=True, slots=True)
class Points:
    """All points of a VM by name, in the order in which they were taken.

    *damaged*: those that cannot be read, by name, with the reason.
    """

    vm: str
    by_name: dict[str, Point]
    damaged: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.by_name.values())

    def images(self, point: Point, label: str) -> list[Image]:
        """What the disk *label* consists of at *point*, top first, down to the last image.

        Raises HalfMissing when a point on the way is gone.
        """
        found: list[Image] = []
        disk, name = point.disk(label), point.name
        while disk is not None:
            found += disk.chain
            if disk.parent is None:
                return found
            if len(found) > len(self.by_name) + len(disk.chain):
                raise ManifestError(f"{self.vm} {name}: its chain of parents is a circle")
            name = disk.parent
            beneath = self.by_name.get(name)
            disk = beneath.disk(label) if beneath is not None else None
        raise HalfMissing(f"{self.vm} {point.name}: disk {label} stands on {name}, which is gone")

    def standing_on(self, name: str) -> list[Point]:
        """The points that have *name* as the parent of one of their disks."""
        return [one for one in self if any(disk.parent == name for disk in one.storage.disks)]

    def needed(self, names: set[str]) -> set[str]:
        """*names*, and all that they stand on."""
        found: set[str] = set()
        waiting = [name for name in names if name in self.by_name]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                parents = (disk.parent for disk in self.by_name[name].storage.disks)
                waiting += [parent for parent in parents if parent in self.by_name]
        return found


def read(root: LocalRoot, vm: str) -> Points:
    """Every sealed point of *vm*. Raises LocalFailed when a folder cannot be read."""
    found: list[Point] = []
    damaged: dict[str, str] = {}
    with told(root.path, LocalFailed):
        ids = root.ids(vm)
    for id in ids:
        with told(root.snapshot(vm, id), LocalFailed):
            revisions = root.revisions(vm, id)
        for name in (str(id), *(f"{id}/{revision}" for revision in revisions)):
            try:
                point = read_one(root.point(vm, name))
            except ManifestError as wrong:
                damaged[name] = str(wrong)
                continue
            found += [point] if point is not None else []
    found.sort(key=lambda point: point.storage.taken_at)
    return Points(vm, {point.name: point for point in found}, damaged)


def read_one(folder: Path) -> Point | None:
    """The point in *folder*; None if none is sealed there. Raises LocalFailed, ManifestError."""
    for name in (STORAGE, KEPT):
        path = folder / name
        if os.path.lexists(path):
            storage = decode(read_small(path, side=LocalFailed), Storage, path)
            return Point(_as_merged(storage, folder), folder, kept=name == KEPT)
    return None


def _as_merged(storage: Storage, folder: Path) -> Storage:
    path = folder / MERGED
    if not os.path.lexists(path):
        return storage
    merged = decode(read_small(path, side=LocalFailed), Merged, path)
    if merged.point != storage.point:
        raise ManifestError(f"{path}: is of {merged.point}")
    disks = [_merged_disk(disk, merged) for disk in storage.disks]
    return msgspec.structs.replace(storage, disks=disks)


def _merged_disk(disk: Disk, merged: Merged) -> Disk:
    new = merged.disks.get(disk.label)
    if new is None:
        return disk
    # written before the new image takes the old one's name: until then the old one counts
    try:
        there = Path(new.image.path).stat().st_ino
    except OSError:
        there = new.image.inode
    if there == new.instead_of:
        if new.before is None:
            return disk
        new = new.before
    # what stands on nothing holds all, as a full does
    level = disk.level if new.parent is not None else "full"
    return msgspec.structs.replace(disk, chain=[new.image], parent=new.parent, level=level)
