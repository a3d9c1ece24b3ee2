from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpsnap.errors import HalfMissing, ManifestError
from qmpsnap.store import points
from qmpsnap.store.image import examine_image
from qmpsnap.store.layout import KEPT, MERGED, STORAGE, LocalRoot
from qmpsnap.store.manifest import Disk, Image, Merged, Replacement, Storage, encode
from tests.rig.halves import image, storage

IDS = [f"2026112{number}T000000000Z" for number in range(1, 8)]
SIZE = 1 << 30


def disk(label: str, of: Image, parent: str | None) -> Disk:
    (first,) = storage().disks
    level = "inc" if parent else "full"
    return msgspec.structs.replace(first, label=label, level=level, chain=[of], parent=parent)


class Root:
    """A local root in *path*, whose points are one small file a disk."""

    def __init__(self, path: Path) -> None:
        self.root = LocalRoot(path)

    def add(self, name: str, on: dict[str, str | None], *, manifest: str = STORAGE) -> Storage:
        id, _, revision = name.partition("/")
        folder = self.root.point("web", name)
        folder.mkdir(parents=True, exist_ok=True)
        disks = []
        for label, parent in on.items():
            path = folder / f"{label}.qcow2"
            path.write_bytes(name.encode())
            disks.append(disk(label, examine_image(path, "qcow2", SIZE), parent))
        moment = f"2026-11-{(revision or id)[6:8]}T00:00:00.000Z"
        sealed = storage(
            id=id,
            taken_at=moment,
            disks=disks,
            revision=1 if revision else 0,
            revision_id=revision or None,
        )
        (folder / manifest).write_bytes(encode(sealed))
        return sealed

    def read(self) -> points.Points:
        return points.read(self.root, "web")

    def chain(self, name: str, label: str = "vda") -> list[str]:
        there = self.read()
        found = there.images(there.by_name[name], label)
        return [str(Path(one.path).parent.relative_to(self.root.vm("web"))) for one in found]


