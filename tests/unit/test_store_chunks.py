"""RAM in chunks: what went into packs comes out of them again, and each chunk is there once."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from array import array
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from qmpsnap.errors import DamagedData, DigestMismatch, HalfMissing, LocalFailed, ManifestError
from qmpsnap.store import chunking, filling, pack, rampack
from qmpsnap.store.chunking import Kept
from qmpsnap.store.manifest import RamImage
from qmpsnap.store.ramindex import Index, Named
from qmpsnap.store.shelf import Shelf
from qmpsnap.store.sink import Cancelled
from tests.rig.halves import names
from tests.rig.ram import PAGE, holes, page, write_image

CHUNK = 4 * PAGE
SIZE = 40 * PAGE


@pytest.fixture
def shared(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


def keep(images, to: Path, *known: Index, **other: object) -> Kept:
    options = {"chunk_bytes": CHUNK, "stored_pages": [0] * len(images)} | other
    return chunking.keep(images, to, known, **options)  # type: ignore[arg-type]


def fill(index: Index, to: Path, *folders: Path, **other: object) -> filling.Filled:
    to.mkdir(exist_ok=True)
    with Shelf([(folder, LocalFailed) for folder in folders]) as shelf:
        return filling.fill(index, shelf, to, **other)  # type: ignore[arg-type]


pages = some.dictionaries(some.integers(0, 39), some.integers(0, 5).map(page), max_size=20)


@settings(
    max_examples=20,
    deadline=None,  # a host that is busy is no failure
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    first=pages,
    then=pages,
    short=some.integers(1, PAGE),
    chunk=some.sampled_from([PAGE, CHUNK, 64 << 10]),
    pack_bytes=some.sampled_from([20_000, 1 << 20]),
)
def test_what_went_in_comes_out(tmp_path_factory, first, then, short, chunk, pack_bytes):
    """Two snapshots, of two blocks each; the end of a block need not be that of a chunk."""
    folder = tmp_path_factory.mktemp("ram")
    (folder / "shared").mkdir()
    known: list[Index] = []
    told: list[int] = []
    for number, content in enumerate([first, then]):
        made = folder / str(number)
        images = [
            write_image(made / "pc.ram", content, SIZE),
            write_image(made / "m0", {1: content.get(0, bytes(short))}, 7 * PAGE),
        ]
        told.clear()
        kept = keep(
            images, folder / "shared", *known, chunk_bytes=chunk, pack_bytes=pack_bytes,
            on_progress=lambda done, total, what: told.append(done),
        )  # fmt: skip
        assert told == sorted(told)
        assert told[-1] == 47 * PAGE
        index = Index.decode(kept.index, Path("ram.index"))
        assert index.encode() == kept.index
        known.append(index)
        told.clear()
        fill(index, folder / f"{number}.back", folder / "shared",
             on_progress=lambda done, total, what: told.append(done))  # fmt: skip
        assert told == sorted(told)
        for block, (_, path, _) in enumerate(images):
            back = folder / f"{number}.back/{block}.pages"
            assert back.read_bytes() == path.read_bytes()
            zero = {at for at in range(back.stat().st_size // PAGE)
                    if not any(path.read_bytes()[at * PAGE : at * PAGE + PAGE])}  # fmt: skip
            assert holes(back) == zero
    # every pack is in its table what its name says
    for path in (folder / "shared").iterdir():
        assert blake3(path.read_bytes()).hexdigest() == path.name
        for digest, frame in rampack.table(path, side=LocalFailed).items():
            stored = path.read_bytes()[frame.offset : frame.offset + frame.length]
            assert blake3(pack.content_of(stored, frame.raw)).digest() == digest


def test_what_is_known_is_not_written_again(shared, tmp_path):
    content = {number: page(number) for number in range(32)}
    one = keep([write_image(tmp_path / "a/pc.ram", content, SIZE)], shared)
    assert (one.chunks, one.new_chunks) == (8, 8)
    assert [one.fresh for one in one.packs] == [True]
    before = names(shared)
    same = keep([write_image(tmp_path / "b/pc.ram", content, SIZE)], shared, one.known)
    assert (same.chunks, same.new_chunks, same.new_bytes, same.fresh) == (8, 0, 0, ())
    assert names(shared) == before
    assert same.index == one.index
    # one page is another now, and what was in one place is in another one, too
    content[9] = page("new")
    content |= {36 + number: page(number) for number in range(4)}
    then = keep([write_image(tmp_path / "c/pc.ram", content, SIZE)], shared, one.known)
    assert (then.chunks, then.new_chunks) == (9, 1)
    assert sum(pack.used_bytes for pack in then.packs) == sum(
        then.known.lengths[row] for row in range(8)
    )
    assert [pack.fresh for pack in then.packs] == [False, True]
    fill(then.known, tmp_path / "to", shared)
    assert (tmp_path / "to/0.pages").read_bytes() == (tmp_path / "c/pc.ram").read_bytes()
    # without the first pack all is new but for the last, which gives the same packs as at first
    lost = then.known.without({one.packs[0].blake3})
    again = keep([write_image(tmp_path / "c/pc.ram", content, SIZE)], shared, lost)
    assert again.new_chunks == 7
    assert {pack.blake3 for pack in then.fresh} < {pack.blake3 for pack in again.packs}


def test_equal_chunks_are_one(shared, tmp_path):
    content = {number: page(number % 4) for number in range(40)}
    kept = keep([write_image(tmp_path / "pc.ram", content, SIZE)], shared)
    assert (kept.chunks, kept.new_chunks) == (10, 1)
    fill(kept.known, tmp_path / "to", shared)
    assert (tmp_path / "to/0.pages").read_bytes() == (tmp_path / "pc.ram").read_bytes()


def test_ram_of_zeros_needs_no_pack(shared, tmp_path):
    kept = keep([write_image(tmp_path / "pc.ram", {3: bytes(PAGE)}, SIZE)], shared)
    assert (kept.chunks, kept.packs, names(shared)) == (0, (), [])
    fill(Index.decode(kept.index, Path("x")), tmp_path / "to")
    assert (tmp_path / "to/0.pages").stat().st_size == SIZE
    assert (tmp_path / "to/0.pages").stat().st_blocks == 0


@pytest.mark.parametrize("harm", ["cancelled", "cut short", "no room"])
def test_what_breaks_off_leaves_nothing(shared, tmp_path, monkeypatch, harm):
    content = {number: page(number) for number in range(40)}
    image = write_image(tmp_path / "pc.ram", content, SIZE)
    other = keep([write_image(tmp_path / "other", {0: page(0)}, SIZE)], shared, pack_bytes=1)
    before = names(shared)
    calls = itertools.count()
    if harm == "cut short":
        os.truncate(image[1], SIZE - PAGE)
    if harm == "no room":

        def full(descriptor, content):
            if next(calls) > 20:
                raise OSError(28, "No space left on device")
            os.write(descriptor, content)

        monkeypatch.setattr(rampack, "write_all", full)
    with pytest.raises((Cancelled, LocalFailed)):
        keep([image], shared, pack_bytes=1,
             cancelled=lambda: harm == "cancelled" and next(calls) == 1)  # fmt: skip
    # what another one had written by then stays
    assert names(shared) == before == [pack.blake3 for pack in other.packs]


def damaged(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def test_a_damaged_chunk_is_named(shared, tmp_path):
    content = {number: page(number) for number in range(32)}
    kept = keep([write_image(tmp_path / "pc.ram", content, SIZE)], shared)
    (pack,) = kept.packs
    damaged(shared / pack.blake3, kept.known.offsets[2] + 100)
    with pytest.raises(DigestMismatch, match=rf"pc\.ram at 0x8000: .*{pack.blake3}"):
        fill(kept.known, tmp_path / "to", shared)
    (shared / pack.blake3).unlink()
    with pytest.raises(HalfMissing, match=rf"pc\.ram at 0x0: .*{pack.blake3}: is missing"):
        fill(kept.known, tmp_path / "to", shared)


def test_near_images_save_the_packs(shared, tmp_path):
    content = {number: page(number) for number in range(32)}
    one = keep([write_image(tmp_path / "near/0.pages", content, SIZE)], shared)
    (tmp_path / "near/ram.index").write_bytes(one.index)
    content |= {2: page("new"), 35: page(3)}
    image = write_image(tmp_path / "pc.ram", content, SIZE)
    two = keep([image], shared, one.known)
    # the near image was changed since: that chunk is not taken from it
    damaged(tmp_path / "near/0.pages", 5 * PAGE)
    got = fill(two.known, tmp_path / "to", shared, near=[tmp_path / "none", tmp_path / "near"])
    assert (got.near_bytes, got.pack_bytes) == (6 * CHUNK, 3 * CHUNK)
    assert (tmp_path / "to/0.pages").read_bytes() == image[1].read_bytes()
    # with all chunks near no pack is needed
    (tmp_path / "to/ram.index").write_bytes(two.index)
    assert fill(two.known, tmp_path / "once more", near=[tmp_path / "to"]).pack_bytes == 0
    assert (tmp_path / "once more/0.pages").read_bytes() == image[1].read_bytes()


def test_the_first_folder_that_has_a_pack(shared, tmp_path):
    one = keep([write_image(tmp_path / "pc.ram", {0: page(0)}, SIZE)], shared)
    (tmp_path / "else").mkdir()
    fill(one.known, tmp_path / "to", tmp_path / "else", shared)
    assert (tmp_path / "to/0.pages").read_bytes() == (tmp_path / "pc.ram").read_bytes()


def spoilt(known: Index, **change: object) -> bytes:
    fields = {
        "chunk_bytes": known.chunk_bytes, "blocks": known.blocks, "packs": known.packs,
        "numbers": known.numbers, "digests": known.digests,
        "places": (known.pack_numbers, known.offsets, known.lengths),
    }  # fmt: skip
    return Index(**(fields | change)).encode()  # type: ignore[arg-type]


def test_an_index_that_leads_elsewhere_is_refused(shared, tmp_path):
    content = {number: page(number) for number in range(8)}
    known = keep([write_image(tmp_path / "pc.ram", content, SIZE)], shared).known
    path = Path("ram.index")
    assert Index.decode(spoilt(known), path).encode() == known.encode()
    places = known.pack_numbers, known.offsets, known.lengths
    far = array("Q", [known.packs[0].bytes, 0])
    short = [RamImage(block="pc.ram", bytes=CHUNK, stored_pages=8)]
    for harm in (
        spoilt(known, numbers=array("I", [1, 1])),
        spoilt(known, numbers=array("I", [0, 10])),
        spoilt(known, places=(array("I", [0, 1]), *places[1:])),
        spoilt(known, places=(places[0], far, places[2])),
        spoilt(known, places=(*places[:2], array("I", [1 << 20, 1]))),
        spoilt(known, packs=[]),
        spoilt(known, blocks=short),
        spoilt(known, digests=known.digests[:-1]),
        spoilt(known)[:-1],
        spoilt(known)[4:],
        b"",
        pack.frame_of(b"{}\n"),
    ):
        with pytest.raises(DamagedData, match=r"ram\.index"):
            Index.decode(harm, path)
    newer = pack.frame_of(
        pack.content_of(known.encode(), pack.size_of(known.encode())).replace(
            b'"version":1', b'"version":3', 1
        )
    )
    with pytest.raises(ManifestError, match="version 3; this qmpsnap knows up to 2"):
        Index.decode(newer, path)


@given(some.binary(max_size=300))
def test_what_is_no_index_is_refused(content):
    for one in (content, pack.frame_of(content)):
        with pytest.raises(DamagedData):
            Index.decode(one, Path("ram.index"))


def test_what_is_no_pack_is_refused(shared, tmp_path):
    kept = keep([write_image(tmp_path / "pc.ram", {0: page(0)}, SIZE)], shared)
    path = shared / kept.packs[0].blake3
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"\3" + content[9:])
    with pytest.raises(ManifestError, match="version 3, algorithm 0; this qmpsnap knows up to 2"):
        rampack.table(path, side=LocalFailed)
    long = content[:-32] + (1 << 20).to_bytes(4, "little") + content[-28:]
    many = content[:-16] + (1 << 24).to_bytes(8, "little") + content[-8:]
    cut = (content[:-1], content[:7], b"", b"?" + content[1:], content[:16] + content[17:])
    for harm in (*cut, long, many):
        path.write_bytes(harm)
        with pytest.raises(DamagedData, match="pack"):
            rampack.table(path, side=LocalFailed)


def test_an_index_takes_little_memory():
    """That of 8 GiB without a page of zeros, in chunks of 32 KiB: read, looked up and written."""
    code = """
