"""Packs that are read to their last byte: what is wrong is found, and whole ones are read once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blake3 import blake3

from qmpsnap.errors import DamagedData, DigestMismatch, HalfMissing, LocalFailed
from qmpsnap.store import packcheck, rampack
from qmpsnap.store.manifest import FileEntry
from qmpsnap.store.pack import frame_of
from qmpsnap.store.packcheck import Checked
from qmpsnap.store.ramindex import Named
from qmpsnap.store.rampack import Writer
from qmpsnap.store.shelf import Lying, Shelf
from tests.rig.ram import page


class Pack:
    """A pack of a few pages, those *wrong* not what the table says; *heard* are whole readings."""

    def __init__(self, folder: Path, *wrong: int) -> None:
        self.folder, self.heard = folder, list[str]()
        folder.mkdir(exist_ok=True)
        writer = Writer(folder)
        for number in range(20):
            digest = blake3(page(number)).digest()
            writer.add(digest, frame_of(page("?" if number in wrong else number)), 4096)
        pack = writer.close()
        self.named = Named(blake3=pack.blake3, bytes=pack.bytes)
        self.path = folder / pack.blake3

    def check(self, checked: Checked) -> None:
        def tell(done: int, total: int, what: str) -> None:
            if done == total:
                self.heard.append(what)

        with Shelf([(self.folder, LocalFailed)]) as shelf:
            checked.check(shelf.pack(self.named), tell)


@pytest.mark.parametrize("piece", [1000, 5000, 1 << 20])
def test_each_is_read_once_as_long_as_it_is_the_same(tmp_path, monkeypatch, piece):
    """However the chunks lie in what is read at a time."""
    monkeypatch.setattr(packcheck, "PIECE", piece)
    pack, checked = Pack(tmp_path / "a"), Checked()
    for _ in range(2):
        pack.check(checked)
    assert len(pack.heard) == 1
    content = bytearray(pack.path.read_bytes())
    content[3000] ^= 1
    pack.path.write_bytes(content)
    os.utime(pack.path, ns=(1, 1))
    for _ in range(2):
        with pytest.raises(DigestMismatch, match="not what the manifest says"):
            pack.check(checked)
    assert len(pack.heard) == 2
    pack.path.unlink()
    with pytest.raises(HalfMissing):
        pack.check(checked)


@pytest.mark.parametrize("piece", [1000, 5000, 1 << 20])
@pytest.mark.parametrize("wrong", [(0,), (19,), (3, 4, 11)])
def test_chunks_that_the_writer_spoilt_are_counted(tmp_path, monkeypatch, piece, wrong):
    monkeypatch.setattr(packcheck, "PIECE", piece)
    with pytest.raises(DigestMismatch, match=f": {len(wrong)} chunks are not what its table says"):
        Pack(tmp_path / "a", *wrong).check(Checked())


def test_a_whole_file_that_is_no_pack(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"no pack, but what its name says")
    size, digest = path.stat().st_size, blake3(path.read_bytes()).hexdigest()
    entry = FileEntry(name=f"shared/{digest}", bytes=size, blake3=digest)
    with pytest.raises(DamagedData, match="is no pack"):
        Checked().check(Lying(path, LocalFailed, entry, None))


def test_frames_that_overlap(tmp_path, monkeypatch):
    """A table that says what cannot be is damage, and no more."""
    pack = Pack(tmp_path / "a")
    frames = rampack.table(pack.path, side=LocalFailed)
    first = min(frames.values())
    odd = {digest: first._replace(offset=first.offset + 1) for digest in frames}
    monkeypatch.setattr(packcheck, "table", lambda path, *, side: odd)
    monkeypatch.setattr(packcheck, "PIECE", 1000)
    with pytest.raises(DigestMismatch, match="20 chunks"):
        pack.check(Checked())
