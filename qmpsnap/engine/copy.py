"""The copy of one frozen disk: a full one, or what changed since a point."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.engine.capture import Report
from qmpsnap.engine.frozen import reading, while_qemu_lives
from qmpsnap.engine.plan import PlannedDisk
from qmpsnap.engine.recover import CHANGES
from qmpsnap.engine.room import reserve
from qmpsnap.engine.sealing import Sealing, sealed_copy
from qmpsnap.engine.wishes import Copying, Level
from qmpsnap.errors import JobFailed, LocalFailed, VmBusy
from qmpsnap.host import qemu_img
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.hypervisor.nbd import dirty
from qmpsnap.store import copying, increment
from qmpsnap.store.image import examine_image
from qmpsnap.store.manifest import SEALED, Image, Means
from qmpsnap.store.points import Points
from qmpsnap.store.sealed import opened_sealed
from qmpsnap.store.sealedimages import opened_chain, role

log = logging.getLogger(__name__)
Ranges = list[tuple[int, int]]
"""Offsets and lengths in bytes, in order, none touching the next."""


@dataclass(frozen=True, slots=True)
class Copied:
    """The image that was written of one disk, whole and durable."""

    image: Image
    means: Means
    bytes_written: int
    instead: str = ""
    """Why it is a full where an increment was planned; empty if it is what was planned."""


async def copied(
    monitor: Monitor,
    disk: PlannedDisk,
    folder: Path,
    points: Points,
    how: Copying,
    report: Report,
    *,
    sockets: Path,
    asked: Level,
    sealing: Sealing | None = None,
) -> Copied:
    """Write the image of *disk*, whose chain is frozen, into *folder*, as its level says.

    Where `auto` was *asked* for and the changes cannot be read, it is a full. *sockets* is a
    folder that is ours alone. Where the image is to be encrypted, *sealing* says with what.

    Raises LocalFailed, JobFailed, CommandRefused, MonitorLost, and for points beneath KeyMissing
    and NotAuthentic; what was written by then stays for the caller to remove.
    """
    instead = ""
    what = f"copying {disk.site.name}"

    def tell(done: int, total: int, _: str = "") -> None:
        report(what, done, total)

    ranges: Ranges | None = None
    if disk.chosen.level is not Level.FULL:
        try:
            ranges = await _changes(monitor, disk, points, sockets, sealing)
        except VmBusy as busy:  # not Refused: by now the guest was touched
            instead = str(busy)
            if asked is not Level.AUTO:
                raise JobFailed(f"disk {disk.site.name}: {busy}", hint=busy.hint) from busy
            log.warning("disk %s: a full instead: %s", disk.site.name, busy)
    if disk.chosen.sealed:
        assert sealing is not None
        path, means, written = await sealed_copy(
            monitor, disk, ranges, folder, how, tell, sockets, sealing
        )
        image = await asyncio.to_thread(_examined, path, disk, sealing)
        return Copied(image, means, written, instead)
    if ranges is None:
        path, format, means, written = await _full(monitor, disk, folder, how, tell)
    else:
        path, format, means, written = await _increment(
            monitor, disk, ranges, folder, points, how, tell, sockets
        )
    health = await qemu_img.check(path, format)
    if health.corruptions:
        raise LocalFailed(f"{path}: qemu-img finds {health.corruptions} corruptions in the copy")
    size = disk.site.disk.top.virtual_size
    image = await asyncio.to_thread(examine_image, path, format, size)
    return Copied(image, means, written, instead)


def _examined(path: Path, disk: PlannedDisk, sealing: Sealing) -> Image:
    size = disk.site.disk.top.virtual_size
    with opened_sealed(path, sealing.keys, role(sealing.vm, path)) as image:
        return examine_image(path, SEALED, size, key=image.key)


async def _full(
    monitor: Monitor,
    disk: PlannedDisk,
    folder: Path,
    how: Copying,
    tell: Callable[[int, int, str], None],
) -> tuple[Path, str, Means, int]:
    chain, source = disk.site.disk.chain, Path(disk.site.paths[0])
    format = chain[0].driver if chain[0].driver in {"qcow2", "raw"} else "raw"
    if len(chain) > 1 or how.compress:
        path, size = folder / f"{disk.label}.qcow2", disk.site.disk.top.virtual_size
        await asyncio.to_thread(_refuse_full, disk, folder)
        await qemu_img.convert(
            source,
            format,
            path,
            "qcow2",
            lambda part: tell(int(part * size), size, ""),
            force_share=True,
            compress=how.compress,
            rate=how.limit,
        )
        return path, "qcow2", "convert", await asyncio.to_thread(_on_disk, path)
    path = folder / f"{disk.label}.{format}"
    done = await while_qemu_lives(
        monitor,
        lambda stop: copying.copy(
            source,
            path,
            limit=how.limit,
            reserve=reserve(disk, folder),
            cancelled=stop,
            on_progress=tell,
        ),
    )
    if format == "qcow2":
        await qemu_img.strip_bitmaps(path)
    return path, format, done.means, done.bytes_written


def _on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def _refuse_full(disk: PlannedDisk, folder: Path) -> None:
    """qemu-img looks after no reserve: what it could write at most has to fit beforehand."""
    needed = sum(node.actual_size for node in disk.site.disk.chain)
    free, spare = shutil.disk_usage(folder).free, reserve(disk, folder)
    if needed + spare > free:
        raise LocalFailed(
            f"{folder}: no room for a copy of {disk.site.name}: {needed} bytes and {spare} to "
            f"spare are needed, {free} are free"
        )


async def _changes(
    monitor: Monitor, disk: PlannedDisk, points: Points, sockets: Path, sealing: Sealing | None
) -> Ranges:
    """What differs from the point that *disk* is to stand on. Raises VmBusy, LocalFailed."""
    since = disk.chosen.since
    assert since is not None
    ranges = await dirty.changed(
        monitor,
        sockets / CHANGES,
        disk.site.disk.top.name,
        bitmap=since.bitmap,
        layers=since.layers,
    )
    if since.point is not disk.chosen.beneath:
        ranges = merged([*ranges, *await _between(points, disk, sealing)])
    return ranges


async def _increment(
    monitor: Monitor,
    disk: PlannedDisk,
    ranges: Ranges,
    folder: Path,
    points: Points,
    how: Copying,
    tell: Callable[[int, int, str], None],
    sockets: Path,
) -> tuple[Path, str, Means, int]:
    beneath = disk.chosen.beneath
    assert beneath is not None
    backing = points.images(beneath, disk.label)[0]
    path = folder / f"{disk.label}.qcow2"
    async with reading(disk, sockets) as reader:
        written = await while_qemu_lives(
            monitor,
            lambda stop: increment.write(
                path,
                virtual_size=disk.site.disk.top.virtual_size,
                backing=_spelled(Path(backing.path), folder, beneath.folder),
                backing_format=backing.format,
                extents=ranges,
                read=reader.read_all,
                limit=how.limit,
                reserve=reserve(disk, folder),
                cancelled=stop,
                on_progress=tell,
            ),
        )
    if how.compress:
        written = await _compressed(path, backing, how)
    return path, "qcow2", "increment", written


async def _compressed(path: Path, backing: Image, how: Copying) -> int:
    plain = path.with_name(f"{path.name}.plain")
    await asyncio.to_thread(path.rename, plain)
    header = await qemu_img.info(plain, "qcow2")
    await qemu_img.convert(
        plain, "qcow2", path, "qcow2", compress=True, rate=how.limit,
        backing=(header.backing_as_written or backing.path, backing.format),
    )  # fmt: skip
    await asyncio.to_thread(plain.unlink)
    return await asyncio.to_thread(_on_disk, path)


async def _between(points: Points, disk: PlannedDisk, sealing: Sealing | None) -> Ranges:
    """What the increments between the point that the changes count from and the full wrote."""
    since, beneath = disk.chosen.since, disk.chosen.beneath
    assert since is not None
    assert beneath is not None
    chain = points.images(since.point, disk.label)
    depth = len(chain) - len(points.images(beneath, disk.label))
    if disk.chosen.sealed:
        assert sealing is not None
        return await asyncio.to_thread(_held, sealing, chain[:depth], chain[depth])
    found = await qemu_img.allocated(Path(chain[0].path), chain[0].format, depth)
    return merged(found)


def _held(sealing: Sealing, images: list[Image], beneath: Image) -> Ranges:
    with opened_chain(sealing.vm, images, beneath, sealing.keys) as chain:
        return chain.extents(zeros=True)


def merged(ranges: Ranges) -> Ranges:
    """*ranges* in order, those that touch or overlap made one."""
    found: Ranges = []
    for offset, length in sorted(ranges):
        if found and offset <= sum(found[-1]):
            start = found[-1][0]
            found[-1] = (start, max(sum(found[-1]), offset + length) - start)
        else:
            found.append((offset, length))
    return found


def _spelled(image: Path, folder: Path, parent: Path) -> str:
    """A backing file's name: relative within the local root, so that the root can be moved."""
    return os.path.relpath(image, folder) if image.parent == parent else str(image)


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for sockets: a path that is short enough for one, and ours alone."""
    folder = Path(tempfile.mkdtemp(prefix="qmpsnap-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