import os, resource
from array import array
from pathlib import Path
from qmpsnap.store.manifest import RamImage
from qmpsnap.store.ramindex import Index, Named

count = 1 << 18
packs = [Named(blake3="ab" * 32, bytes=1 << 40)]
block = RamImage(block="pc.ram", bytes=8 << 30, stored_pages=count * 8)
zeros = array("I", bytes(4 * count))
places = zeros, array("Q", range(count)), zeros
numbers = array("I", range(count))
content = Index(1 << 15, [block], packs, numbers, os.urandom(32 * count), places).encode()
del places, zeros, numbers
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = most()
index = Index.decode(content, Path("ram.index"))
assert index.find(index.digest(count - 1)) == count - 1
assert sum(index.used()) == 0
index.encode()
print(before, most())
"""
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, most = map(int, told.stdout.split())
    assert most - before < 40 << 10  # KiB; a dict of its digests alone took 45 MiB


def test_a_large_index_is_small_and_whole():
    """An 8 GiB guest: 131,072 chunks."""
    count = 131072
    digests = b"".join(blake3(number.to_bytes(4)).digest() for number in range(count))
    zeros = array("I", bytes(4 * count))
    lengths = array("I", [1]) * count
    packs = [Named(blake3="ab" * 32, bytes=count)]
    block = RamImage(block="pc.ram", bytes=8 << 30, stored_pages=count)
    places = zeros, array("Q", range(count)), lengths
    index = Index(1 << 16, [block], packs, array("I", range(count)), digests, places)
    content = index.encode()
    assert len(content) < 5 << 20
    back = Index.decode(content, Path("ram.index"))
    assert back.digests == digests
    assert back.find(index.digest(70000)) == 70000
    assert msgspec.structs.astuple(back.blocks[0]) == ("pc.ram", 8 << 30, count)
