"""Encrypted files and chunks: nothing that was altered, moved or of another key is ever taken."""

from __future__ import annotations

import os
import shutil
from io import BytesIO
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from qmpsnap.errors import (
    DamagedData,
    DigestMismatch,
    KeyMissing,
    LocalFailed,
    ManifestError,
    NotAuthentic,
    PacksMissing,
    StoreError,
)
from qmpsnap.store import box, chunking, contents, half, rampack, removal, wire
from qmpsnap.store.box import FRAME, Reader, Role
from qmpsnap.store.chunks import PLAIN, Encrypted
from qmpsnap.store.layout import MANIFEST
from qmpsnap.store.manifest import Manifest, decode
from qmpsnap.store.secret import Secret, none, secret_of
from tests.rig.halves import FILES
from tests.rig.packed import CHUNK, IDS, SIZE, Series, quiet, sparse, taken
from tests.rig.ram import page, write_image

KEY, OTHER = secret_of(b"k" * 32), secret_of(b"o" * 32)
ROLE = Role("web", IDS[0], "machine.json")
HERE = Path("machine.json")


def keys(key: str) -> Secret:
    return {KEY.key: KEY, OTHER.key: OTHER}[key]


def opened(content: bytes, role: Role | None = ROLE, key: str | None = None) -> bytes:
    return Reader(BytesIO(content), keys, HERE, role=role, key=key).read()


