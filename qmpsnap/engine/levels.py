"""Levels: for each disk the cheapest sound way to make its local half, and the reason for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.engine.survey import Site
from qmpsnap.engine.wishes import Level
from qmpsnap.errors import Blocked, HalfMissing, SnapError
from qmpsnap.hypervisor.block import bitmap
from qmpsnap.ids import NodeName
from qmpsnap.store import image
from qmpsnap.store.manifest import Disk
from qmpsnap.store.points import Point, Points
from qmpsnap.store.sealedimages import keys_of


@dataclass(frozen=True, slots=True)
class Since:
    """What tells the changes of a disk since *point*.

    Everything in the top *layers* images of its chain, and what *bitmap* (node, name) has
    recorded on the one beneath them; None when the point's own image lies there, frozen.
    """

    point: Point
    layers: int
    bitmap: tuple[NodeName, str] | None


@dataclass(frozen=True, slots=True)
class Chosen:
    """The *level* of one disk. *since*: what an increment or a differential takes its changes
    from; *beneath* is the point that it stands on, which for a differential is an older one.
    *sealed*: the image that is written is encrypted."""

    level: Level
    reason: str
    since: Since | None = None
    beneath: Point | None = None
    sealed: bool = False


def _is_here(key: str) -> bool:
    return True


def choose(
    asked: Level,
    site: Site,
    label: str,
    points: Points,
    *,
    under: str = "",
    sealed: bool | None = None,
    has: Callable[[str], bool] = _is_here,
) -> Chosen:
    """Decide for one disk; *under* is the snapshot that is refreshed, if one is.

    *sealed*: whether its image is to be encrypted; None: as what it stands on is. Only encrypted
    images stand on encrypted ones, whose keys have to be here: *has* tells.

    Raises Blocked where `inc` or `diff` was asked for and is not sound.
    """
    if asked is Level.OVERLAY:
        return Chosen(asked, "asked for")
    if asked is Level.FULL:
        return Chosen(asked, "asked for", sealed=bool(sealed))
    since, trouble = _since(site, label, points, under)
    if since is not None:
        beneath = keys_of(points.images(since.point, label))
        sealed = bool(beneath) if sealed is None else sealed
        if trouble := _unlike(since.point, beneath, has, sealed=sealed):
            since = None
    sealed = bool(sealed)
    if since is not None and asked is Level.DIFF:
        full = _last_full(points, since.point, label)
        if full is not None:
            return Chosen(Level.DIFF, f"changes since {full.name}", since, full, sealed)
        trouble = "no full is beneath it"
    if since is not None and asked is not Level.DIFF:
        return Chosen(Level.INC, f"changes since {since.point.name}", since, since.point, sealed)
    if asked is not Level.AUTO:
        raise Blocked(
            f"disk {site.name}: no {asked} is possible: {trouble}",
            hint="`--level auto` takes a full of the disks concerned",
        )
    return Chosen(Level.FULL, trouble, sealed=sealed)


def _unlike(point: Point, keys: list[str], has: Callable[[str], bool], *, sealed: bool) -> str:
    """Why an image that is *sealed*, or is not, cannot stand on *point*; empty if it can."""
    if bool(keys) != sealed:
        was, to_be = ("", "not ") if keys else ("not ", "")
        return f"{point.name} is {was}encrypted, and this one is {to_be}to be"
    missing = [key for key in keys if not has(key)]
    return (
        f"{point.name} is encrypted with the key {missing[0]}, which is not here" if missing else ""
    )


def _since(site: Site, label: str, points: Points, under: str) -> tuple[Since | None, str]:
    """The newest point that the changes since are known of; or why there is none."""
    copied = [one for one in points if is_copy(one.disk(label))]
    if copied:
        return _by_bitmap(site, label, points, copied[-1])
    refreshed = [one for one in points if one.storage.id == under and one.disk(label)]
    if refreshed:
        return _by_layers(site, label, points, refreshed[-1])
    return None, "the first copy of this disk"


def is_copy(disk: Disk | None) -> bool:
    """Whether a point has an image of its own of this disk."""
    return disk is not None and disk.level != "overlay"


def _by_bitmap(site: Site, label: str, points: Points, point: Point) -> tuple[Since | None, str]:
    disk = point.disk(label)
    assert disk is not None
    if trouble := _unfit(site, disk, points, point, label):
        return None, trouble
    if disk.bitmap is None:
        return None, f"{point.name} left no bitmap"
    standing, index, reason = bitmap.classify(site.disk.chain, disk.bitmap)
    if standing is not bitmap.Standing.RECORDING or index is None:
        return None, f"the bitmap of {point.name}: {reason}"
    node = site.disk.chain[index]
    if any(one.virtual_size != node.virtual_size for one in site.disk.chain[:index]):
        return None, "the disk was resized"
    return Since(point, index, (node.name, disk.bitmap)), ""


def _by_layers(site: Site, label: str, points: Points, point: Point) -> tuple[Since | None, str]:
    disk = point.disk(label)
    assert disk is not None
    if trouble := _unfit(site, disk, points, point, label):
        return None, trouble
    frozen = disk.chain[0].path
    if frozen not in site.paths:
        return None, f"the VM does not stand on {frozen} any more"
    return Since(point, site.paths.index(frozen), None), ""


def _unfit(site: Site, disk: Disk, points: Points, point: Point, label: str) -> str:
    """Why nothing can stand on *point*; empty if something can."""
    size = site.disk.top.virtual_size
    if disk.virtual_size_bytes != size:
        return f"the disk was resized from {disk.virtual_size_bytes} to {size} bytes"
    try:
        for one in points.images(point, label):
            if difference := image.changed(one):
                return difference
    except (HalfMissing, SnapError) as gone:
        return str(gone)
    return ""


def _last_full(points: Points, point: Point, label: str) -> Point | None:
    """The full that *point* stands on, or is."""
    at: Point | None = point
    while at is not None and (disk := at.disk(label)) is not None:
        if disk.level == "full":
            return at
        at = points.by_name.get(disk.parent) if disk.parent else None
    return None


def scratch(site: Site, node: NodeName, layers: Path) -> Path:
    """Where the overlay of a copy lies: beside the disk, so that its writes go where they went.

    A local root that is full or slow then never meets a write of the guest.
    """
    if site.beside is None:
        return layers / f"{node}.qcow2"
    return site.beside / f".qmpsnap-{node}.qcow2"


def newest_bitmaps(points: Iterable[Point]) -> set[str]:
    """The bitmaps that the next increments need."""
    newest: dict[str, str | None] = {}
    for point in points:
        for disk in point.storage.disks:
            if disk.level != "overlay":
                newest[disk.label] = disk.bitmap
    return {name for name in newest.values() if name is not None}
