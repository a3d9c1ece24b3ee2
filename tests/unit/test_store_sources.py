"""What is kept from one request for RAM to the next is not read again, and never stale."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qmpsnap.errors import DigestMismatch, HalfMissing
from qmpsnap.store import filling, half, moved, ramindex, sweeping, wire
from qmpsnap.store.filling import Filled, Span
from qmpsnap.store.ramindex import Index
from qmpsnap.store.sources import Sources
from tests.rig.packed import CHUNK, IDS, SIZE, Series, changing, quiet, sparse
from tests.rig.ram import PAGE, page, write_image


class Asking:
    """A worker that is asked for parts of *series*, again and again; *read* are the indexes."""

    def __init__(self, series: Series, monkeypatch: pytest.MonkeyPatch) -> None:
        self.series, self.sources, self.read = series, Sources(), list[Path]()
        self.to = series.path / "to"
        self.to.mkdir()
        filling.hollow(self.to / "0.pages", SIZE)
        real = ramindex.read

        def read(path: Path, **other: object) -> Index:
            self.read.append(path)
            return real(path, **other)  # type: ignore[arg-type]

        monkeypatch.setattr(ramindex, "read", read)

    def __call__(self, id: str, *spans: Span, near: tuple[Path, ...] = ()) -> Filled:
        request = wire.Fill(
            root=str(self.series.store.path), vm="web", id=id, seal=None, to=str(self.to),
            near=[str(one) for one in near], spans=list(spans),
        )  # fmt: skip
        return half.fill(self.series.store, request, quiet, self.sources)

    def right(self, id: str, pages: range) -> None:
        """These pages of the image are those of the snapshot *id*."""
        part = slice(pages.start * PAGE, pages.stop * PAGE)
        whole = (self.series.path / id / "pc.ram").read_bytes()
        assert (self.to / "0.pages").read_bytes()[part] == whole[part]


@pytest.fixture
def series(tmp_path):
    return Series(tmp_path)


@pytest.fixture
def ask(series, monkeypatch):
    return Asking(series, monkeypatch)


def near_of(series: Series, id: str) -> Path:
    """The folder of the page images of *id*, as they are kept here."""
    folder = series.path / "near"
    folder.mkdir(exist_ok=True)
    shutil.copy(series.path / id / "pc.ram", folder / "0.pages")
    (folder / "ram.index").unlink(missing_ok=True)
    (folder / "ram.index").write_bytes(series.known[id].encode())
    return folder


def test_indexes_are_read_once(series, ask):
    for step, id in enumerate(IDS[:2]):
        series.spool(id, changing(step), *IDS[:step])
        series.ship(id)
    near = near_of(series, IDS[0])
    for at in range(0, 64, 8):
        ask(IDS[1], (0, at * PAGE, 8 * PAGE), near=(near,))
    ask.right(IDS[1], range(64))
    own = series.store.snapshot("web", IDS[1]) / "vmstate/ram.index"
    assert ask.read == [own, near / "ram.index"]
    # another snapshot takes the place of this one
    ask(IDS[0], (0, 0, SIZE))
    ask.right(IDS[0], range(64))
    assert len(ask.read) == 3
    ask(IDS[1], (0, 0, SIZE), near=(near,))
    ask.right(IDS[1], range(64))
    assert ask.read[3:] == ask.read[:2]


def test_a_near_folder_may_go_and_come_again(series, ask):
    for step, id in enumerate(IDS[:2]):
        series.spool(id, changing(step))
        series.ship(id)
    near = near_of(series, IDS[0])
    assert ask(IDS[0], (0, 0, CHUNK), near=(near,)).near_bytes == CHUNK
    shutil.rmtree(near)
    assert ask(IDS[0], (0, CHUNK, CHUNK), near=(near,)).near_bytes == 0
    # the images of another snapshot under the same names: the old index would lead astray
    near_of(series, IDS[1])
    part = (0, 4 * 15 * PAGE, CHUNK)
    assert ask(IDS[1], part, near=(near,)).near_bytes == CHUNK
    ask.right(IDS[1], range(60, 64))
    ask.right(IDS[0], range(8))


def test_a_pack_that_is_moved_meanwhile_is_found(series, ask):
    left = sparse(series)
    ask(left[0], (0, 0, CHUNK))
    old = series.store.shared("web") / series.known[IDS[0]].pack(0).blake3
    series.remove(IDS[0])
    assert moved.note(old).exists()
    assert not old.exists()
    ask(left[0], (0, CHUNK, CHUNK))
    ask.right(left[0], range(8))
    # and what it was moved into may be moved again
    series.spool(IDS[3], {at: page(at) for at in range(4)}, left[0])
    series.ship(IDS[3])
    for id in left:
        series.remove(id)
    sweeping.sweep(series.store, "web")
    ask(IDS[3], (0, 0, CHUNK))
    ask.right(IDS[3], range(4))


def test_what_is_lost_is_told_each_time(series, ask):
    made = series.spool(IDS[0], changing(0))
    series.ship(IDS[0])
    ask(IDS[0], (0, 0, CHUNK))
    pack = series.store.shared("web") / made.packs[0].blake3
    content = pack.read_bytes()
    pack.unlink()
    for _ in range(2):
        with pytest.raises(HalfMissing, match=pack.name):
            ask(IDS[0], (0, CHUNK, CHUNK))
    spoilt = bytearray(content)
    spoilt[series.known[IDS[0]].offsets[1] + 50] ^= 1
    pack.write_bytes(spoilt)
    with pytest.raises(DigestMismatch):
        ask(IDS[0], (0, CHUNK, CHUNK))
    pack.write_bytes(content)
    ask(IDS[0], (0, 0, SIZE))
    ask.right(IDS[0], range(64))


def test_no_file_stays_open(series, ask):
    made = series.spool(IDS[0], changing(0))
    series.ship(IDS[0])
    near = near_of(series, IDS[0])
    before = set(Path("/proc/self/fd").iterdir())
    for at in range(4):
        ask(IDS[0], (0, at * CHUNK, CHUNK))
        ask(IDS[0], (0, at * CHUNK, CHUNK), near=(near,))
    open_now = {Path(one).resolve() for one in set(Path("/proc/self/fd").iterdir()) - before}
    assert not {one for one in open_now if one.name in {made.packs[0].blake3, "0.pages"}}


def test_a_near_index_that_is_damaged_is_none(series, ask):
    series.spool(IDS[0], changing(0))
    series.ship(IDS[0])
    near = near_of(series, IDS[0])
    assert ask(IDS[0], (0, 0, CHUNK), near=(near,)).near_bytes == CHUNK
    (near / "ram.index").unlink()
    (near / "ram.index").write_bytes(b"?")
    assert ask(IDS[0], (0, CHUNK, CHUNK), near=(near,)).near_bytes == 0
    write_image(near / "0.pages", {}, SIZE)
    near_of(series, IDS[0])
    assert ask(IDS[0], (0, 2 * CHUNK, CHUNK), near=(near,)).near_bytes == CHUNK