@pytest.fixture
def made(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_a_chain_is_followed_disk_by_disk_through_what_was_deleted(made: Root) -> None:
    a, b, c, d = IDS[:4]
    made.add(a, {"vda": None, "vdb": None}, manifest=KEPT)
    made.add(b, {"vda": a, "vdb": None})
    made.add(f"{b}/{c}", {"vda": b, "vdb": b})
    made.add(d, {"vda": f"{b}/{c}", "vdb": a})
    there = made.read()
    assert list(there.by_name) == [a, b, f"{b}/{c}", d]
    assert [one.kept for one in there] == [True, False, False, False]
    assert made.chain(d) == [d, f"{b}/{c}", b, a]
    assert made.chain(d, "vdb") == [d, a]
    assert made.chain(b, "vdb") == [b]
    assert [one.name for one in there.standing_on(a)] == [b, d]
    assert [one.name for one in there.standing_on(b)] == [f"{b}/{c}"]
    assert there.needed({f"{b}/{c}"}) == {f"{b}/{c}", b, a}
    assert there.needed({d, "20990101T000000000Z"}) == {d, f"{b}/{c}", b, a}


def test_in_the_order_of_the_instants_not_of_the_names(made: Root) -> None:
    made.add(IDS[1], {"vda": None})
    made.add(IDS[0], {"vda": None})
    made.add(f"{IDS[0]}/{IDS[2]}", {"vda": IDS[0]})
    assert list(made.read().by_name) == [IDS[0], IDS[1], f"{IDS[0]}/{IDS[2]}"]


def test_what_is_not_sealed_is_no_point(made: Root) -> None:
    made.root.snapshot("web", IDS[0]).mkdir(parents=True)
    made.add(IDS[1], {"vda": None})
    assert list(made.read().by_name) == [IDS[1]]
    assert points.read_one(made.root.snapshot("web", IDS[0])) is None


def test_what_is_gone_or_turns_in_a_circle_is_told(made: Root) -> None:
    a, b, c = IDS[:3]
    made.add(b, {"vda": a})
    there = made.read()
    with pytest.raises(HalfMissing, match=f"stands on {a}, which is gone"):
        there.images(there.by_name[b], "vda")
    made.add(a, {"vda": c})
    made.add(c, {"vda": b})
    there = made.read()
    with pytest.raises(ManifestError, match="circle"):
        there.images(there.by_name[b], "vda")
    assert there.needed({a}) == {a, b, c}


def test_one_that_is_damaged_does_not_hide_the_others(made: Root) -> None:
    a, b = IDS[:2]
    made.add(a, {"vda": None})
    made.add(b, {"vda": a})
    (made.root.snapshot("web", a) / STORAGE).write_bytes(b"{")
    there = made.read()
    assert list(there.by_name) == [b]
    assert STORAGE in there.damaged[a]


def replacement(of: Path, parent: str | None, instead_of: int, **more: Replacement) -> Replacement:
    now = examine_image(of, "qcow2", SIZE)
    return Replacement(image=now, instead_of=instead_of, parent=parent, **more)


def test_a_merge_counts_from_the_moment_its_image_is_in_place(made: Root) -> None:
    a, b, c = IDS[:3]
    made.add(a, {"vda": None}, manifest=KEPT)
    made.add(b, {"vda": a}, manifest=KEPT)
    was = made.add(c, {"vda": b, "vdb": b})
    folder = made.root.snapshot("web", c)
    old, new = folder / "vda.qcow2", folder / "vda.qcow2.partial"
    new.write_bytes(b"first")
    first = replacement(new, a, old.stat().st_ino)
    first = msgspec.structs.replace(first, image=at(first.image, old))
    (folder / MERGED).write_bytes(encode(Merged(point=c, disks={"vda": first})))
    assert made.chain(c) == [c, b, a]
    assert made.read().by_name[c].storage == was
    new.rename(old)
    assert made.chain(c) == [c, a]
    assert made.read().by_name[c].disk("vdb") == was.disks[1]
    merged = made.read().by_name[c].disk("vda")
    assert merged is not None
    assert (merged.chain, merged.level) == ([first.image], "inc")
    # a second merge: until its image is there, what the first one said is so
    new.write_bytes(b"second")
    second = replacement(new, None, old.stat().st_ino, before=first)
    second = msgspec.structs.replace(second, image=at(second.image, old))
    (folder / MERGED).write_bytes(encode(Merged(point=c, disks={"vda": second})))
    assert made.chain(c) == [c, a]
    assert made.read().by_name[c].disk("vda") == merged
    new.rename(old)
    assert made.chain(c) == [c]
    full = made.read().by_name[c].disk("vda")
    assert full is not None
    assert (full.chain, full.level, full.parent) == ([second.image], "full", None)
    # gone altogether: what should be there is told, for `image.changed` to miss
    old.unlink()
    assert made.read().by_name[c].disk("vda") == full


def at(image: Image, path: Path) -> Image:
    return msgspec.structs.replace(image, path=str(path))


def test_a_merge_of_another_point_is_damage(made: Root) -> None:
    made.add(IDS[0], {"vda": None})
    made.add(IDS[1], {"vda": None})
    path = made.root.snapshot("web", IDS[0]) / MERGED
    path.write_bytes(encode(Merged(point=IDS[1], disks={})))
    assert list(made.read().damaged) == [IDS[0]]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=7), st.data())
def test_what_is_needed_is_closed_and_no_more_than_that(
    parents: list[int], data: st.DataObject
) -> None:
    """Each point stands on an earlier one, or on nothing."""
    by_name = {}
    for number, choice in enumerate(parents):
        parent = IDS[choice] if choice < number else None
        one = storage(id=IDS[number], disks=[disk("vda", image(), parent)])
        by_name[IDS[number]] = points.Point(one, Path("/nonexistent"), kept=False)
    there = points.Points("web", by_name)
    asked = data.draw(st.sets(st.sampled_from(list(by_name))))
    needed = there.needed(asked)
    assert asked <= needed
    for name in needed:
        assert {one.name for one in there.standing_on(name)} & needed or name in asked
        parent = by_name[name].storage.disks[0].parent
        assert parent is None or parent in needed
        assert len(there.images(by_name[name], "vda")) <= len(by_name)


def test_a_folder_that_cannot_be_read_is_no_empty_one(made: Root) -> None:
    made.add(IDS[0], {"vda": None})
    folder = made.root.snapshot("web", IDS[0])
    (folder / STORAGE).unlink()
    os.mkfifo(folder / STORAGE)  # does not make us wait, and is no manifest
    with pytest.raises(Exception, match="not a regular file"):
        made.read()
