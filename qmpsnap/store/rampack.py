"""A pack of RAM chunks as a file: the only place that knows its bytes.

    0     8   QSNPPACK
    8     8   version 1, and 4 bytes of zeros; version 2, and algorithm 1: encrypted
    16    8   version 2 only: the ID of the key that it is encrypted with
    ...       frames (see `chunks`), a chunk in each, one behind the other
    table     48 bytes a frame: name of the chunk (32), offset (8), length (4), its own length (4)
    -24   24  offset of the table, number of frames, QSNPEND1

Numbers are little-endian. A pack is called by the BLAKE3 of all of it. Nothing of it changes when
frames are taken into another pack, of the same key.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

from blake3 import blake3

from qmpsnap.errors import DamagedData, LocalFailed, ManifestError, StoreError
from qmpsnap.store.aead import TAG_BYTES
from qmpsnap.store.chunks import chunks_of
from qmpsnap.store.files import Progress, Side, opened, read_back, sync_folder, told, write_all
from qmpsnap.store.layout import PARTIAL
from qmpsnap.store.manifest import FileEntry, Pack
from qmpsnap.store.secret import Keys

_HEAD = struct.Struct("<8sII")
_ROW = struct.Struct("<32sQII")
_FOOT = struct.Struct("<QQ8s")
_MAGIC, _PLAIN, _ENCRYPTED, _END = b"QSNPPACK", 1, 2, b"QSNPEND1"
_AES_256_SIV = 1
_KEY_BYTES = 8
_SYNC_EVERY = 32 << 20
CHUNK_MAX = 16 << 20
"""Bytes that a chunk may have; more is not believed."""
ROWS = 1 << 18
"""Chunks after which a pack is closed: its table is read as a whole."""
_ROWS_MAX = 4 * ROWS  # some that were made good have those of several


class Frame(NamedTuple):
    """Where a chunk lies in a pack, and how long it is, as stored and as it was."""

    offset: int
    length: int
    raw: int


def frame_max(raw: int) -> int:
    """Bytes that the frame of a chunk of *raw* bytes may have (zstd.h: ZSTD_COMPRESSBOUND)."""
    return raw + (raw >> 8) + 64 + TAG_BYTES


class Writer:
    """A pack being written into *folder*, under a name of its own until it is whole.

    *key*: the ID of the key that all of its chunks are encrypted with.
    """

    def __init__(self, folder: Path, *, key: str | None = None, side: Side = LocalFailed) -> None:
        self._path, self._side = folder / f"{token_hex(8)}{PARTIAL}", side
        self.key = key
        self._hasher, self._table = blake3(), bytearray()
        self.bytes = self.rows = self._synced = 0
        self.anew = True
        """False when `close` has found that the same pack was there already."""
        with told(self._path, side):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if key is None:
                self._write(_HEAD.pack(_MAGIC, _PLAIN, 0))
            else:
                head = _HEAD.pack(_MAGIC, _ENCRYPTED, _AES_256_SIV)
                self._write(head + bytes.fromhex(key))
        except BaseException:
            self.discard()
            raise

    def add(self, digest: bytes, frame: bytes | memoryview, raw: int) -> int:
        """Append the *frame* of the chunk *digest*, of *raw* bytes: its offset. Raises *side*."""
        offset = self.bytes
        self.rows += 1
        self._write(frame)
        self._table += _ROW.pack(digest, offset, len(frame), raw)
        return offset

    def close(self, on_progress: Progress | None = None) -> Pack:
        """The pack is whole, durable and under its name then, which may have been there before.

        On the store it was read back. Raises *side*.
        """
        at, count = self.bytes, len(self._table) // _ROW.size
        self._write(bytes(self._table) + _FOOT.pack(at, count, _END))
        digest = self._hasher.hexdigest()
        name = FileEntry(name=f"shared/{digest}", bytes=self.bytes, blake3=digest)
        path = self._path.with_name(digest)
        with told(self._path, self._side):
            if self._side is StoreError:
                read_back(self._descriptor, self._path, name, on_progress, self._side)
            os.fsync(self._descriptor)
            self.anew = not os.path.lexists(path)
            self._path.replace(path)
            os.close(self._descriptor)
            sync_folder(path.parent)
        return Pack(blake3=digest, bytes=self.bytes)

    def discard(self) -> None:
        """Nothing is left of it; after `close`, nothing is done."""
        with suppress(OSError):
            self._path.unlink()
            os.close(self._descriptor)

    def _write(self, content: bytes | memoryview) -> None:
        self._hasher.update(content)
        self.bytes += len(content)
        with told(self._path, self._side):
            write_all(self._descriptor, content)
            if self.bytes - self._synced >= _SYNC_EVERY:
                os.fdatasync(self._descriptor)
                self._synced = self.bytes


def key_of(path: Path, *, side: Side) -> str | None:
    """The ID of the key that the pack *path* is encrypted with; None: it is not.

    Raises *side*, DamagedData, ManifestError.
    """
    with opened(path, side) as descriptor:
        return _key_of(path, os.pread(descriptor, _HEAD.size + _KEY_BYTES, 0))


def _key_of(path: Path, head: bytes) -> str | None:
    if len(head) < _HEAD.size or head[:8] != _MAGIC:
        raise DamagedData(f"{path}: is no pack")
    _, version, algorithm = _HEAD.unpack(head[: _HEAD.size])
    if version == _PLAIN:
        return None
    if (version, algorithm) != (_ENCRYPTED, _AES_256_SIV):
        raise ManifestError(
            f"{path}: is a pack of version {version}, algorithm {algorithm}; this qmpsnap knows up "
            f"to {_ENCRYPTED} and {_AES_256_SIV}",
            hint="use the qmpsnap that wrote it, or a newer one",
        )
    if len(head) < _HEAD.size + _KEY_BYTES:
        raise DamagedData(f"{path}: is no pack")
    return head[_HEAD.size : _HEAD.size + _KEY_BYTES].hex()


def table(path: Path, *, side: Side) -> dict[bytes, Frame]:
    """What is in the pack *path*, by the names of the chunks.

    Raises *side*, DamagedData for what is no pack, and ManifestError for one of a newer version.
    """
    with opened(path, side) as descriptor:
        size = os.fstat(descriptor).st_size
        _key_of(path, os.pread(descriptor, _HEAD.size + _KEY_BYTES, 0))
        foot = os.pread(descriptor, _FOOT.size, max(0, size - _FOOT.size))
        if len(foot) < _FOOT.size:
            raise DamagedData(f"{path}: is no pack")
        at, count, end = _FOOT.unpack(foot)
        if count > _ROWS_MAX:
            raise DamagedData(f"{path}: is a pack of {count} chunks, more than are believed")
        if end != _END or at + count * _ROW.size + _FOOT.size != size:
            raise DamagedData(f"{path}: is a pack without its end")
        rows = os.pread(descriptor, count * _ROW.size, at)
    if len(rows) != count * _ROW.size:
        raise DamagedData(f"{path}: is a pack without its end")
    found = {row[0]: Frame(*row[1:]) for row in _ROW.iter_unpack(rows)}
    if any(
        one.offset + one.length > at or one.raw > CHUNK_MAX or one.length > frame_max(one.raw)
        for one in found.values()
    ):
        raise DamagedData(f"{path}: is a pack whose table leads out of it")
    return found


def copy(
    path: Path,
    frames: Mapping[bytes, Frame],
    writer: Writer,
    written: set[bytes],
    keys: Keys,
    progress: Progress | None,
) -> None:
    """Append *frames* of the pack *path*, which is on the store; those that are *written* are.

    Raises StoreError, DigestMismatch for a chunk that is damaged, DamagedData for a pack of another
    key than the one that is written; KeyMissing: what cannot be checked is not moved.
    """
    chunks = chunks_of(key_of(path, side=StoreError), keys)
    if chunks.key != writer.key:
        raise DamagedData(f"{path}: is encrypted with another key than what it is to be moved to")
    with opened(path, StoreError) as reading:
        for digest, frame in sorted(frames.items(), key=lambda one: one[1].offset):
            if digest in written:
                continue
            content = os.pread(reading, frame.length, frame.offset)
            chunks.content(content, digest, frame.raw)
            writer.add(digest, content, frame.raw)
            written.add(digest)
            if progress is not None:
                progress(writer.bytes, 0, "moving RAM that is still needed")
