"""Which chunks the RAM of a snapshot consists of: the only place that knows `ram.index`.

The file is zstd around: a line of JSON (`Header`), then one number or digest for each chunk that
is not all zeros, in columns, little-endian: its number (4 bytes; all blocks counted through, in
order), its name (32: see `chunks`), its pack (4), offset (8) and length (4) there. The index of RAM
that is encrypted is encrypted itself (`box`).
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from io import BytesIO
from itertools import pairwise
from operator import add
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from qmpsnap.errors import DamagedData, DigestMismatch
from qmpsnap.store import box
from qmpsnap.store.box import Role
from qmpsnap.store.chunks import PLAIN, Chunks, chunks_of
from qmpsnap.store.files import Side, digest_bytes, read_small
from qmpsnap.store.head import readable, version_of
from qmpsnap.store.manifest import Digest, RamImage, Size
from qmpsnap.store.pack import content_of, frame_of_all, size_of
from qmpsnap.store.rampack import CHUNK_MAX, frame_max
from qmpsnap.store.ramrows import DIGEST, Rows
from qmpsnap.store.secret import Keys, none
from qmpsnap.store.signature import KeyId

NAME = "vmstate/ram.index"
_FORMAT, _NEWEST = "qmpsnap-ram-index", 2
_COLUMNS = (("I", 4), ("B", 32), ("I", 4), ("Q", 8), ("I", 4))
_ROW = sum(size for _, size in _COLUMNS)
_LARGEST = 1 << 30  # bytes of an index: of a guest of some TiB


class Named(Struct, frozen=True, kw_only=True):
    """A pack that chunks lie in."""

    blake3: Digest
    bytes: Size


class Header(Struct, frozen=True, kw_only=True):
    """The first line of an index; *chunks* are those that are stored, encrypted with *key*."""

    format: Literal["qmpsnap-ram-index"] = "qmpsnap-ram-index"
    version: Annotated[int, Meta(ge=1, le=_NEWEST)] = 1
    key: KeyId | None = None
    chunk_bytes: Annotated[int, Meta(ge=4096, le=CHUNK_MAX, multiple_of=4096)]
    blocks: list[RamImage]
    packs: list[Named]
    chunks: Size

    def __post_init__(self) -> None:
        if (self.key is None) != (self.version == 1):
            raise ValueError("version 2 is encrypted, and version 1 is not")


class Index:
    """The stored chunks of a snapshot's RAM, one in each *row*, in the order of the RAM.

    Each column has one entry a row, but *digests*, which has 32 bytes. *chunks* knows what each
    chunk is called and stored as.
    """

    def __init__(
        self,
        chunk_bytes: int,
        blocks: Sequence[RamImage],
        packs: Sequence[Named],
        numbers: array[int],
        digests: bytes | bytearray,
        places: tuple[array[int], array[int], array[int]],
        chunks: Chunks = PLAIN,
    ) -> None:
        self.chunks = chunks
        self.chunk_bytes, self.blocks, self.packs = chunk_bytes, tuple(blocks), tuple(packs)
        self.numbers, self.digests = numbers, digests
        self.pack_numbers, self.offsets, self.lengths = places
        self._rows: Rows | None = None
        self._first = [0]
        for block in self.blocks:
            self._first.append(self._first[-1] + -(-block.bytes // chunk_bytes))

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def total(self) -> int:
        """The number of all chunks, also of those that are all zeros and not stored."""
        return self._first[-1]

    def first(self, block: int) -> int:
        """The number of the first chunk of the *block*-th block."""
        return self._first[block]

    def rows(self, block: int, start: int = 0, length: int | None = None) -> range:
        """The rows of the *block*-th block, or of those chunks that the part of it touches."""
        first, end = self._first[block], self._first[block + 1]
        if length is not None:
            end = min(end, first - (-(start + length) // self.chunk_bytes))
        first += start // self.chunk_bytes
        return range(bisect_left(self.numbers, first), bisect_left(self.numbers, end))

    def span(self, block: int, row: int) -> tuple[int, int]:
        """Where the chunk lies in its block, which is the *block*-th: offset and length, bytes."""
        at = (self.numbers[row] - self._first[block]) * self.chunk_bytes
        return at, min(self.chunk_bytes, self.blocks[block].bytes - at)

    def block_of(self, row: int) -> int:
        """Which block the chunk is of: its place in *blocks*."""
        return bisect_right(self._first, self.numbers[row]) - 1

    def digest(self, row: int) -> bytes:
        """The BLAKE3 of the chunk; the truth, where its place is a hint."""
        return bytes(self.digests[row * DIGEST : (row + 1) * DIGEST])

    def pack(self, row: int) -> Named:
        """The pack that the chunk lies in; unless it was moved."""
        return self.packs[self.pack_numbers[row]]

    def find(self, digest: bytes) -> int | None:
        """The first row of this chunk, if there is one. Before threads ask, call `ready`."""
        return self.ready().find(digest)

    def ready(self) -> Rows:
        """The table that `find` looks in."""
        if self._rows is None:
            self._rows = Rows(self.digests)
            for row in range(len(self)):
                self._rows.add(row)
        return self._rows

    def used(self) -> list[int]:
        """The bytes that the chunks take in each pack, one that is there twice counted once."""
        found = [0] * len(self.packs)
        for row, (pack, length) in enumerate(zip(self.pack_numbers, self.lengths, strict=True)):
            if self.find(self.digest(row)) == row:
                found[pack] += length
        return found

    def without(self, packs: Collection[str]) -> Index:
        """Of this only what lies in other packs than *packs*: what is known if they are lost."""
        lost = {number for number, one in enumerate(self.packs) if one.blake3 in packs}
        rows = [row for row, pack in enumerate(self.pack_numbers) if pack not in lost]
        return Index(
            self.chunk_bytes,
            self.blocks,
            self.packs,
            array("I", [self.numbers[row] for row in rows]),
            b"".join(map(self.digest, rows)),
            (
                array("I", [self.pack_numbers[row] for row in rows]),
                array("Q", [self.offsets[row] for row in rows]),
                array("I", [self.lengths[row] for row in rows]),
            ),
            self.chunks,
        )

    def encode(self) -> bytes:
        """The content of the file, in the clear."""
        header = Header(
            version=1 if self.chunks.key is None else 2,
            key=self.chunks.key,
            chunk_bytes=self.chunk_bytes,
            blocks=list(self.blocks),
            packs=list(self.packs),
            chunks=len(self),
        )
        parts = [msgspec.json.encode(header) + b"\n", _little(self.numbers), self.digests]
        parts += [_little(one) for one in (self.pack_numbers, self.offsets, self.lengths)]
        return frame_of_all(parts)

    @classmethod
    def decode(
        cls, content: bytes, path: Path, keys: Keys = none, role: Role | None = None
    ) -> Index:
        """What the file *path* holds, checked. Raises ManifestError, DamagedData, naming *path*.

        With a *role* it has to be encrypted, for that. Raises KeyMissing where it is encrypted, or
        its chunks are.
        """
        sealed = None
        if role is not None or box.is_box(content):
            reader = box.Reader(BytesIO(content), keys, path, role=role)
            content, sealed = reader.read(), reader.key
        try:
            plain = content_of(content, min(size_of(content), _LARGEST))
        except DamagedData as odd:
            raise type(odd)(f"{path}: {odd}") from odd
        head, newline, _ = plain.partition(b"\n")
        version_of(head, _FORMAT, _NEWEST, path)
        with readable(head, path):
            header = msgspec.json.decode(head, type=Header)
        if sealed is not None and header.key != sealed:
            raise DamagedData(f"{path}: is the index of chunks of another key")
        at = len(head) + len(newline)
        if len(plain) - at != header.chunks * _ROW:
            raise DamagedData(f"{path}: has not the {header.chunks} chunks that it tells of")
        columns, digests = [], b""
        for code, width in _COLUMNS:
            part = memoryview(plain)[at : at + header.chunks * width]
            if width == DIGEST:
                digests = bytes(part)
            else:
                columns.append(array(code))
                columns[-1].frombytes(part)
                _native(columns[-1])
            at += len(part)
        numbers, *places = columns
        found = cls(
            header.chunk_bytes,
            header.blocks,
            header.packs,
            numbers,
            digests,
            (places[0], places[1], places[2]),
            chunks_of(header.key, keys),
        )
        found._check(path)
        return found

    def _check(self, path: Path) -> None:
        if any(one >= other for one, other in pairwise(self.numbers)) or (
            len(self) and self.numbers[-1] >= self.total
        ):
            raise DamagedData(f"{path}: its chunks are not in order, or more than the RAM has")
        if len(self) and max(self.pack_numbers) >= len(self.packs):
            raise DamagedData(f"{path}: names a pack that it does not list")
        if len(self) and max(self.lengths) > frame_max(self.chunk_bytes):
            raise DamagedData(f"{path}: a chunk is longer in its pack than one can be")
        sizes = [one.bytes for one in self.packs]
        ends = map(add, self.offsets, self.lengths)
        if any(end > sizes[pack] for end, pack in zip(ends, self.pack_numbers, strict=True)):
            raise DamagedData(f"{path}: a chunk lies behind the end of its pack")


def read(
    path: Path,
    *,
    side: Side,
    blake3: str | None = None,
    keys: Keys = none,
    role: Role | None = None,
) -> Index:
    """The index in the file *path*, whose digest must be *blake3*, where that is known.

    With a *role* it has to be encrypted, for that, with one of the *keys*.

    Raises *side*, DigestMismatch, ManifestError and DamagedData, which name *path*; KeyMissing.
    """
    content = read_small(path, side=side, limit=_LARGEST)
    if blake3 is not None and digest_bytes(content) != blake3:
        raise DigestMismatch(f"{path}: the content is not what the manifest says (BLAKE3)")
    return Index.decode(content, path, keys, role)


def _little(column: array[int]) -> bytes:
    return _native(array(column.typecode, column)).tobytes()


def _native(column: array[int]) -> array[int]:
    if sys.byteorder == "big":
        column.byteswap()
    return column
