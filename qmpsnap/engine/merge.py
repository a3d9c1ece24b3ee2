"""Images that only an expired point still had go up into the one point that stands on them.

A merge writes the new image beside the old one, proves that it reads the same, says in
`merged.json` what it is going to be, and only then gives it the old one's name: `store.points`
believes `merged.json` only where the new image is, so that the chain is whole at every moment.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from qmpsnap.engine.capture import Report
from qmpsnap.errors import BaseChanged, DamagedData, DigestMismatch, LocalFailed
from qmpsnap.host import qemu_img
from qmpsnap.host.priority import in_background
from qmpsnap.store import copying, digests, files, image, sink
from qmpsnap.store.layout import DIGESTS, MERGED, PARTIAL
from qmpsnap.store.manifest import Disk, Image, Merged, Replacement, decode, encode
from qmpsnap.store.points import Point, Points

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """On disk *label*, *top* takes in the images of *expired*, nearest first, and stands on
    *beneath* then, or on nothing."""

    label: str
    top: str
    expired: tuple[str, ...]
    beneath: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """*stuck*: the expired points whose images have to stay, and why."""

    runs: list[Run]
    stuck: dict[str, str]

    def into(self, name: str) -> list[str]:
        """The points that take in the images of the expired point *name*."""
        return sorted({run.top for run in self.runs if name in run.expired})


def plan(points: Points, expired: Collection[str], standing: Mapping[str, str]) -> Plan:
    """What to merge so that as many as possible of the *expired* points are needed no more.

    An expired point goes only if one other point stands on it, on each disk that it is needed for.
    *standing*: the points that restored machines stand on, and what to say of it. While a point
    cannot be read, none goes: it may stand on any of them.
    """
    if points.damaged:
        told = "; ".join(f"what {name} stands on cannot be read" for name in points.damaged)
        return Plan([], dict.fromkeys(expired, told))
    needed = points.needed({point.name for point in points} - set(expired))
    going = [name for name in points.by_name if name in needed and name in expired]
    successors = _successors(points, needed)
    stuck = {name: why for name in going if (why := _hindrance(points, name, successors, standing))}
    while True:
        goes = {name for name in going if name not in stuck}
        runs = _runs(points, goes, successors)
        blocked = {
            run.expired[0]: f"{run.top} stands on it, and {standing[run.top]}"
            for run in runs
            if run.top in standing
        }
        if not blocked:
            return Plan(runs, stuck)
        stuck |= blocked


_Successors = Mapping[tuple[str, str], list[str]]


def _successors(points: Points, needed: Collection[str]) -> _Successors:
    """The needed points that stand on a point, by its name and the disk's label."""
    found: dict[tuple[str, str], list[str]] = {}
    for point in points:
        for disk in point.storage.disks if point.name in needed else []:
            if disk.parent is not None:
                found.setdefault((disk.parent, disk.label), []).append(point.name)
    return found


def _hindrance(
    points: Points, name: str, successors: _Successors, standing: Mapping[str, str]
) -> str:
    """Why the images of the expired point *name* cannot go up; empty if they can."""
    if name in standing:
        return standing[name]
    for disk in points.by_name[name].storage.disks:
        above = successors.get((name, disk.label), [])
        if not above:
            continue
        told = f"disk {disk.device} of {', '.join(above)} stands on it"
        if disk.level == "overlay":
            return f"{told}, and its files are the VM's own, frozen"
        if len(above) > 1:
            return told.replace("stands", "stand")
        upper = points.by_name[above[0]].disk(disk.label)
        if upper is None or len(upper.chain) != 1 or len(disk.chain) != 1:
            return f"{told}, and is of several files"
        if upper.virtual_size_bytes != disk.virtual_size_bytes:
            return f"{told}, and is of another size"
    return ""


def _runs(points: Points, goes: Collection[str], successors: _Successors) -> list[Run]:
    runs = []
    for (parent, label), above in successors.items():
        # the run's top is the point that stays; a run is told from there
        if parent not in goes or above[0] in goes:
            continue
        expired: list[str] = []
        beneath: str | None = parent
        while beneath is not None and beneath in goes:
            expired.append(beneath)
            disk = points.by_name[beneath].disk(label)
            beneath = disk.parent if disk is not None else None
        runs.append(Run(label, above[0], tuple(expired), beneath))
    return runs


async def merge(points: Points, top: Point, runs: Collection[Run], report: Report) -> None:
    """Do all *runs* of the point *top*. A crash anywhere leaves every point as readable as before.

    Raises DamagedData before anything is changed when one of the images is not what it was, and
    LocalFailed; the old images are there then, under their names.
    """
    for name in {top.name, *(name for run in runs for name in run.expired)}:
        await in_background(_expect_sound, points.by_name[name], report)
    new = {run: Path(_own(top, run.label).path + PARTIAL) for run in runs}
    try:
        for run, path in new.items():
            await _build(points, top, run, path, report)
    except BaseException:
        for path in new.values():
            _sweep(path)
        raise
    for run, path in new.items():
        await asyncio.to_thread(_swap, top, run, path)
    await in_background(_hash, top, report)


def _expect_sound(point: Point, report: Report) -> None:
    """What has rotted must not be hashed anew, and called sound from then on."""
    for one in (one for disk in _copied(point) for one in disk.chain):
        if difference := image.changed(one):
            raise BaseChanged(f"{point.storage.vm} {point.name}: {difference}")
    if (point.folder / DIGESTS).exists():
        tell = partial(_told, report, f"checking {point.name}")
        for _, what in digests.check(point.folder, _written(point), tell):
            raise DigestMismatch(what)


