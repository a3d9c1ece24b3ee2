"""Snapshots that share RAM: shipped once, removed in any order, repacked, cut off anywhere."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qmpsnap.engine.half import Pair
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import DamagedData, HalfMissing, PacksMissing, StoreError
from qmpsnap.store import chunking, files, half, moved, rampack, removal, repack, sweeping, wire
from qmpsnap.store.layout import StoreRoot
from qmpsnap.store.local import read_storage
from qmpsnap.store.remote import Store
from tests.rig.halves import names
from tests.rig.packed import CHUNK, IDS, SIZE, Cut, Series, changing, quiet, sparse, taken
from tests.rig.ram import page, write_image
from tests.rig.room import room


@pytest.fixture
def series(tmp_path):
    return Series(tmp_path)


@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[::13])
def test_removed_in_any_order_all_others_stay(series, order):
    taken(series)
    left = set(IDS)
    series.whole(*left)
    for number in order:
        series.remove(IDS[number])
        left.remove(IDS[number])
        series.whole(*left)
    assert names(series.store.vm("web")) == []


def test_what_is_there_is_not_sent_again(series):
    made = series.spool(IDS[0], changing(0))
    first = series.ship(IDS[0])
    packs = {pack.blake3 for pack in made.packs}
    assert first.bytes > sum(pack.bytes for pack in made.packs)
    assert names(series.local.shared("web")) == []
    before = {path.name: path.stat() for path in series.store.shared("web").iterdir()}
    again = series.spool(IDS[1], changing(0), IDS[0])
    assert {pack.blake3 for pack in again.packs} == packs
    second = series.ship(IDS[1])
    assert second.bytes < first.bytes - sum(pack.bytes for pack in made.packs) + 1000
    assert {path.name: path.stat() for path in series.store.shared("web").iterdir()} == before


def test_spools_are_shipped_in_any_order(series):
    series.spool(IDS[0], changing(0))
    series.spool(IDS[1], changing(1), IDS[0])
    series.ship(IDS[1])
    assert names(series.local.shared("web")) != []
    series.ship(IDS[0])
    assert names(series.local.shared("web")) == []
    series.whole(*IDS[:2])


def test_what_a_spool_waits_for_stays(series):
    """The first is shipped; the second waits for what it brought, while the first is removed."""
    made = series.spool(IDS[0], changing(0))
    series.ship(IDS[0])
    # little of it: were it not for the spool, the pack would be moved
    series.spool(IDS[1], {at: page((at, 0, False)) for at in range(8, 16)}, IDS[0])
    series.remove(IDS[0])
    assert names(series.store.shared("web")) == [pack.blake3 for pack in made.packs]
    series.ship(IDS[1])
    series.whole(IDS[1])


def test_a_pack_that_is_lost_is_named(series):
    made = series.spool(IDS[0], changing(0))
    series.ship(IDS[0])
    series.spool(IDS[1], changing(1), IDS[0])
    (pack,) = made.packs
    (series.store.shared("web") / pack.blake3).unlink()
    with pytest.raises(PacksMissing, match=pack.blake3) as failed:
        series.ship(IDS[1])
    sent = wire.error(wire.trouble(failed.value))
    assert isinstance(sent, PacksMissing)
    assert sent.packs == (pack.blake3,)
    assert names(series.store.shared("web")) == []
    # it is made again from the images, without what was lost
    lost = series.known[IDS[0]].without([pack.blake3])
    chunking.keep(
        [(*write_image(series.path / "x/pc.ram", changing(0), SIZE),)],
        series.local.shared("web"), [lost], stored_pages=[64], chunk_bytes=CHUNK,
    )  # fmt: skip
    series.ship(IDS[1])
    series.whole(*IDS[:2])


def test_damage_is_named_by_all_who_need_it(series):
    taken(series, 2)
    first, second = (series.known[id] for id in IDS[:2])
    row = next(row for row in range(len(first)) if second.find(first.digest(row)) is not None)
    own = next(row for row in range(len(first)) if second.find(first.digest(row)) is None)
    for at, hurt in ((row, 2), (own, 1)):
        path = series.store.shared("web") / first.pack(at).blake3
        content = path.read_bytes()
        spoilt = bytearray(content)
        spoilt[first.offsets[at] + first.lengths[at] // 2] ^= 1
        path.write_bytes(spoilt)
        where = f"pc.ram at {first.span(0, at)[0]:#x}"
        told = [one.what for id in IDS[:2] for one in series.verify(id)]
        assert len(told) == 2  # the pack is damaged for both
        assert sum(where in one for one in told) == hurt
        path.write_bytes(content)
    (series.store.shared("web") / first.pack(0).blake3).rename(series.path / "lost")
    assert all("is missing" in one.what for id in IDS[:2] for one in series.verify(id))
    glance = wire.Glance(root=str(series.store.path), vm="web", id=IDS[1], seal=None, texts=[])
    assert list(half.glance(series.store, glance, quiet).troubles) == [
        f"shared/{first.pack(0).blake3}"
    ]


def test_what_is_still_needed_is_moved(series):
    left = sparse(series)
    folder = series.store.shared("web")
    old = series.known[IDS[0]].pack(0).blake3
    before = sum(path.stat().st_size for path in folder.iterdir())
    series.remove(IDS[0])
    assert not (folder / old).exists()
    assert moved.note(folder / old).exists()
    assert sum(path.stat().st_size for path in folder.iterdir()) < before / 2
    series.whole(*left)
    # what stands on it is shipped as before, and what needs more of it is not
    series.spool(IDS[3], {at: page(at) for at in range(4)}, IDS[1])
    series.ship(IDS[3])
    series.whole(*left, IDS[3])
    series.spool(IDS[4], {at: page(at) for at in range(64)}, IDS[0])
    with pytest.raises(PacksMissing):
        series.ship(IDS[4])
    removal.remove(
        series.store, wire.Remove(root=str(series.store.path), vm="web", id=IDS[4]), quiet
    )
    shutil.rmtree(series.local.spool("web", IDS[4]))  # it waited for what is there
    for id in (*left, IDS[3]):
        series.remove(id)
    assert names(series.store.vm("web")) == []


def test_one_that_came_back_counts_again(series):
    """A spool had a copy of the old pack, and needs more of it than was moved."""
    left = sparse(series)
    folder = series.store.shared("web")
    old = series.known[IDS[0]].pack(0).blake3
    content = (folder / old).read_bytes()
    series.remove(IDS[0])
    series.spool(IDS[4], {at: page(at) for at in range(64)}, IDS[0])
    (series.local.shared("web") / old).write_bytes(content)
    series.ship(IDS[4])
    series.whole(*left, IDS[4])
    sweeping.sweep(series.store, "web")
    assert (folder / old).exists()
    assert not moved.note(folder / old).exists()
    sweeping.sweep(series.store, "web")
    series.whole(*left, IDS[4])
    series.remove(IDS[4])
    series.whole(*left)


def test_cut_off_at_every_step(tmp_path, monkeypatch):
    """Each change of the file system in turn is the last one."""
    steps = ["rename", "replace", "link", "unlink", "rmdir", "write", "fsync"]
    for at in itertools.count(1):
        series = Series(tmp_path / str(at)) if not (tmp_path / str(at)).mkdir() else None
        assert series is not None
        left = sparse(series)
        done = 0

        def counted(real):
            def call(*args, **kwargs):
                nonlocal done
                done += 1
                if done >= at:  # noqa: B023 - within the same turn
                    raise Cut
                return real(*args, **kwargs)

            return call

        removal.remove(  # what is cut off is the sweep
            series.store,
            wire.Remove(root=str(series.store.path), vm="web", id=IDS[0], sweep=False),
            quiet,
        )
        with monkeypatch.context() as patch:
            for name in steps:
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                sweeping.sweep(series.store, "web")
            except Cut:
                cut = True
            else:
                cut = False
        series.whole(*left)
        sweeping.sweep(series.store, "web")
        series.whole(*left)
        rest = names(series.store.shared("web"))
        assert len([one for one in rest if "." not in one]) == 3
        assert len(rest) == 4
        if not cut:
            break
    assert at > 10


@pytest.fixture
def full(tmp_path):
    """A store with little room."""
    with room(tmp_path / "full/store", "2M") as store:
        yield store


def test_a_removal_needs_no_room(full):
    series = Series(full.parent)
    left = sparse(series)
    old = full / "web/shared" / series.known[IDS[0]].pack(0).blake3
    shutil.rmtree(series.store.snapshot("web", IDS[0]))
    filler = full / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(2 << 20))
    sweeping.sweep(series.store, "web")
    assert old.exists()  # what is left of it could not be moved
    series.whole(*left)
    filler.unlink()
    sweeping.sweep(series.store, "web")
    assert not old.exists()
    series.whole(*left)


def test_a_damaged_pack_is_not_moved(series):
    left = sparse(series)
    known = series.known[IDS[0]]
    path = series.store.shared("web") / known.pack(0).blake3
    content = bytearray(path.read_bytes())
    content[known.offsets[0] + 50] ^= 1
    path.write_bytes(content)
    series.remove(IDS[0])
    assert path.read_bytes() == content
    assert all("pc.ram at 0x0" in one.what for id in left for one in series.verify(id))


def test_nothing_is_moved_where_an_index_cannot_be_read(series):
    sparse(series)
    (series.store.snapshot("web", IDS[2]) / "vmstate/ram.index").write_bytes(b"?")
    before = names(series.store.shared("web"))
    series.remove(IDS[0])
    assert names(series.store.shared("web")) == before


def test_one_that_is_shipped_meanwhile_keeps_the_old_pack(series, monkeypatch):
    left = sparse(series)
    close = rampack.Writer.close

    def meanwhile(writer, on_progress=None):
        pack = close(writer, on_progress)
        series.spool(IDS[4], {at: page(at) for at in range(64)}, IDS[0])
        monkeypatch.undo()
        series.ship(IDS[4])
        return pack

    removal.remove(
        series.store,
        wire.Remove(root=str(series.store.path), vm="web", id=IDS[0], sweep=False),
        quiet,
    )
    monkeypatch.setattr(repack.Writer, "close", meanwhile)
    sweeping.sweep(series.store, "web")
    series.whole(*left, IDS[4])
    sweeping.sweep(series.store, "web")
    series.whole(*left, IDS[4])


def test_a_note_that_leads_nowhere_is_damage(series):
    left = sparse(series)
    series.remove(IDS[0])
    folder = series.store.shared("web")
    note = moved.note(folder / series.known[IDS[0]].pack(0).blake3)
    content = note.read_text()
    note.write_text("{")
    assert series.verify(left[0]) != []
    before = names(folder)
    sweeping.sweep(series.store, "web")
    assert names(folder) == before
    note.write_text(content)
    series.whole(*left)
    with pytest.raises((StoreError, DamagedData)):
        files.publish(note, b"another")


async def test_through_the_worker(series, tmp_path):
    """A half in the spool, of which a part is on the store; then shipped."""
    store = Store(series.store, within=20)
    series.spool(IDS[0], changing(0))
    series.ship(IDS[0])
    made = series.spool(IDS[1], changing(1), IDS[0])
    spool, local = series.local.spool("web", IDS[1]), series.local.shared("web")
    assert await store.packs("web", IDS[1], spool, local, whole=True) == []
    heard: list[int] = []
    for number, where in enumerate([{"spool": spool, "shared": local}, {}]):
        to = tmp_path / f"to{number}"
        to.mkdir()
        filled = await store.fill(
            "web", IDS[1], to, near=[tmp_path], **where,
            on_progress=lambda done, total, what: heard.append(done),
        )  # fmt: skip
        assert filled.pack_bytes == SIZE
        assert heard[-1] == SIZE
        assert (to / "0.pages").read_bytes() == (series.path / IDS[1] / "pc.ram").read_bytes()
        if not number:
            await store.ship(spool, "web", IDS[1], shared=local)
    assert await store.verify("web", IDS[1]) == []
    shutil.rmtree(spool)
    lost = next(pack for pack in made.packs if not pack.fresh)
    waiting = [pack.blake3 for pack in made.packs]
    await store.remove("web", IDS[0], waiting=waiting)
    (series.store.shared("web") / lost.blake3).unlink()
    (problem,) = await store.verify("web", IDS[1])
    assert problem.file == lost.entry.name
    with pytest.raises(HalfMissing, match=lost.blake3):
        await store.fill("web", IDS[1], to)
    await store.remove("web", IDS[1])
    assert names(series.store.vm("web")) == []


def test_by_hand(series):
    """What docs/recovery.md says, also of a pack that was moved."""
    left = sparse(series)
    series.remove(IDS[0])
    text = (Path(__file__).parents[2] / "docs/recovery.md").read_text()
    (script,) = re.findall(r"^python3 - \"\$STATE/vmstate/ram.index\".*?\nEND$", text, re.M | re.S)
    state = series.store.snapshot("web", left[0])
    there = {"STATE": str(state), "SHARED": str(series.store.shared("web"))}
    environment = {**os.environ, **there, "TO": str(series.path)}
    said = subprocess.run(
        ["sh", "-eu", "-c", script], env=environment, check=True, capture_output=True, text=True
    )
    assert said.stdout == f"pc.ram {SIZE} {series.path}/0.pages\n"
    assert (series.path / "0.pages").read_bytes() == (series.path / left[0] / "pc.ram").read_bytes()


async def test_a_spool_with_all_its_packs_needs_no_store(series):
    made = series.spool(IDS[0], changing(0))
    roots = Roots(series.local, Store(StoreRoot(series.path / "none")))
    half_here = read_storage(series.local, "web", IDS[0])
    pair = Pair(roots, "web", IDS[0], half_here, made, "", spooled=True)
    (series.path / "to").mkdir()
    filled = await pair.fill(series.path / "to", lambda *_: None)
    assert filled.pack_bytes == SIZE
    assert (series.path / "to/0.pages").read_bytes() == (
        series.path / IDS[0] / "pc.ram"
    ).read_bytes()
    assert (await pair.glance()).wrong == {}
    (series.local.shared("web") / made.packs[0].blake3).unlink()
    assert list((await pair.glance()).wrong) == [made.packs[0].entry.name]