@settings(max_examples=40, deadline=None)
@given(some.binary(max_size=300) | some.sampled_from([FRAME - 1, FRAME, FRAME + 1, 2 * FRAME]))
def test_what_is_encrypted_comes_back(content):
    plain = os.urandom(content) if isinstance(content, int) else content
    sealed = box.sealed_bytes(plain, KEY, ROLE)
    assert opened(sealed) == opened(sealed, None) == opened(sealed, key=KEY.key) == plain
    assert len(sealed) == 64 + len(ROLE.spelled) + len(plain) + 16 * max(1, -(-len(plain) // FRAME))
    assert len(plain) < 16 or plain not in sealed
    assert box.sealed_bytes(plain, KEY, ROLE) != sealed


def test_it_comes_in_any_pieces():
    plain = os.urandom(2 * FRAME + 5)
    reader = Reader(BytesIO(box.sealed_bytes(plain, KEY, ROLE)), keys, HERE, role=ROLE)
    parts = [reader.read(18), reader.read(FRAME)]
    while part := reader.read(1000):
        parts.append(part)
    assert b"".join(parts) == plain
    assert (reader.read(1), reader.read()) == (b"", b"")


def test_every_bit_counts():
    sealed = box.sealed_bytes(b"0123456789", KEY, ROLE)
    for at in range(len(sealed)):
        for bit in (1, 0x80):
            harm = bytearray(sealed)
            harm[at] ^= bit
            with pytest.raises((DamagedData, KeyError)):
                opened(bytes(harm))
            with pytest.raises((DamagedData, KeyError)):
                opened(bytes(harm), None)


def test_frames_are_where_they_were_and_all_there():
    plain = os.urandom(3 * FRAME)
    sealed = box.sealed_bytes(plain, KEY, ROLE)
    head, step = 64 + len(ROLE.spelled), FRAME + 16
    first, second, third = (sealed[head + step * n : head + step * (n + 1)] for n in range(3))
    assert opened(sealed[:head] + first + second + third) == plain
    another = box.sealed_bytes(plain, KEY, ROLE)
    for frames in (
        [],
        [first],
        [first, second],
        [first, third],
        [second, first, third],
        [first, second, third, third],
        [first, second, third[:-1]],
        [first, second[:-1], third],
        [first, another[head + step : head + 2 * step], third],
    ):
        with pytest.raises(NotAuthentic, match="cannot be decrypted from"):
            opened(sealed[:head] + b"".join(frames))
    # what comes before is authentic
    reader = Reader(BytesIO(sealed[: head + 2 * step]), keys, HERE, role=ROLE)
    assert reader.read(FRAME) == plain[:FRAME]
    with pytest.raises(NotAuthentic):
        reader.read(FRAME)


def test_a_file_of_another_place_or_key_is_refused():
    for role in (
        Role("mail", *ROLE[1:]),
        Role("web", IDS[1], "machine.json"),
        Role("web", IDS[0], "usage.json"),
        Role("web", "", "shared"),
    ):
        with pytest.raises(NotAuthentic, match="of another place"):
            opened(box.sealed_bytes(b"{}", KEY, role))
    sealed = box.sealed_bytes(b"{}", KEY, ROLE)
    with pytest.raises(NotAuthentic, match=f"with the key {KEY.key}, not with {OTHER.key}"):
        opened(sealed, key=OTHER.key)
    with pytest.raises(KeyMissing, match=KEY.key) as missing:
        Reader(BytesIO(sealed), none, HERE, role=ROLE)
    assert "keys import" in missing.value.hint
    with pytest.raises(NotAuthentic):
        Reader(BytesIO(sealed), lambda key: Secret(key, OTHER.content), HERE, role=ROLE).read()
    with pytest.raises(ManifestError, match="is not encrypted, and should be"):
        opened(b"{}" * 100)
    newer = sealed[:8] + b"\2" + sealed[9:]
    with pytest.raises(ManifestError, match="version 2"):
        opened(newer)


def test_a_secret_is_not_shown():
    assert "6b6b" not in f"{KEY!r}{KEY}"
    assert KEY.key in repr(KEY)


@pytest.fixture
def series(tmp_path: Path) -> Series:
    return Series(tmp_path, secret=KEY)


def test_a_series_is_whole_through_all_that_becomes_of_it(series: Series) -> None:
    taken(series)
    series.whole(*IDS)
    for id in (IDS[0], IDS[3]):
        series.remove(id)
        series.whole(*(one for one in IDS if one > id and one != IDS[3]))
    stored = b"".join(path.read_bytes() for path in series.store.path.rglob("*") if path.is_file())
    plain = [page((at, 0, False))[:64] for at in range(64)] + [FILES["machine.json"]]
    assert not [one for one in plain if one in stored]


def test_what_is_left_of_a_pack_is_moved_with_the_key_only(series: Series) -> None:
    left = sparse(series)
    old = [path.name for path in series.store.shared("web").iterdir()]
    with_keys, series.keys = series.keys, none
    series.remove(IDS[0])
    assert sorted(path.name for path in series.store.shared("web").iterdir()) == sorted(old)
    for id in left:
        assert series.verify(id) == []
    series.keys = with_keys
    series.whole(*left)
    request = wire.Sweep(root=str(series.store.path), vm="web")
    removal.sweep(series.store, request.vm, quiet, keys=series.keys)
    there = {path.name for path in series.store.shared("web").iterdir()}
    assert any(name.endswith(".moved") for name in there)
    for name in there:
        if len(name) == 64:
            assert rampack.key_of(series.store.shared("web") / name, side=StoreError) == KEY.key
    series.whole(*left)


def test_lost_packs_are_made_again(series: Series) -> None:
    series.spool(IDS[0], {at: page(at) for at in range(64)})
    series.ship(IDS[0])
    (pack,) = (path for path in series.store.shared("web").iterdir())
    content = pack.read_bytes()
    series.spool(IDS[1], {at: page(at) for at in range(64)}, IDS[0])
    pack.unlink()
    with pytest.raises(PacksMissing) as lost:
        series.ship(IDS[1])
    again = series.remade(IDS[0], lost.value)
    # the same chunks make the same pack, as ever
    assert [one.blake3 for one in again.values()] == [pack.name]
    series.ship(IDS[1], again)
    assert pack.read_bytes() == content
    series.whole(*IDS[:2])


def test_in_the_clear_and_encrypted_share_nothing(tmp_path: Path) -> None:
    series = Series(tmp_path)
    pages = {at: page(at) for at in range(64)}
    for number, secret in enumerate([None, KEY, None, OTHER, KEY]):
        series.secret, series.keys = secret, keys
        own = [one for one in IDS[:number] if series.known[one].chunks.key == _key(secret)]
        others = set(IDS[:number]) - set(own)
        for one in others:
            with pytest.raises(AssertionError):
                series.spool(IDS[4], pages, one)
            shutil.rmtree(series.local.snapshot("web", IDS[4]))
            (tmp_path / IDS[4] / "pc.ram").unlink()
        made = series.spool(IDS[number], pages, *own)
        assert [one.fresh for one in made.packs] == ([False] if own else [True])
        series.ship(IDS[number])
    series.whole(*IDS)
    # page images of the one are no neighbours of the other
    near = tmp_path / "near"
    near.mkdir()
    shutil.copy(tmp_path / IDS[0] / "pc.ram", near / "0.pages")
    (near / "ram.index").write_bytes(series.known[IDS[0]].encode())
    to = tmp_path / "to"
    to.mkdir()
    fill = wire.Fill(
        root=str(series.store.path), vm="web", id=IDS[1], seal=None, to=str(to), near=[str(near)]
    )
    filled = half.fill(series.store, fill, quiet, keys=keys)
    assert filled.near_bytes == 0
    assert (to / "0.pages").read_bytes() == (near / "0.pages").read_bytes()


def _key(secret: Secret | None) -> str | None:
    return secret.key if secret is not None else None


def test_what_is_spoilt_or_swapped_is_damage(series: Series, tmp_path: Path) -> None:
    taken(series, 2)
    root = series.store
    for path in sorted(one for one in root.vm("web").rglob("*") if one.is_file()):
        kept = path.read_bytes()
        if path.name != MANIFEST:
            for harm in (kept[:-1], kept + b"\0", kept[:90] + bytes([kept[90] ^ 1]) + kept[91:]):
                path.write_bytes(harm)
                assert [one for id in IDS[:2] for one in series.verify(id)], path
            path.write_bytes(kept)
    series.whole(*IDS[:2])
    # a manifest that somebody trusted has signed for files of another place
    spool = root.snapshot("web", IDS[0])
    manifest = decode((spool / MANIFEST).read_bytes(), Manifest, spool)
    other = decode((root.snapshot("web", IDS[1]) / MANIFEST).read_bytes(), Manifest, spool)
    swapped = msgspec.structs.replace(manifest, files=other.files, encryption=other.encryption)
    (spool / MANIFEST).write_bytes(msgspec.json.encode(swapped))
    for one in other.files:
        shutil.copy(root.snapshot("web", IDS[1]) / one.name, spool / one.name)
    names = {one.file for one in series.verify(IDS[0])}
    assert names == {MANIFEST, *(one.name for one in other.files)}
    request = wire.Read(root=str(root.path), vm="web", id=IDS[0], seal=None, name="machine.json")
    with pytest.raises(NotAuthentic, match="of another place"):
        half.read(root, request, keys)
    with pytest.raises(NotAuthentic):
        contents.unsealed(swapped, keys)
    key = msgspec.structs.replace(manifest.encryption, sealed="?")
    with pytest.raises(ManifestError, match="base64"):
        contents.unsealed(msgspec.structs.replace(manifest, encryption=key), keys)


def test_chunks_have_names_of_the_key(tmp_path: Path) -> None:
    content = page(1)
    ours, theirs = Encrypted(KEY), Encrypted(OTHER)
    names = {kind.digest(content) for kind in (PLAIN, ours, theirs)}
    assert len(names) == 3
    name = ours.digest(content)
    frame = ours.frame(content, name)
    assert ours.frame(content, name) == frame
    assert ours.content(frame, name, len(content)) == content
    for kind, bound in ((theirs, name), (ours, theirs.digest(content)), (PLAIN, name)):
        with pytest.raises(DigestMismatch):
            kind.content(frame, bound, len(content))
    for harm in (frame[:-1], b"", bytes([frame[0] ^ 1]) + frame[1:], frame + b"\0"):
        with pytest.raises(DigestMismatch):
            ours.content(harm, name, len(content))
    with pytest.raises(DigestMismatch):
        ours.content(frame, name, len(content) - 1)

    (tmp_path / "to").mkdir()
    image = [write_image(tmp_path / "pc.ram", {0: content}, SIZE)]
    kept = chunking.keep(
        image, tmp_path / "to", [], stored_pages=[1], chunk_bytes=CHUNK, chunks=ours
    )
    path = tmp_path / "to" / kept.packs[0].blake3
    assert rampack.key_of(path, side=LocalFailed) == KEY.key
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DamagedData, match="is no pack"):
        rampack.key_of(path, side=LocalFailed)
