"""Sealed images: they read as what was written, and whatever was altered is never taken."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from qmpsnap.errors import DamagedData, KeyMissing, LocalFailed, ManifestError, NotAuthentic
from qmpsnap.store import sealed
from qmpsnap.store.clusters import CLUSTER
from qmpsnap.store.envelope import FRAME, Role
from qmpsnap.store.sealed import Sealed, opened_sealed
from qmpsnap.store.sealedchain import SealedChain, same
from qmpsnap.store.sealedindex import Index, Run
from qmpsnap.store.secret import Secret, none, secret_of
from qmpsnap.store.sink import Cancelled
from tests.rig.halves import names

KEY, OTHER = secret_of(b"k" * 32), secret_of(b"o" * 32)
ID, LATER = "20261122T100000000Z", "20261122T110000000Z"
ROLE = Role("web", ID, "vda.sealed")
SIZE = 24 * CLUSTER


def keys(key: str) -> Secret:
    return {KEY.key: KEY, OTHER.key: OTHER}[key]


def write(
    path: Path,
    content: bytes,
    extents: list[tuple[int, int]] | None = None,
    *,
    on: str = "",
    secret: Secret = KEY,
    role: Role = ROLE,
    compress: bool = False,
    reserve: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
) -> int:
    return sealed.write(
        path,
        secret=secret,
        role=role,
        virtual_size=len(content),
        on=on,
        extents=[(0, len(content))] if extents is None else extents,
        read=lambda pieces: [content[at : at + length] for at, length in pieces],
        compress=compress,
        reserve=reserve,
        limit=None,
        cancelled=cancelled,
        on_progress=None,
    )


def read(*paths: Path, role: Role | None = None, by: Callable[[str], Secret] = keys) -> bytes:
    """The disk that the images *paths*, top first, are."""
    with ExitStack() as stack:
        chain = SealedChain([stack.enter_context(opened_sealed(path, by, role)) for path in paths])
        return bytes(chain.read([(0, chain.virtual_size)])[0])


def disk(seed: int, clusters: int = 24) -> bytes:
    """A third of it zeros, a third hard to compress, a third easy."""
    dice = random.Random(seed)
    kinds = (bytes(CLUSTER), dice.randbytes(CLUSTER), b"\7" * CLUSTER)
    return b"".join(dice.choice(kinds) for _ in range(clusters))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("size", [512, CLUSTER, SIZE, SIZE + 512, FRAME - 512])
def test_what_was_written_comes_back(tmp_path: Path, size: int, compress: bool) -> None:
    content = disk(3, 30)[:size]
    path = tmp_path / "a"
    written = write(path, content, compress=compress)
    assert read(path, role=ROLE) == content
    status = path.stat()
    assert (status.st_size, status.st_mode & 0o777) == (written, 0o600)
    assert names(tmp_path) == ["a"]
    (tmp_path / "b").write_bytes(b"")
    with pytest.raises(LocalFailed, match="exists"):
        write(tmp_path / "b", content)


def test_zeros_cost_nothing_and_compressing_less(tmp_path: Path) -> None:
    content = bytes(20 * CLUSTER) + b"\7" * 4 * CLUSTER
    plainly = write(tmp_path / "a", content)
    assert plainly < 4 * CLUSTER + 1000
    assert write(tmp_path / "b", content, compress=True) < 2000
    assert write(tmp_path / "c", bytes(SIZE)) < 1000
    assert read(tmp_path / "a") == read(tmp_path / "b") == content
    assert read(tmp_path / "c") == bytes(SIZE)


def test_nothing_can_be_read_there_nor_is_it_the_same_twice(tmp_path: Path) -> None:
    content = disk(5)
    for name in "ab":
        write(tmp_path / name, content, on="20261122T100000000Z")
    one, other = ((tmp_path / name).read_bytes() for name in "ab")
    marks = [content[at : at + 32] for at in range(0, SIZE, CLUSTER)]
    assert not [mark for mark in marks if mark.strip(b"\0") and mark in one]
    assert one.count(ID.encode()) == 1  # of the role
    assert one[200:] != other[200:]


extents = some.lists(
    some.tuples(some.integers(0, 23), some.integers(1, 8)).map(
        lambda one: (one[0] * CLUSTER, min(one[1], 24 - one[0]) * CLUSTER)
    ),
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(some.lists(extents, min_size=1, max_size=4), some.booleans())
def test_a_chain_reads_as_the_newest_that_was_written(
    tmp_path_factory: pytest.TempPathFactory, layers: list[list[tuple[int, int]]], compress: bool
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    model, paths = bytearray(disk(0)), [folder / "0"]
    write(paths[0], bytes(model), compress=compress)
    for number, dirty in enumerate(layers, 1):
        now = disk(number)
        for at, length in dirty:
            model[at : at + length] = now[at : at + length]
        paths.insert(0, folder / str(number))
        write(paths[0], bytes(model), dirty, on=LATER, compress=not compress)
    assert read(*paths) == bytes(model)
    with ExitStack() as stack:
        images = [stack.enter_context(opened_sealed(one, keys, None)) for one in paths]
        chain, upper = SealedChain(images), SealedChain(images[:-1])
        starts = [at * CLUSTER for at in range(24)]
        pieces = chain.read([(at, CLUSTER) for at in starts])
        assert [bytes(one) for one in pieces] == [bytes(model[at : at + CLUSTER]) for at in starts]
        dirty_ones = {at // CLUSTER for one in layers for at in _clusters(one)}
        assert {at // CLUSTER for at in _clusters(upper.extents(zeros=True))} == dirty_ones
        data = {at // CLUSTER for at in _clusters(chain.extents(zeros=False))}
        assert data == {at for at in range(24) if any(model[at * CLUSTER : (at + 1) * CLUSTER])}
        # put together it is the same, and what it is not can be told
        merged, other = folder / "merged", folder / "other"
        write(merged, bytes(model), upper.extents(zeros=True), on=LATER)
        with opened_sealed(merged, keys, None) as one:
            assert same(SealedChain([one]), upper, zeros=True, on_bytes=lambda _: None)
        if dirty_ones:
            at = CLUSTER * max(dirty_ones)
            model[at] ^= 1
            write(other, bytes(model), upper.extents(zeros=True), on=LATER)
            with opened_sealed(other, keys, None) as one:
                assert not same(SealedChain([one]), upper, zeros=True, on_bytes=lambda _: None)


def _clusters(ranges: list[tuple[int, int]]) -> list[int]:
    return [at for offset, length in ranges for at in range(offset, offset + length, CLUSTER)]


def test_every_byte_counts(tmp_path: Path) -> None:
    good, harmed = tmp_path / "a", tmp_path / "b"
    write(good, b"0123456789abcdef" * 4096, on=LATER)
    content = good.read_bytes()
    middle = range(200, len(content) - 400, 1777)
    for at in (*range(200), *middle, *range(len(content) - 400, len(content))):
        harmed.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises((DamagedData, KeyError)):
            sealed.check(harmed, keys, ROLE)
        with pytest.raises((DamagedData, KeyError)):
            read(harmed)
    for size in (0, 10, 64, 120, len(content) // 2, len(content) - 25, len(content) - 1):
        harmed.write_bytes(content[:size])
        with pytest.raises(DamagedData):
            sealed.check(harmed, keys, ROLE)
    for more in (content + b"\0", content + content[-24:], content[:100] + content[100:] * 2):
        harmed.write_bytes(more)
        with pytest.raises(DamagedData):
            sealed.check(harmed, keys, ROLE)


@settings(max_examples=60, deadline=None)
@given(some.data())
def test_whatever_becomes_of_it_it_is_as_it_was_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: some.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("harm")
    plain = disk(9, 14)
    write(folder / "a", plain, compress=data.draw(some.booleans()))
    content = bytearray((folder / "a").read_bytes())
    at = data.draw(some.integers(0, len(content) - 1))
    match data.draw(some.sampled_from(["flip", "cut", "insert", "remove", "copy"])):
        case "flip":
            content[at] ^= 1 << data.draw(some.integers(0, 7))
        case "cut":
            del content[at:]
        case "insert":
            content[at:at] = data.draw(some.binary(min_size=1, max_size=40))
        case "remove":
            del content[at : at + data.draw(some.integers(1, FRAME))]
        case "copy":
            other = data.draw(some.integers(0, len(content) - 1))
            content[at : at + 16] = content[other : other + 16]
    (folder / "b").write_bytes(content)
    try:
        assert read(folder / "b", role=ROLE) == plain
        assert content == (folder / "a").read_bytes()
    except (DamagedData, KeyError):
        pass


def test_frames_are_where_they_were(tmp_path: Path) -> None:
    """Frames that were swapped, left out, doubled, or of another file of the same key and place."""
    plain = random.Random(1).randbytes(3 * FRAME)
    for name in "ab":
        write(tmp_path / name, plain)
    ours, theirs = (bytearray((tmp_path / name).read_bytes()) for name in "ab")
    head, step = 64 + len(ROLE.spelled), FRAME + 16
    frames = [bytes(ours[head + step * n :][:step]) for n in range(3)]
    foreign = bytes(theirs[head + step :][:step])
    rest = bytes(ours[head + 3 * step :])
    assert ours == ours[:head] + b"".join(frames) + rest
    first, second, third = frames
    for other in ([second, first, third], [first, foreign, third], [first, first, third]):
        (tmp_path / "c").write_bytes(ours[:head] + b"".join(other) + rest)
        with pytest.raises(NotAuthentic, match="cannot be decrypted at"):
            sealed.check(tmp_path / "c", keys, ROLE)
    # what lies before it is good
    with opened_sealed(tmp_path / "c", keys, ROLE) as image:
        assert image.frame(0) == plain[:FRAME]
        with pytest.raises(NotAuthentic):
            image.frame(1)
    for fewer in ([first, second], [first, third], [*frames, third]):
        moved = bytearray(rest)
        begun = struct.unpack_from("<Q", rest, len(rest) - 24)[0] + step * (len(fewer) - 3)
        struct.pack_into("<Q", moved, len(rest) - 24, begun)
        (tmp_path / "c").write_bytes(ours[:head] + b"".join(fewer) + moved)
        with pytest.raises(NotAuthentic, match="do not fill"):
            sealed.check(tmp_path / "c", keys, ROLE)
    # the index of another file, and a frame of data in its place
    for end in (theirs[head + 3 * step :], frames[0][: len(rest) - 24] + rest[-24:]):
        (tmp_path / "c").write_bytes(ours[: head + 3 * step] + end)
        with pytest.raises(NotAuthentic, match="cannot be decrypted at"):
            sealed.check(tmp_path / "c", keys, ROLE)


def test_of_another_place_or_key_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vda.sealed"
    write(path, disk(1))
    for role in (
        Role("mail", *ROLE[1:]),
        Role("web", LATER, "vda.sealed"),
        Role("web", f"{ID}/{LATER}", "vda.sealed"),
        Role("web", ID, "vdb.sealed"),
    ):
        with pytest.raises(NotAuthentic, match="of another place"):
            sealed.check(path, keys, role)
    with pytest.raises(KeyMissing, match=KEY.key):
        sealed.check(path, none, ROLE)
    with pytest.raises(NotAuthentic):
        sealed.check(path, lambda key: Secret(key, OTHER.content), ROLE)
    path.write_bytes(disk(1))
    with pytest.raises(ManifestError, match="is not encrypted, and should be"):
        sealed.check(path, keys, ROLE)
    with pytest.raises(LocalFailed, match=r"none\.sealed"):
        sealed.check(tmp_path / "none.sealed", keys, ROLE)


def test_an_index_of_many_frames_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    size = 40_000 * 2 * CLUSTER
    ranges = [(at * 2 * CLUSTER, CLUSTER) for at in range(40_000)]
    one = os.urandom(CLUSTER)

    def given(pieces: list[tuple[int, int]]) -> list[bytes]:
        return [one if at == 0 else bytes(length) for at, length in pieces]

    sealed.write(
        path, secret=KEY, role=ROLE, virtual_size=size, on=LATER, extents=ranges,
        read=given,  # type: ignore[arg-type]
        compress=False, reserve=0, limit=None, cancelled=lambda: False, on_progress=None,
    )  # fmt: skip
    index = sealed.check(path, keys, ROLE)
    assert (index.on, len(index.runs), index.data_bytes) == (LATER, 40_000, CLUSTER)
    assert path.stat().st_size > 2 * FRAME
    content = path.read_bytes()
    cut = content[: -24 - 16 - 100_000] + content[-24:]
    path.write_bytes(cut)
    with pytest.raises(NotAuthentic):
        sealed.check(path, keys, ROLE)


def test_an_odd_index_is_refused(tmp_path: Path) -> None:
    """Whoever has the key may have written it: what is taken from it must still be sound."""
    good = Index(SIZE, LATER, False, [Run(0, 2, False), Run(5, 1, True)], [2 * CLUSTER + 16])
    assert Index.decode(good.encode(), tmp_path) == good
    for wrong in (
        replace(good, runs=[Run(5, 1, True), Run(0, 2, False)]),
        replace(good, runs=[Run(0, 2, False), Run(1, 1, True)]),
        replace(good, runs=[Run(23, 2, False)]),
        replace(good, runs=[Run(0, 0, True), Run(0, 2, False)]),
        replace(good, stored=[]),
        replace(good, stored=[100]),
        replace(good, stored=[16], compressed=True),
        replace(good, stored=[2 * CLUSTER + 17], compressed=True),
        replace(good, stored=[2 * CLUSTER + 16] * 2),
        replace(good, virtual_size=CLUSTER),
    ):
        with pytest.raises(ManifestError, match="the index has"):
            Index.decode(wrong.encode(), tmp_path)
    content = good.encode()
    for harmed in (b"", content[:-1], content + b"\0", b"\0" * len(content)):
        with pytest.raises(ManifestError, match="the index"):
            Index.decode(harmed, tmp_path)


def test_nothing_is_left_of_one_that_came_to_nothing(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        write(tmp_path / "a", disk(1), cancelled=lambda: True)
    with pytest.raises(LocalFailed, match="no room"):
        write(tmp_path / "a", disk(1), reserve=1 << 60)
    assert names(tmp_path) == []


def test_a_frame_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(2).randbytes(4 * FRAME)
    write(tmp_path / "a", content)
    seen: list[int] = []
    real = Sealed._opened

    def counted(self: Sealed, number: int) -> bytes:
        seen.append(number)
        return real(self, number)

    monkeypatch.setattr(Sealed, "_opened", counted)
    with opened_sealed(tmp_path / "a", keys, ROLE) as image:
        chain = SealedChain([image])
        pieces = [(at, CLUSTER) for at in range(0, len(content), CLUSTER)]
        assert b"".join(chain.read(pieces)) == content
    assert seen == [0, 1, 2, 3]


def test_zeros_that_cover_what_lies_beneath_are_told_apart(tmp_path: Path) -> None:
    content = bytes(4 * CLUSTER) + b"\5" * CLUSTER + bytes(CLUSTER)
    write(tmp_path / "a", content, on=LATER)
    write(tmp_path / "b", content, [(4 * CLUSTER, CLUSTER)], on=LATER)
    with (
        opened_sealed(tmp_path / "a", keys, ROLE, KEY.key) as a,
        opened_sealed(tmp_path / "b", keys, ROLE) as b,
    ):
        one, other = SealedChain([a]), SealedChain([b])
        assert same(one, other, zeros=False, on_bytes=lambda _: None)
        assert not same(one, other, zeros=True, on_bytes=lambda _: None)
        # beneath the first one nothing is seen, beneath the other one all but its cluster
        assert SealedChain([a, b]).runs() == one.runs()
        assert SealedChain([b, a]).runs() == one.runs()
    with pytest.raises(NotAuthentic, match=f"not with {OTHER.key}"):
        sealed.check(tmp_path / "a", keys, ROLE, OTHER.key)
