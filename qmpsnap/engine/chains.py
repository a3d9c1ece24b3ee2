"""Looking at the images of a snapshot, whatever they stand on: whole, unchanged, on one another."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import msgspec

from qmpsnap.errors import UNREADABLE, DamagedData, LocalFailed, SnapError
from qmpsnap.host import qemu_img
from qmpsnap.host.priority import in_background, stoppable
from qmpsnap.store import digests, image, points, sealedimages
from qmpsnap.store.files import Progress, told
from qmpsnap.store.layout import DIGESTS, STORAGE, LocalRoot
from qmpsnap.store.manifest import Image
from qmpsnap.store.points import Point, Points
from qmpsnap.store.secret import Keys
from qmpsnap.store.secretring import SecretRing

Tell = Callable[[int, int], None]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong: *what*, with the file or half that it is about."""

    where: str
    what: str


@dataclass(frozen=True, slots=True)
class _Local:
    """The points that can be read, and what is wrong with the folders of the others."""

    points: Points
    broken: dict[str, str]


async def check(
    root: LocalRoot, vm: str, id: str, tell: Tell, keys: SecretRing | None = None
) -> list[Finding]:
    """What is wrong with the images of the snapshot *id*, of all its revisions.

    Every image is looked at once, also those of the points beneath: that it is the file that was
    frozen or written, that its tables are sound, and that it names the one beneath it. Of one that
    is encrypted, every frame is decrypted if its key is among *keys*.

    Raises LocalFailed when the folders themselves cannot be read.
    """
    local = await asyncio.to_thread(_read, root, vm)
    own = await asyncio.to_thread(_own, root, vm, id)
    findings = [
        Finding(where=name, what=local.broken[name]) for name in own if name in local.broken
    ]
    chains: dict[tuple[Image, ...], str] = {}
    for name in own:
        if (point := local.points.by_name.get(name)) is None:
            continue
        for disk in point.storage.disks:
            try:
                chain = tuple(local.points.images(point, disk.label))
            except DamagedData as damaged:
                findings.append(Finding(where=f"disk {disk.device}", what=str(damaged)))
                findings += _beneath(local, point, disk.label)
                continue
            chains.setdefault(chain, f"disk {disk.device}")
    findings += await _digests(local, set(own), tell)
    seen: set[tuple[Image, Image | None]] = set()
    for chain, where in chains.items():
        for one, beneath in zip_longest(chain, chain[1:]):
            if (one, beneath) not in seen:
                seen.add((one, beneath))
                wrong = await _image(vm, one, beneath, keys)
                findings += [Finding(where=where, what=what) for what in wrong]
    return _once(findings)


async def keys_of(root: LocalRoot, vm: str, id: str) -> list[str]:
    """The IDs of the keys that images of the snapshot *id* are encrypted with, or those beneath.

    Raises LocalFailed.
    """
    local = await asyncio.to_thread(_read, root, vm)
    own = {name for name in local.points.by_name if name.partition("/")[0] == id}
    points = [local.points.by_name[name] for name in sorted(local.points.needed(own))]
    return list(dict.fromkeys(key for point in points for key in point.storage.keys))


def _read(root: LocalRoot, vm: str) -> _Local:
    """Unlike `points.read`, what is damaged does not hide what is not."""
    found: dict[str, Point] = {}
    broken: dict[str, str] = {}
    with told(root.path, LocalFailed):
        folders = [name for id in root.ids(vm) for name in _own(root, vm, str(id))]
    for name in folders:
        folder = root.point(vm, name)
        try:
            point = points.read_one(folder)
        except SnapError as wrong:
            broken[name] = str(wrong)
            continue
        if point is None:
            if (folder / DIGESTS).exists():
                broken[name] = f"{folder / STORAGE}: is missing"
            continue
        if (point.storage.vm, point.name) != (vm, name):
            broken[name] = f"{folder}: is of {point.storage.vm} {point.name}"
            continue
        found[name] = point
    return _Local(Points(vm, found), broken)


def _own(root: LocalRoot, vm: str, id: str) -> list[str]:
    """The names of the snapshot and of its revisions, sealed or not."""
    with told(root.snapshot(vm, id), LocalFailed):
        return [id, *(f"{id}/{revision}" for revision in root.revisions(vm, id))]


