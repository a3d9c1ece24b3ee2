"""RAM cut into chunks, of which each is stored once: the only place that fills packs from RAM."""

from __future__ import annotations

import os
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from qmpsnap.errors import LocalFailed
from qmpsnap.store.copying import extents
from qmpsnap.store.files import Progress, opened, told
from qmpsnap.store.manifest import Pack, RamImage
from qmpsnap.store.pack import frame_of
from qmpsnap.store.ramindex import Index, Named
from qmpsnap.store.rampack import Writer
from qmpsnap.store.ramrows import Rows
from qmpsnap.store.sink import Cancelled

CHUNK = 32 << 10
"""Bytes of a chunk; decision 0017 tells why."""
PACK = 256 << 20
"""Bytes of stored chunks after which a pack is closed."""
_THREADS = 2
_PIECE = 2 << 20  # bytes that a thread takes at a time
_AHEAD = 3 * _THREADS  # pieces that are being worked on, or wait for their turn


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


def keep(
    images: Sequence[tuple[str, Path, int]],
    to: Path,
    known: Sequence[Index],
    *,
    stored_pages: Sequence[int],
    chunk_bytes: int = CHUNK,
    pack_bytes: int = PACK,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Kept:
    """Put *images* (name of the block, page image, bytes) into packs in the folder *to*.

    A chunk that *known* has, which are indexes of other snapshots of the VM, is neither packed nor
    written again: the packs that they name must be there, or come to be, wherever this is shipped
    to; what was lost is left out by `Index.without`. The same images and the same *known* give the
    same packs. Blocks; memory is bounded but for *known*, whatever the sizes.

    *on_progress* is told the bytes of RAM done, *cancelled* is asked often. Raises LocalFailed,
    Cancelled; what this has written is gone then.
    """
    blocks = [
        RamImage(block=name, bytes=size, stored_pages=pages)
        for (name, _, size), pages in zip(images, stored_pages, strict=True)
    ]
    run = _Keeping(blocks, to, known, chunk_bytes, min(pack_bytes, PACK))
    total, done = sum(size for _, _, size in images), 0
    try:
        for number, (name, path, size) in enumerate(images):
            # the file is closed only when no thread reads it any more
            with opened(path, LocalFailed) as file, ThreadPoolExecutor(_THREADS, "chunks") as pool:
                for end in run.block(pool, number, file, path, size):
                    stop_if(cancelled, path)
                    if on_progress is not None:
                        on_progress(done + end, total, f"keeping {name}")
            done += size
        return run.kept()
    except BaseException:
        run.discard()
        raise


def stop_if(cancelled: Callable[[], bool] | None, path: Path) -> None:
    """Raises Cancelled, for *path*, when *cancelled* says so."""
    if cancelled is not None and cancelled():
        raise Cancelled(str(path))


class _Found(NamedTuple):
    """A chunk that is not all zeros; *frame* is None for one that need not be written."""

    number: int
    digest: bytes
    frame: bytes | None
    raw: int


class _Buffer(threading.local):
    """Room for a piece, for each thread."""

    def __init__(self) -> None:
        self.content = bytearray(_PIECE)


class _Keeping:
    """The index and the packs as they grow."""

    def __init__(
        self,
        blocks: Sequence[RamImage],
        to: Path,
        known: Sequence[Index],
        chunk_bytes: int,
        pack_bytes: int,
    ) -> None:
        places = (array("I"), array("Q"), array("I"))
        self._index = Index(chunk_bytes, blocks, [], array("I"), b"", places)
        self._to, self._known, self._limit = to, known, pack_bytes
        self._piece = max(chunk_bytes, _PIECE // chunk_bytes * chunk_bytes)
        for one in known:
            one.ready()  # before threads ask it
        self._digests = bytearray()
        self._mine = Rows(self._digests)
        self._packs: list[Named] = []
        self._numbers: dict[str, int] = {}
        self._writer: Writer | None = None
        self._writing = 0  # the number of the pack that is being written
        self._fresh: set[str] = set()
        self._made: list[Path] = []
        self._buffer, self._zeros = _Buffer(), bytes(chunk_bytes)
        self._new_chunks = self._new_bytes = 0

    def block(
        self, pool: ThreadPoolExecutor, block: int, descriptor: int, path: Path, size: int
    ) -> Iterator[int]:
        """Take a block in; the bytes of it that are done, again and again."""
        first = self._index.first(block)
        waiting: deque[tuple[int, Future[list[_Found]]]] = deque()
        for start, end in self._pieces(descriptor, path, size):
            number = first + start // self._index.chunk_bytes
            work = pool.submit(self._look, descriptor, path, number, start, end)
            waiting.append((end, work))
            if len(waiting) >= _AHEAD:
                yield self._taken(*waiting.popleft())
        while waiting:
            yield self._taken(*waiting.popleft())
        yield size

    def _taken(self, end: int, work: Future[list[_Found]]) -> int:
        for one in work.result():
            self._take(one)
        return end

    def _pieces(self, descriptor: int, path: Path, size: int) -> Iterator[tuple[int, int]]:
        """Where it is no hole, on the grid of the chunks; each piece once."""
        with told(path, LocalFailed):
            if (there := os.fstat(descriptor).st_size) != size:
                raise LocalFailed(f"{path}: has {there} bytes, not {size}")
            grid, done = self._index.chunk_bytes, 0
            for start, length in extents(descriptor, size):
                begin = max(done, start // grid * grid)
                end = min(size, -(-(start + length) // grid) * grid)
                for at in range(begin, end, self._piece):
                    yield at, min(at + self._piece, end)
                done = max(done, end)

    def _look(self, descriptor: int, path: Path, number: int, start: int, end: int) -> list[_Found]:
        """In a thread of the pool: what is there, and packed where it may be new."""
        grid = self._index.chunk_bytes
        if len(self._buffer.content) < end - start:
            self._buffer.content = bytearray(end - start)
        content = self._buffer.content
        view = memoryview(content)
        with told(path, LocalFailed):
            got = 0
            while got < end - start:
                more = os.preadv(descriptor, [view[got : end - start]], start + got)
                if not more:
                    raise LocalFailed(f"{path}: ends at {start + got} bytes now")
                got += more
        found = []
        for at in range(0, end - start, grid):
            stop = min(at + grid, end - start)
            if content.startswith(self._zeros[: stop - at], at):
                continue
            digest = blake3(view[at:stop]).digest()
            new = self._place(digest) is None and self._mine.find(digest) is None
            frame = frame_of(view[at:stop]) if new else None
            found.append(_Found(number + at // grid, digest, frame, stop - at))
        return found

    def _place(self, digest: bytes) -> tuple[Index, int] | None:
        for index in self._known:
            if (row := index.find(digest)) is not None:
                return index, row
        return None

    def _take(self, one: _Found) -> None:
        index, fresh = self._index, False
        if (known := self._place(one.digest)) is not None:
            other, row = known
            place = self._number(other.pack(row)), other.offsets[row], other.lengths[row]
        elif (mine := self._mine.find(one.digest)) is not None:
            place = index.pack_numbers[mine], index.offsets[mine], index.lengths[mine]
        else:
            assert one.frame is not None
            place, fresh = self._write(one.digest, one.frame, one.raw), True
        index.numbers.append(one.number)
        self._digests += one.digest
        if fresh:
            self._mine.add(len(index.numbers) - 1)
        for column, value in zip(
            (index.pack_numbers, index.offsets, index.lengths), place, strict=True
        ):
            column.append(value)

    def _number(self, pack: Named) -> int:
        if pack.blake3 not in self._numbers:
            self._numbers[pack.blake3] = len(self._packs)
            self._packs.append(pack)
        return self._numbers[pack.blake3]

    def _write(self, digest: bytes, frame: bytes, raw: int) -> tuple[int, int, int]:
        if self._writer is None:
            self._writer, self._writing = Writer(self._to), len(self._packs)
            self._packs.append(Named(blake3="0" * 64, bytes=0))  # known when it is whole
        place = self._writing, self._writer.add(digest, frame, raw), len(frame)
        self._new_chunks, self._new_bytes = self._new_chunks + 1, self._new_bytes + len(frame)
        if self._writer.bytes >= self._limit:
            self._close(self._writer)
        return place

    def _close(self, writer: Writer) -> None:
        pack = writer.close()
        self._writer = None
        if writer.anew:
            self._made.append(self._to / pack.blake3)
        self._packs[self._writing] = Named(blake3=pack.blake3, bytes=pack.bytes)
        self._fresh.add(pack.blake3)

    def kept(self) -> Kept:
        """All is taken in: the last pack is closed."""
        if self._writer is not None:
            self._close(self._writer)
        index = self._index
        places = (index.pack_numbers, index.offsets, index.lengths)
        known = Index(
            index.chunk_bytes, index.blocks, self._packs, index.numbers, self._digests, places
        )
        listed = tuple(
            Pack(
                blake3=one.blake3,
                bytes=one.bytes,
                used_bytes=used,
                fresh=one.blake3 in self._fresh,
            )
            for one, used in zip(self._packs, known.used(), strict=True)
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
