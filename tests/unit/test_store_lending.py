"""Packs that another VM of the store has: linked, whoever is removed first, whatever goes wrong."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest

from qmpsnap.errors import PacksMissing, StoreError
from qmpsnap.store import half, lending, moved, shipping, sweeping, wire
from tests.rig.halves import names
from tests.rig.packed import IDS, Cut, Series, changing, quiet
from tests.rig.ram import page

IMAGE = {at: page(at) for at in range(48)}
"""What the RAM of all machines of one image has in common."""


HARMS = ["gone", "all of it", "rotten", "short", "a link", "a folder", "no folder"]


class Two:
    """A VM `golden`, and `web`, which is of the same image, on one store."""

    def __init__(self, path: Path) -> None:
        self.golden = Series(path / "g", "golden")
        self.web = Series(path / "w", "web", self.golden.store)
        self.store = self.golden.store

    def both(self) -> None:
        """The first snapshot of each, on the store."""
        self.golden.spool(IDS[0], IMAGE | {60: page("golden")})
        self.golden.ship(IDS[0])
        self.waiting()
        self.web.ship(IDS[1])

    def waiting(self, own: str = "web") -> None:
        lent = [("golden", self.golden.known[IDS[0]])]
        self.made = self.web.spool(IDS[1], IMAGE | {50: page(own)}, lent=lent)

    @property
    def pack(self) -> str:
        return self.golden.known[IDS[0]].pack(0).blake3

    def links(self, name: str) -> int:
        path = self.store.shared("web") / name
        assert path.samefile(self.store.shared("golden") / name)
        return path.stat().st_nlink


@pytest.fixture
def two(tmp_path):
    for name in "gw":
        (tmp_path / name).mkdir()
    return Two(tmp_path)


def test_a_pack_of_another_vm_is_linked(two):
    two.both()
    lent, own = two.made.packs
    assert (lent.blake3, lent.origin, lent.fresh) == (two.pack, "golden", False)
    assert (own.origin, own.fresh) == (None, True)
    assert own.bytes * 8 < lent.bytes
    assert two.links(two.pack) == 2
    # of the next snapshot nobody needs to be asked
    made = two.web.spool(IDS[2], IMAGE, IDS[1], lent=[("golden", two.golden.known[IDS[0]])])
    assert [pack.origin for pack in made.packs] == [None]
    two.web.ship(IDS[2])
    two.web.whole(*IDS[1:3])
    two.golden.whole(IDS[0])


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::2])
def test_removed_in_any_order(two, order):
    two.both()
    two.golden.spool(IDS[2], {at: page(at) for at in range(8)}, IDS[0])
    two.golden.ship(IDS[2])
    two.web.spool(IDS[3], {at: page(at) for at in range(4)} | {9: page("w")}, IDS[1])
    two.web.ship(IDS[3])
    left = {
        number: (one, id)
        for number, (one, id) in enumerate(
            [(two.golden, IDS[0]), (two.web, IDS[1]), (two.golden, IDS[2]), (two.web, IDS[3])]
        )
    }
    for number in order:
        one, id = left.pop(number)
        one.remove(id)
        for other, stays in left.values():
            other.whole(stays)
    assert names(two.store.vm("golden")) == names(two.store.vm("web")) == []


def test_a_vm_that_is_deleted_altogether_hurts_nobody(two):
    two.both()
    two.golden.remove(IDS[0])
    assert names(two.store.vm("golden")) == []
    two.web.whole(IDS[1])
    assert (two.store.shared("web") / two.pack).stat().st_nlink == 1


@pytest.mark.parametrize(
    "refused", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.EACCES]
)
def test_where_no_link_is_made_it_is_copied(two, monkeypatch, refused):
    link = os.link

    def refusing(src, dst, **other):
        if two.pack in str(src) and "golden" in str(src):
            raise OSError(refused, os.strerror(refused))
        link(src, dst, **other)

    two.golden.spool(IDS[0], IMAGE)
    two.golden.ship(IDS[0])
    two.waiting()
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refusing)
        two.web.ship(IDS[1])
    assert (two.store.shared("web") / two.pack).stat().st_nlink == 1
    two.golden.remove(IDS[0])
    two.web.whole(IDS[1])


def test_an_answer_that_was_lost(two, monkeypatch):
    """NFS: the link was made, and the second attempt is told that it is there."""
    link = os.link

    def twice(src, dst, **other):
        link(src, dst, **other)
        link(src, dst, **other)

    two.golden.spool(IDS[0], IMAGE)
    two.golden.ship(IDS[0])
    two.waiting()
    with monkeypatch.context() as patch:
        patch.setattr(lending.os, "link", twice)
        two.web.ship(IDS[1])
    assert two.links(two.pack) == 2
    two.web.whole(IDS[1])


def test_no_room_is_told(two, monkeypatch):
    """Not taken for a pack that is lost: the next attempt links it."""
    two.golden.spool(IDS[0], IMAGE)
    two.golden.ship(IDS[0])
    two.waiting()

    def full(src, dst, **other):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(lending.os, "link", full)
        with pytest.raises(StoreError, match="no space"):
            two.web.ship(IDS[1])
    two.web.ship(IDS[1])
    assert two.links(two.pack) == 2


@pytest.mark.parametrize("harm", HARMS)
def test_what_cannot_be_taken_is_made_again(two, harm):
    two.golden.spool(IDS[0], IMAGE if harm == "all of it" else IMAGE | {60: page("golden")})
    two.golden.ship(IDS[0])
    two.waiting()
    folder = two.store.shared("golden")
    path = folder / two.pack
    content = path.read_bytes()
    if harm == "no folder":
        folder.rename(folder.with_name("elsewhere"))
        folder.symlink_to("elsewhere")
    else:
        path.unlink()
    if harm in ("rotten", "short"):
        path.write_bytes(content[:-1] + (b"" if harm == "short" else b"?"))
    if harm == "a link":
        path.symlink_to(Path("/etc/hostname"))
    if harm == "a folder":
        path.mkdir()
    before = names(folder)
    with pytest.raises(PacksMissing) as lost:
        two.web.ship(IDS[1])
    assert lost.value.packs == (two.pack,)
    assert not two.store.shared("web").exists() or names(two.store.shared("web")) == []
    instead = two.web.remade(IDS[1], lost.value)
    two.web.ship(IDS[1], instead)
    assert names(folder) == before
    assert names(two.web.local.shared("web")) == []
    there = names(two.store.shared("web"))
    # all of the pack that was lost is that same pack
    assert (moved.note(Path(two.pack)).name in there) == (harm != "all of it")
    assert (two.pack in there) == (harm == "all of it")
    two.web.whole(IDS[1])
    # it is one of its own packs from now on, as any that was moved
    sweeping.sweep(two.store, "web")
    assert names(two.store.shared("web")) == there
    two.web.spool(IDS[2], {at: page(at) for at in range(16)}, IDS[1])
    two.web.ship(IDS[2])
    two.web.remove(IDS[1])
    two.web.whole(IDS[2])
    two.web.remove(IDS[2])
    assert names(two.store.vm("web")) == []


def test_a_pack_that_was_moved_is_found(two):
    """The other VM has little use for the rest of it; what we need is in the new one."""
    two.golden.spool(IDS[0], IMAGE)
    two.golden.ship(IDS[0])
    two.golden.spool(IDS[2], {at: page(at) for at in range(16)}, IDS[0])
    two.golden.ship(IDS[2])
    known = two.golden.known[IDS[0]]
    more = two.web.spool(IDS[3], IMAGE, lent=[("golden", known)])
    # only of what will be left
    two.web.known[IDS[0]] = known
    two.web.spool(IDS[1], {at: page(at) for at in range(16)}, IDS[0])
    path = two.web.local.spool("web", IDS[1]) / "manifest.json"
    path.write_text(path.read_text().replace('"origin": null', '"origin": "golden"', 1))
    two.golden.remove(IDS[0])
    assert moved.note(two.store.shared("golden") / two.pack).exists()
    two.web.ship(IDS[1])
    (new,) = (one for one in names(two.store.shared("web")) if "." not in one)
    assert two.links(new) == 2
    # who needs more of it does not get it from there
    assert [pack.origin for pack in more.packs] == ["golden"]
    with pytest.raises(PacksMissing):
        two.web.ship(IDS[3])
    two.golden.remove(IDS[2])
    two.web.whole(IDS[1])


def test_of_a_pack_that_is_barely_used_nothing_is_taken(two):
    made = two.golden.spool(IDS[0], IMAGE, pack_bytes=20_000)
    assert len(made.packs) > 3
    two.golden.ship(IDS[0])
    lent = [("golden", two.golden.known[IDS[0]])]
    few = {at: page(at) for at in (*range(12), 24, 25, 26, 27, 28)}
    # a chunk twice, and one of a pack that is barely used
    made = two.web.spool(IDS[1], few | {at + 36: page(at + 24) for at in range(4)}, lent=lent)
    shares = {one.origin: one.used_bytes / one.bytes for one in made.packs if one.origin}
    assert shares["golden"] >= 0.5
    own = [one for one in made.packs if one.fresh]
    assert len(own) == 1
    assert own[0].used_bytes * 2 > own[0].bytes
    two.web.ship(IDS[1])
    shared = {one.blake3 for one in made.packs}
    two.golden.remove(IDS[0])
    two.web.whole(IDS[1])
    # else the next sweep would have moved it
    sweeping.sweep(two.store, "web")
    assert set(names(two.store.shared("web"))) == shared


@pytest.mark.parametrize("harm", ["", "gone", "no links", "joined"])
def test_cut_off_at_every_step(tmp_path, monkeypatch, harm):
    """Each change of the file system in turn is the last one; the next run ships, or remakes."""
    steps = ["rename", "replace", "link", "unlink", "mkdir", "write", "fsync"]
    for at in itertools.count(1, 2 if harm else 1):
        folder = tmp_path / str(at)
        for name in ("g", "w"):
            (folder / name).mkdir(parents=True)
        two = Two(folder)
        two.golden.spool(IDS[0], IMAGE | {60: page("golden")})
        two.golden.ship(IDS[0])
        two.waiting()
        instead, others = {}, []
        if harm == "joined":  # another one has had a part of the lost pack made again
            lent = [("golden", two.golden.known[IDS[0]])]
            two.web.spool(IDS[3], {at: page(at) for at in range(28)}, lent=lent)
            others = [IDS[3]]
        if harm in ("gone", "joined"):
            two.golden.remove(IDS[0])
        for id in others:
            with pytest.raises(PacksMissing) as lost:
                two.web.ship(id)
            two.web.ship(id, two.web.remade(id, lost.value))
        if harm in ("gone", "joined"):
            with pytest.raises(PacksMissing) as lost:
                two.web.ship(IDS[1])
            instead = two.web.remade(IDS[1], lost.value)
        done = 0

        def counted(real, name):
            def call(*args, **kwargs):
                nonlocal done
                if name == "link" and harm == "no links" and "golden" in str(args[0]):
                    raise OSError(errno.EPERM, "no")
                done += 1
                if done >= at:  # noqa: B023 - within the same turn
                    raise Cut
                return real(*args, **kwargs)

            return call

        cut = False
        request = wire.Ship(
            root=str(two.store.path), vm="web", id=IDS[1],
            spool=str(two.web.local.spool("web", IDS[1])), device=None,
            shared=str(two.web.local.shared("web")), instead=instead,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            for name in steps:
                patch.setattr(os, name, counted(getattr(os, name), name))
            try:
                shipping.ship(two.store, request, quiet)
            except Cut:
                cut = True
        two.web.whole(*others)
        if not instead:
            two.golden.whole(IDS[0])
        two.web.ship(IDS[1], instead)
        two.web.whole(IDS[1], *others)
        if not instead:
            two.golden.remove(IDS[0])
        sweeping.sweep(two.store, "web")
        two.web.whole(IDS[1], *others)
        left = [one for one in names(two.store.shared("web")) if not one.endswith(".moved")]
        assert len(left) == 2
        assert all("." not in one for one in left)
        for id in (IDS[1], *others):
            two.web.remove(id)
        assert names(two.store.vm("web")) == []
        if not cut:
            break
    assert at > 10


@pytest.mark.parametrize("when", ["looked for", "linked"])
def test_a_sweep_of_the_other_vm_meanwhile(two, monkeypatch, when):
    """It takes the pack just before that."""
    two.golden.spool(IDS[0], IMAGE)
    two.golden.ship(IDS[0])
    two.waiting()
    lies, link = moved.lies, os.link

    def late_lies(pack, *, side):
        if pack.parent == two.store.shared("golden") and when == "looked for":
            two.golden.remove(IDS[0])
        return lies(pack, side=side)

    def late_link(src, dst, **other):
        if "golden" in str(src):
            two.golden.remove(IDS[0])
        return link(src, dst, **other)

    with monkeypatch.context() as patch:
        patch.setattr(lending.moved, "lies", late_lies)
        patch.setattr(lending.os, "link", late_link)
        with pytest.raises(PacksMissing) as lost:
            two.web.ship(IDS[1])
    two.web.ship(IDS[1], two.web.remade(IDS[1], lost.value))
    two.web.whole(IDS[1])


def test_what_is_aside_is_linked(two):
    two.golden.spool(IDS[0], IMAGE)
    two.golden.ship(IDS[0])
    two.waiting()
    path = two.store.shared("golden") / two.pack
    path.rename(path.with_name(path.name + ".going"))
    two.web.ship(IDS[1])
    two.web.whole(IDS[1])
    two.golden.whole(IDS[0])


def test_a_spool_is_whole_by_what_it_will_get(two):
    """Looked at, and filled, before it is shipped."""
    two.golden.spool(IDS[0], IMAGE)
    two.golden.ship(IDS[0])
    two.waiting()
    spool, folder = two.web.local.spool("web", IDS[1]), two.web.local.shared("web")
    packs = wire.Packs(
        root=str(two.store.path), vm="web", id=IDS[1], spool=str(spool), shared=str(folder),
        whole=True,
    )  # fmt: skip
    assert half.packs(two.store, packs, quiet) == []
    to = two.web.path / "to"
    to.mkdir()
    fill = wire.Fill(
        root=str(two.store.path), vm="web", id=IDS[1], seal=None, to=str(to), near=[],
        spool=str(spool), shared=str(folder),
    )  # fmt: skip
    half.fill(two.store, fill, quiet)
    assert (to / "0.pages").read_bytes() == (two.web.path / IDS[1] / "pc.ram").read_bytes()
    (two.store.shared("golden") / two.pack).unlink()
    assert [one.file for one in half.packs(two.store, packs, quiet)] == [f"shared/{two.pack}"]


def test_repacking_one_leaves_the_other(two):
    two.both()
    two.golden.spool(IDS[2], {at: page(at) for at in range(4)}, IDS[0])
    two.golden.ship(IDS[2])
    two.golden.remove(IDS[0])
    assert moved.note(two.store.shared("golden") / two.pack).exists()
    assert (two.store.shared("web") / two.pack).stat().st_nlink == 1
    two.golden.whole(IDS[2])
    two.web.whole(IDS[1])


def test_some_is_on_no_image(two):
    two.golden.spool(IDS[0], changing(0))
    two.golden.ship(IDS[0])
    lent = [("golden", two.golden.known[IDS[0]])]
    two.web.spool(IDS[1], changing(0), lent=lent)
    two.golden.remove(IDS[0])
    with pytest.raises(PacksMissing) as lost:
        two.web.ship(IDS[1])
    # a page of the image is not what it was
    image = two.web.path / IDS[1] / "pc.ram"
    content = bytearray(image.read_bytes())
    content[40] ^= 1
    image.write_bytes(content)
    with pytest.raises(PacksMissing) as still:
        two.web.remade(IDS[1], lost.value)
    assert still.value.packs == lost.value.packs
    assert names(two.web.local.shared("web")) == []
