"""Packs and index of a snapshot's RAM as they grow: the only place that says where a chunk goes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.errors import LocalFailed
from qmpsnap.store.chunks import PLAIN, Chunks
from qmpsnap.store.manifest import Pack, RamImage
from qmpsnap.store.ramindex import Index, Named
from qmpsnap.store.rampack import ROWS, Writer
from qmpsnap.store.ramrows import Rows


@dataclass(frozen=True, slots=True)
class Kept:
    """RAM that is in packs now. *index* is the file's content, *known* is what it says.

    *packs* are all that it needs, *fresh* those that were written just now; *chunks* are stored in
    all (zeros are not), *new_chunks* of them just now, in *new_bytes*.
    """

    index: bytes
    known: Index
    images: tuple[RamImage, ...]
    packs: tuple[Pack, ...]
    fresh: tuple[Pack, ...]
    chunks: int
    new_chunks: int
    new_bytes: int


class Packing:
    """Chunks are taken in, in order; those that are new are written to packs in the folder *to*.

    *known* are indexes of the VM itself, *lent* of others, by their names; all have *chunks*, too.
    """

    def __init__(
        self,
        blocks: Sequence[RamImage],
        to: Path,
        known: Sequence[Index],
        lent: Sequence[tuple[str, Index]],
        chunk_bytes: int,
        pack_bytes: int,
        chunks: Chunks = PLAIN,
    ) -> None:
        for one in [*known, *(index for _, index in lent)]:
            # what is encrypted never stands on what is not, nor on what another key has encrypted
            assert one.chunks.key == chunks.key
        places = (array("I"), array("Q"), array("I"))
        self.index = Index(chunk_bytes, blocks, [], array("I"), b"", places, chunks)
        """What was taken in so far, but for digests and packs."""
        self._to, self._limit = to, pack_bytes
        self._known = [*known, *(index for _, index in lent)]
        own = {pack.blake3 for one in known for pack in one.packs}
        self._lent = {
            pack.blake3: vm
            for vm, index in reversed(lent) for pack in index.packs if pack.blake3 not in own
        }  # fmt: skip
        for one in self._known:
            one.ready()  # before threads ask it
        self._digests = bytearray()
        self._mine = Rows(self._digests)
        self._packs: list[Named] = []
        self._numbers: dict[str, int] = {}
        self._writer: Writer | None = None
        self._writing = 0  # the number of the pack that is being written
        self._fresh: set[str] = set()
        self._made: list[Path] = []
        self._new_chunks = self._new_bytes = 0

    def is_new(self, digest: bytes) -> bool:
        """Whether this chunk has to be written, by all that was taken in so far. In any thread."""
        return self._place(digest) is None and self._mine.find(digest) is None

    def take(self, number: int, digest: bytes, frame: bytes | None, raw: int) -> None:
        """The next chunk, of *raw* bytes; with its *frame*, if it was new. Raises LocalFailed."""
        index, written = self.index, False
        if (known := self._place(digest)) is not None:
            other, row = known
            place = self._number(other.pack(row)), other.offsets[row], other.lengths[row]
        else:
            place, written = self._own(digest, frame, raw)
        index.numbers.append(number)
        self._digests += digest
        if written:
            self._mine.add(len(index.numbers) - 1)
        for column, value in zip(self._columns, place, strict=True):
            column.append(value)

    def barely_lent(self) -> list[int]:
        """The rows that lie in packs of other VMs of which less than half is used."""
        lent = {n: one.bytes for n, one in enumerate(self._packs) if one.blake3 in self._lent}
        if not lent:
            return []
        found: dict[int, dict[int, int]] = {number: {} for number in lent}
        for pack, offset, length in zip(*self._columns, strict=True):
            if pack in lent:
                found[pack][offset] = length
        barely = {pack for pack, used in found.items() if sum(used.values()) * 2 < lent[pack]}
        return [row for row, pack in enumerate(self.index.pack_numbers) if pack in barely]

    def instead(self, row: int, digest: bytes, frame: bytes, raw: int, path: Path) -> None:
        """The chunk of *row*, read once more from the image *path*, lies in a pack of our own.

        Raises LocalFailed, also when it is another one now.
        """
        if digest != self._digests[row * 32 : row * 32 + 32]:
            raise LocalFailed(f"{path}: was changed while it was read")
        place, written = self._own(digest, frame, raw)
        if written:
            self._mine.add(row)
        for column, value in zip(self._columns, place, strict=True):
            column[row] = value

    def kept(self) -> Kept:
        """All is taken in: the last pack is closed. Raises LocalFailed."""
        if self._writer is not None:
            self._close(self._writer)
        index = self.index
        used = sorted(set(index.pack_numbers))
        now = {number: at for at, number in enumerate(used)}
        numbers = array("I", [now[number] for number in index.pack_numbers])
        known = Index(
            index.chunk_bytes,
            index.blocks,
            [self._packs[number] for number in used],
            index.numbers,
            self._digests,
            (numbers, index.offsets, index.lengths),
            index.chunks,
        )
        listed = tuple(
            Pack(
                blake3=one.blake3,
                bytes=one.bytes,
                used_bytes=used_bytes,
                fresh=one.blake3 in self._fresh,
                origin=None if one.blake3 in self._fresh else self._lent.get(one.blake3),
            )
            for one, used_bytes in zip(known.packs, known.used(), strict=True)
        )
        return Kept(
            index=known.encode(),
            known=known,
            images=known.blocks,
            packs=listed,
            fresh=tuple(pack for pack in listed if pack.fresh),
            chunks=len(known),
            new_chunks=self._new_chunks,
            new_bytes=self._new_bytes,
        )

    def discard(self) -> None:
        """Nothing of it stays; but what another run had written, under the same name, does."""
        if self._writer is not None:
            self._writer.discard()
        for path in self._made:
            with suppress(OSError):
                path.unlink()

    @property
    def _columns(self) -> tuple[array[int], array[int], array[int]]:
        return self.index.pack_numbers, self.index.offsets, self.index.lengths

    def _place(self, digest: bytes) -> tuple[Index, int] | None:
        for index in self._known:
            if (row := index.find(digest)) is not None:
                return index, row
        return None

    def _own(
        self, digest: bytes, frame: bytes | None, raw: int
    ) -> tuple[tuple[int, int, int], bool]:
        """Where it lies in a pack of this snapshot; whether it was written just now."""
        if (mine := self._mine.find(digest)) is not None:
            pack, offset, length = (column[mine] for column in self._columns)
            return (pack, offset, length), False
        assert frame is not None
        return self._write(digest, frame, raw), True

    def _number(self, pack: Named) -> int:
        if pack.blake3 not in self._numbers:
            self._numbers[pack.blake3] = len(self._packs)
            self._packs.append(pack)
        return self._numbers[pack.blake3]

    def _write(self, digest: bytes, frame: bytes, raw: int) -> tuple[int, int, int]:
        if self._writer is None:
            self._writer = Writer(self._to, key=self.index.chunks.key)
            self._writing = len(self._packs)
            self._packs.append(Named(blake3="0" * 64, bytes=0))  # known when it is whole
        place = self._writing, self._writer.add(digest, frame, raw), len(frame)
        self._new_chunks, self._new_bytes = self._new_chunks + 1, self._new_bytes + len(frame)
        if self._writer.bytes >= self._limit or self._writer.rows >= ROWS:
            self._close(self._writer)
        return place

    def _close(self, writer: Writer) -> None:
        pack = writer.close()
        self._writer = None
        if writer.anew:
            self._made.append(self._to / pack.blake3)
        self._packs[self._writing] = Named(blake3=pack.blake3, bytes=pack.bytes)
        self._fresh.add(pack.blake3)
