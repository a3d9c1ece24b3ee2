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
from collections.abc import Collection
from functools import partial
from pathlib import Path

import msgspec

from qmpsnap.engine.capture import Report
from qmpsnap.engine.resealing import resealed
from qmpsnap.engine.runs import Run
from qmpsnap.errors import BaseChanged, DamagedData, DigestMismatch, LocalFailed
from qmpsnap.host import qemu_img
from qmpsnap.host.priority import in_background
from qmpsnap.store import copying, digests, files, image, sink
from qmpsnap.store.layout import DIGESTS, MERGED, PARTIAL
from qmpsnap.store.manifest import (
    Disk,
    Image,
    Merged,
    Replacement,
    decode,
    encode,
    version_of,
)
from qmpsnap.store.points import Point, Points
from qmpsnap.store.secret import Keys

log = logging.getLogger(__name__)


async def merge(
    points: Points, top: Point, runs: Collection[Run], report: Report, keys: Keys
) -> None:
    """Do all *runs* of the point *top*. A crash anywhere leaves every point as readable as before.

    Images that are encrypted are so afterwards, with the key of *top*'s own; *keys* are for them.

    Raises DamagedData before anything is changed when one of the images is not what it was, and
    LocalFailed, KeyMissing; the old images are there then, under their names.
    """
    for name in {top.name, *(name for run in runs for name in run.expired)}:
        await in_background(_expect_sound, points.by_name[name], report)
    new = {run: Path(_own(top, run.label).path + PARTIAL) for run in runs}
    try:
        for run, path in new.items():
            await _build(points, top, run, path, report, keys)
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


async def _build(
    points: Points, top: Point, run: Run, new: Path, report: Report, keys: Keys
) -> None:
    """The image *new*, durable, which reads as *top*'s own does on all that is beneath it."""
    old, disk = Path(_own(top, run.label).path), _disk(top, run.label)
    size = disk.virtual_size_bytes

    def tell(part: float) -> None:
        report(f"merging {disk.device} into {top.name}", int(part * size), size)

    _sweep(new)
    sources = [top, *(points.by_name[name] for name in run.expired)]
    room = sum(_allocated(Path(_own(one, run.label).path)) for one in sources)
    await asyncio.to_thread(sink.expect_room, new, room, 0)
    images = [_own(one, run.label) for one in sources]
    if images[0].key is not None:
        beneath = _own(points.by_name[run.beneath], run.label) if run.beneath else None
        tell_all = partial(_told, report, f"merging {disk.device} into {top.name}")
        await resealed(points.vm, images, beneath, new, keys, tell_all)
        return
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
    disk, own = _disk(top, run.label), _own(top, run.label)
    old, path = Path(own.path), top.folder / MERGED
    format = own.format if own.key is not None else "qcow2"
    was: dict[str, Replacement] = {}
    if path.exists():
        was = decode(files.read_small(path, side=LocalFailed), Merged, path).disks
    now = image.examine_image(new, format, disk.virtual_size_bytes, key=own.key)
    with files.told(old, LocalFailed):
        inode = old.stat().st_ino
    replacement = Replacement(
        image=msgspec.structs.replace(now, path=str(old)),
        instead_of=inode,
        parent=run.beneath,
        before=_in_force(was.get(run.label), inode),
    )
    disks = was | {run.label: replacement}
    version = version_of(one.image for one in disks.values())
    merged = Merged(version=version, point=top.name, disks=disks)
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
        if point.kept and not all(one.exists() for one in images):
            continue  # nobody stands on it: its removal was cut off, and is ended by the sweep
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