def _beneath(local: _Local, point: Point, label: str) -> list[Finding]:
    """Why the chain of *label* ends: the point where it does may be there, and damaged."""
    passed: set[str] = set()
    while (disk := point.disk(label)) is not None and disk.parent not in {None, *passed}:
        name = str(disk.parent)
        if name in local.broken:
            return [Finding(where=name, what=local.broken[name])]
        if (beneath := local.points.by_name.get(name)) is None:
            break
        passed.add(name)
        point = beneath
    return []


async def _digests(local: _Local, own: set[str], tell: Tell) -> list[Finding]:
    over = threading.Event()

    def told_so_far(done: int, total: int, _what: str) -> None:
        if over.is_set():  # whoever waited for this is gone: the thread ends, too
            raise LocalFailed("broken off")
        tell(done, total)

    try:
        return await in_background(_digested, local, own, told_so_far)
    finally:
        over.set()


def _digested(local: _Local, own: set[str], tell: Progress) -> list[Finding]:
    found = []
    for name in sorted(local.points.needed(own)):
        point = local.points.by_name[name]
        written = {
            Path(disk.chain[0].path).name: disk
            for disk in point.storage.disks
            if disk.level != "overlay"
        }
        if not written:
            continue
        for file, what in digests.check(point.folder, list(written), tell):
            where = f"disk {written[file].device}" if file in written else f"{name}/{file}"
            found.append(Finding(where=where, what=what))
    return found


async def _image(vm: str, one: Image, beneath: Image | None, keys: SecretRing | None) -> list[str]:
    try:
        if (difference := await asyncio.to_thread(image.changed, one)) is not None:
            return [difference]
        if one.key is not None:
            if keys is not None and await asyncio.to_thread(keys.has, one.key):
                await stoppable(lambda stop: _decrypted(vm, one, beneath, keys, stop))
            return []
        if beneath is not None and beneath.key is not None:
            return [f"{one.path}: is {one.format}, on {beneath.path}, which is encrypted"]
        if one.format != "qcow2":
            return [] if beneath is None else [f"{one.path}: is {one.format}, on {beneath.path}"]
        # the VM has it open beneath its overlay: look without taking its locks
        health = await qemu_img.check(Path(one.path), one.format, force_share=True)
        found = [f"{one.path}: qemu-img check: {health.corruptions} corruptions"]
        return (found if health.corruptions else []) + await _header(one, beneath)
    except SnapError as failed:
        return [str(failed)]


def _decrypted(
    vm: str, one: Image, beneath: Image | None, keys: Keys, stop: Callable[[], bool]
) -> None:
    def on_bytes(_: int) -> None:
        if stop():
            raise LocalFailed("broken off")

    sealedimages.check(vm, one, beneath, keys, on_bytes)


async def _header(one: Image, beneath: Image | None) -> list[str]:
    """What the image itself says of its size and of what it stands on."""
    header = await qemu_img.info(Path(one.path), one.format)
    found = []
    if header.virtual_size_bytes != one.virtual_size_bytes:
        sizes = f"{header.virtual_size_bytes} bytes, not {one.virtual_size_bytes}"
        found.append(f"{one.path}: is of {sizes}")
    named = _file(header.backing or "")
    wanted = beneath.path if beneath is not None else ""
    if not await asyncio.to_thread(_same, named, wanted):
        found.append(f"{one.path}: stands on {named or 'nothing'}, not on {wanted or 'nothing'}")
    elif beneath is not None and header.backing_format not in (None, beneath.format):
        formats = f"{header.backing_format}, not {beneath.format}"
        found.append(f"{one.path}: takes {wanted} for {formats}")
    return found


def _same(one: str, other: str) -> bool:
    return one == other or bool(one and other and os.path.realpath(one) == os.path.realpath(other))


def _file(name: str) -> str:
    """The file that a backing string means, also where QEMU spelled it as JSON."""
    if not name.startswith("json:"):
        return name.removeprefix("file:")
    try:
        tree = json.loads(name.removeprefix("json:"))
    except UNREADABLE:
        return name
    while isinstance(tree, dict):
        tree = tree.get("file.filename") or tree.get("filename") or tree.get("file")
    return str(tree or name)


def _once(findings: Iterable[Finding]) -> list[Finding]:
    return list(dict.fromkeys(findings))
