"""Which level each disk gets, and why, from points and bitmaps made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qmpsnap.engine.levels import Chosen, choose, newest_bitmaps, scratch
from qmpsnap.engine.survey import Site
from qmpsnap.engine.wishes import Level
from qmpsnap.errors import Blocked
from qmpsnap.hypervisor.block.bitmap import Bitmap, name_of
from qmpsnap.hypervisor.block.graph import Disk, Node
from qmpsnap.ids import NodeName
from qmpsnap.store import manifest
from qmpsnap.store.image import examine_image
from qmpsnap.store.points import Point, Points

SIZE = 1 << 20
FULL, INC, REVISION = (f"20261122T16505712{n}Z" for n in (1, 2, 3))


def _node(name: str, *bitmaps: Bitmap, driver: str = "qcow2", size: int = SIZE) -> Node:
    return Node(
        name=NodeName(name),
        driver=driver,
        filename=name,
        read_only=False,
        virtual_size=size,
        actual_size=0,
        detect_zeroes="off",
        cache_direct=False,
        cache_no_flush=False,
        bitmaps=bitmaps,
    )


def _site(*chain: Node, beside: Path | None = None) -> Site:
    disk = Disk("", "/machine/peripheral/vda/virtio-backend", False, (), chain)
    paths = tuple(f"/images/{node.name}" for node in chain)
    return Site(disk, paths, len(chain) - 1, "d0", {}, beside)


def _bitmap(point: str, **odd: Any) -> Bitmap:
    fine = Bitmap(name_of("web", "vda", point), True, False, True, False, 0, 65536)
    return replace(fine, **odd)


@pytest.fixture
def points(tmp_path: Path) -> Points:
    """A full, and an increment that stands on it."""
    made = {}
    for number, (id, level, parent) in enumerate([(FULL, "full", None), (INC, "inc", FULL)]):
        folder = tmp_path / id
        folder.mkdir()
        path = folder / "vda.qcow2"
        path.write_bytes(bytes(64))
        disk = manifest.Disk(
            label="vda",
            device="vda",
            qdev=None,
            origin="d0",
            node="d0",
            role="disk",
            level=level,  # type: ignore[arg-type]
            virtual_size_bytes=SIZE,
            chain=[examine_image(path, "qcow2", SIZE)],
            overlay=None,
            parent=parent,
            bitmap=name_of("web", "vda", id),
            means="copy",
        )
        storage = manifest.Storage(
            id=id,
            vm="web",
            host="h",
            taken_at=f"2026-11-22T16:50:57.12{number}Z",
            revision=0,
            level=level,  # type: ignore[arg-type]
            disks=[disk],
            left_out=[],
        )
        made[id] = Point(storage, folder, False)
    return Points("web", made)


def _chosen(level: Level, site: Site, points: Points, **other: Any) -> Chosen:
    return choose(level, site, "vda", points, **other)


def test_an_increment_counts_from_the_newest_copy(points: Points) -> None:
    made = _chosen(Level.AUTO, _site(_node("d0", _bitmap(INC))), points)
    assert made.level is Level.INC
    assert made.since is not None
    assert made.beneath is made.since.point is points.by_name[INC]
    assert (made.since.layers, made.since.bitmap) == (0, ("d0", name_of("web", "vda", INC)))
    assert newest_bitmaps(points) == {name_of("web", "vda", INC)}


def test_overlays_since_then_are_changes_too(points: Points) -> None:
    made = _chosen(Level.INC, _site(_node("o2"), _node("o1"), _node("d0", _bitmap(INC))), points)
    assert made.since is not None
    assert (made.since.layers, made.since.bitmap) == (2, ("d0", name_of("web", "vda", INC)))


def test_a_differential_stands_on_the_full_and_counts_from_the_newest(points: Points) -> None:
    made = _chosen(Level.DIFF, _site(_node("d0", _bitmap(INC))), points)
    assert made.level is Level.DIFF
    assert made.since is not None
    assert (made.since.point.name, made.beneath and made.beneath.name) == (INC, FULL)


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        ([_node("d0")], "no bitmap"),
        ([_node("d0", _bitmap(FULL))], "no bitmap"),
        ([_node("d0", _bitmap(INC, inconsistent=True))], "QEMU was killed"),
        ([_node("d0", _bitmap(INC, busy=True))], "busy"),
        ([_node("d0", _bitmap(INC, recording=False))], "disabled"),
        ([_node("d0", _bitmap(INC, granularity=4096))], "granularity"),
        ([_node("d0", _bitmap(INC), size=2 * SIZE)], "resized"),
        ([_node("o1"), _node("d0", _bitmap(INC), size=SIZE // 2)], "resized"),
        ([_node("d0", driver="raw")], "end with QEMU"),
    ],
)
def test_an_unsound_chain_makes_a_full_and_says_why(
    points: Points, chain: list[Node], words: str
) -> None:
    made = _chosen(Level.AUTO, _site(*chain), points)
    assert (made.level, made.since, made.beneath) == (Level.FULL, None, None)
    assert words in made.reason
    for level in (Level.INC, Level.DIFF):
        with pytest.raises(Blocked, match=f"no {level} is possible"):
            _chosen(level, _site(*chain), points)


@pytest.mark.parametrize("change", ["gone", "written", "parent"])
def test_a_point_that_is_damaged_carries_nothing(points: Points, change: str) -> None:
    site = _site(_node("d0", _bitmap(INC)))
    assert _chosen(Level.AUTO, site, points).level is Level.INC
    image = points.by_name[FULL if change == "parent" else INC].folder / "vda.qcow2"
    if change == "written":
        image.write_bytes(bytes(65))
    else:
        image.unlink()
    assert _chosen(Level.AUTO, site, points).level is Level.FULL


def test_without_a_copy_the_first_one_is_full_and_overlay_is_only_asked_for() -> None:
    none, site = Points("web", {}), _site(_node("d0"))
    assert _chosen(Level.AUTO, site, none).level is Level.FULL
    assert _chosen(Level.OVERLAY, site, none).level is Level.OVERLAY
    assert _chosen(Level.FULL, site, none).reason == "asked for"


def test_only_a_refresh_stands_on_a_frozen_base(points: Points) -> None:
    frozen = points.by_name[FULL]
    base = frozen.folder / "d0"
    base.write_bytes(b"base")
    disk = msgspec.structs.replace(
        frozen.storage.disks[0], level="overlay", chain=[examine_image(base, "raw", SIZE)]
    )
    alone = Points(
        "web",
        {FULL: replace(frozen, storage=msgspec.structs.replace(frozen.storage, disks=[disk]))},
    )
    site = replace(_site(_node("o1"), _node("d0")), paths=("/layers/o1", str(base)))
    assert _chosen(Level.AUTO, site, alone).level is Level.FULL
    made = _chosen(Level.AUTO, site, alone, under=FULL)
    assert made.level is Level.INC
    assert made.since is not None
    assert (made.since.layers, made.since.bitmap) == (1, None)
    restarted = replace(site, paths=("/images/o1", "/images/other"))
    assert _chosen(Level.AUTO, restarted, alone, under=FULL).level is Level.FULL


def test_a_copy_keeps_the_guest_on_the_file_system_of_its_disk(tmp_path: Path) -> None:
    node, layers = NodeName(f"vda-{INC}"), tmp_path / "layers"
    beside = scratch(_site(_node("d0"), beside=tmp_path), node, layers)
    assert beside == tmp_path / f".qmpsnap-{node}.qcow2"
    assert scratch(_site(_node("d0")), node, layers) == layers / f"{node}.qcow2"


def _sealed(points: Points, key: str) -> Points:
    """The same, encrypted with *key*."""
    made = {}
    for name, point in points.by_name.items():
        disk = point.storage.disks[0]
        image = msgspec.structs.replace(disk.chain[0], format="sealed", key=key)
        disks = [msgspec.structs.replace(disk, chain=[image])]
        storage = msgspec.structs.replace(point.storage, disks=disks, version=2)
        made[name] = replace(point, storage=storage)
    return Points(points.vm, made)


def test_encrypted_stands_on_encrypted_only(points: Points) -> None:
    site, key = _site(_node("d0", _bitmap(INC))), "ab" * 8
    sealed = _sealed(points, key)
    for there, wanted, told in (
        (points, True, f"{INC} is not encrypted, and this one is to be"),
        (sealed, False, f"{INC} is encrypted, and this one is not to be"),
    ):
        made = _chosen(Level.AUTO, site, there, sealed=wanted)
        assert (made.level, made.reason, made.sealed) == (Level.FULL, told, wanted)
        for level in (Level.INC, Level.DIFF):
            with pytest.raises(Blocked, match=told):
                _chosen(level, site, there, sealed=wanted)
        made = _chosen(Level.FULL, site, there, sealed=wanted)
        assert (made.level, made.sealed) == (Level.FULL, wanted)
    for level in (Level.INC, Level.DIFF):
        assert _chosen(level, site, sealed, sealed=True).sealed
        assert not _chosen(level, site, points, sealed=False).sealed
    # without a word it goes on as it was
    for there, was in ((sealed, True), (points, False)):
        made = _chosen(Level.AUTO, site, there)
        assert (made.level, made.sealed) == (Level.INC, was)
    assert not _chosen(Level.OVERLAY, site, sealed, sealed=True).sealed


def test_what_cannot_be_read_here_is_stood_on_no_more(points: Points) -> None:
    site, key = _site(_node("d0", _bitmap(INC))), "ab" * 8
    sealed = _sealed(points, key)
    made = _chosen(Level.AUTO, site, sealed, sealed=True, has=lambda _: False)
    assert (made.level, made.sealed) == (Level.FULL, True)
    assert f"with the key {key}, which is not here" in made.reason
    with pytest.raises(Blocked, match="which is not here"):
        _chosen(Level.INC, site, sealed, sealed=True, has=lambda _: False)