def _told(report: Report, words: str, done: int, total: int, what: str) -> None:
    report(words, done, total)


async def _build(points: Points, top: Point, run: Run, new: Path, report: Report) -> None:
    """The image *new*, durable, which reads as *top*'s own does on all that is beneath it."""
    old, disk = Path(_own(top, run.label).path), _disk(top, run.label)
    size = disk.virtual_size_bytes

    def tell(part: float) -> None:
        report(f"merging {disk.device} into {top.name}", int(part * size), size)

    _sweep(new)
    sources = [top, *(points.by_name[name] for name in run.expired)]
    room = sum(_allocated(Path(_own(one, run.label).path)) for one in sources)
    await asyncio.to_thread(sink.expect_room, new, room, 0)
    if run.beneath is None:
        await qemu_img.convert(old, "qcow2", new, "qcow2", tell)
    else:
        backing, format = _backing(points.by_name[run.beneath], run.label, old.parent)
        await _copy(old, new)
        await qemu_img.rebase(new, backing, format, tell)
    health = await qemu_img.check(new, "qcow2")
    if health.corruptions or health.leaks:
        raise LocalFailed(f"{new}: qemu-img check: {health}")
    if not await qemu_img.same(old, new, "qcow2"):
        raise LocalFailed(f"{new}: does not read as {old} does: it is not used")


async def _copy(src: Path, dst: Path) -> None:
    left = threading.Event()
    work = partial(copying.copy, src, dst, limit=None, reserve=0, on_progress=None)
    try:
        await in_background(work, cancelled=left.is_set)
    finally:
        left.set()


def _backing(beneath: Point, label: str, folder: Path) -> tuple[str, str]:
    """Name and format of what the new image stands on, as they are written into it."""
    disk = _disk(beneath, label)
    path = disk.chain[0].path
    # our own images are found wherever the local root is; a VM's file is where it is
    name = path if disk.level == "overlay" else os.path.relpath(path, folder)
    return name, disk.chain[0].format


def _swap(top: Point, run: Run, new: Path) -> None:
    """*new* takes the old image's name, and `merged.json` tells of it."""
    disk, old = _disk(top, run.label), Path(_own(top, run.label).path)
    path = top.folder / MERGED
    was: dict[str, Replacement] = {}
    if path.exists():
        was = decode(files.read_small(path, side=LocalFailed), Merged, path).disks
    now = image.examine_image(new, "qcow2", disk.virtual_size_bytes)
    with files.told(old, LocalFailed):
        inode = old.stat().st_ino
    replacement = Replacement(
        image=msgspec.structs.replace(now, path=str(old)),
        instead_of=inode,
        parent=run.beneath,
        before=_in_force(was.get(run.label), inode),
    )
    merged = Merged(point=top.name, disks=was | {run.label: replacement})
    with files.told(top.folder, LocalFailed):
        # what it says is not so from here on; `finish` and `_hash` say it anew
        (top.folder / DIGESTS).unlink(missing_ok=True)
        files.sync_folder(top.folder)
        files.replace(path, encode(merged), side=LocalFailed)
        new.rename(old)
        files.sync_folder(top.folder)


def _in_force(was: Replacement | None, inode: int) -> Replacement | None:
    """What is so of the image that is there now; of an earlier one nobody needs to know."""
    if was is not None and was.instead_of == inode:
        return was.before  # cut off: it never came to be
    return msgspec.structs.replace(was, before=None) if was is not None else None


def _hash(point: Point, report: Report) -> None:
    tell = partial(_told, report, f"hashing {point.name}")
    digests.take(point.folder, point.name, _written(point), tell, anew=True)


def finish(points: Points, report: Report) -> None:
    """End the merges that a crash has cut off: what they left is swept, digests are taken again.

    Raises LocalFailed.
    """
    for point in points:
        images = [point.folder / name for name in _written(point)]
        left = [path for one in images for path in _leavings(Path(f"{one}{PARTIAL}"))]
        merged = (point.folder / MERGED).exists()
        if (left or merged) and not (point.folder / DIGESTS).exists():
            _hash(point, report)
        for path in left:
            log.warning("%s: left behind by a merge that was cut off", path)
            _sweep(path)


def _written(point: Point) -> list[str]:
    """The names of the images that *point* has written itself."""
    return [Path(one.path).name for disk in _copied(point) for one in disk.chain]


def _copied(point: Point) -> list[Disk]:
    return [disk for disk in point.storage.disks if disk.level != "overlay"]


def _disk(point: Point, label: str) -> Disk:
    if (disk := point.disk(label)) is None:
        raise DamagedData(f"{point.storage.vm} {point.name} has no disk {label}")
    return disk


def _own(point: Point, label: str) -> Image:
    return _disk(point, label).chain[0]


def _leavings(new: Path) -> list[Path]:
    """What a merge may leave: the new image, and the beginning of the copy that it begins as."""
    return [path for path in (new, Path(f"{new}{PARTIAL}")) if path.exists()]


def _sweep(new: Path) -> None:
    for path in _leavings(new):
        with files.told(path, LocalFailed):
            path.unlink(missing_ok=True)


def _allocated(path: Path) -> int:
    with files.told(path, LocalFailed):
        return path.stat().st_blocks * 512
