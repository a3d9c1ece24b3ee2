"""RAM cut into chunks, of which each is stored once: the only place that reads RAM for packs."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from qmpsnap.errors import LocalFailed
from qmpsnap.store.chunks import PLAIN, Chunks
from qmpsnap.store.copying import extents
from qmpsnap.store.files import Progress, opened, told
from qmpsnap.store.manifest import RamImage
from qmpsnap.store.packing import Kept, Packing
from qmpsnap.store.ramindex import Index
from qmpsnap.store.sink import Cancelled

CHUNK = 32 << 10
"""Bytes of a chunk; decision 0017 tells why."""
PACK = 256 << 20
"""Bytes of stored chunks after which a pack is closed."""
_THREADS = 2
_PIECE = 2 << 20  # bytes that a thread takes at a time
_AHEAD = 3 * _THREADS  # pieces that are being worked on, or wait for their turn


def keep(
    images: Sequence[tuple[str, Path, int]],
    to: Path,
    known: Sequence[Index],
    *,
    lent: Sequence[tuple[str, Index]] = (),
    stored_pages: Sequence[int],
    chunk_bytes: int = CHUNK,
    pack_bytes: int = PACK,
    chunks: Chunks = PLAIN,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Kept:
    """Put *images* (name of the block, page image, bytes) into packs in the folder *to*.

    A chunk that *known* has, which are indexes of other snapshots of the VM, is neither packed nor
    written again: the packs that they name must be there, or come to be, wherever this is shipped
    to; what was lost is left out by `Index.without`. The same images and the same *known* give the
    same packs. Blocks; memory is bounded but for *known*, whatever the sizes.

    *lent* are indexes of other VMs, by name. Of a pack of theirs nothing is taken if less than half
    of it would be used: as little of a pack of our own would be moved into another one (`repack`).

    *chunks* says how they are stored, in the clear or encrypted; *known* and *lent* are of the same
    kind.

    *on_progress* is told the bytes of RAM done, *cancelled* is asked often. Raises LocalFailed,
    Cancelled; what this has written is gone then.
    """
    blocks = [
        RamImage(block=name, bytes=size, stored_pages=pages)
        for (name, _, size), pages in zip(images, stored_pages, strict=True)
    ]
    packing = Packing(blocks, to, known, lent, chunk_bytes, min(pack_bytes, PACK), chunks)
    run = _Reading(packing, chunk_bytes, chunks)
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
        for number, rows in groupby(packing.barely_lent(), packing.index.block_of):
            path = images[number][1]
            with opened(path, LocalFailed) as file:
                for row in rows:
                    stop_if(cancelled, path)
                    run.again(file, path, number, row)
        return packing.kept()
    except BaseException:
        packing.discard()
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


class _Reading:
    """The page images, read on the grid of the chunks, by some threads at once."""

    def __init__(self, packing: Packing, chunk_bytes: int, chunks: Chunks) -> None:
        self._packing, self._grid, self._chunks = packing, chunk_bytes, chunks
        self._piece = max(chunk_bytes, _PIECE // chunk_bytes * chunk_bytes)
        self._buffer, self._zeros = _Buffer(), bytes(chunk_bytes)

    def block(
        self, pool: ThreadPoolExecutor, block: int, descriptor: int, path: Path, size: int
    ) -> Iterator[int]:
        """Take a block in; the bytes of it that are done, again and again."""
        first = self._packing.index.first(block)
        waiting: deque[tuple[int, Future[list[_Found]]]] = deque()
        for start, end in self._pieces(descriptor, path, size):
            number = first + start // self._grid
            work = pool.submit(self._look, descriptor, path, number, start, end)
            waiting.append((end, work))
            if len(waiting) >= _AHEAD:
                yield self._taken(*waiting.popleft())
        while waiting:
            yield self._taken(*waiting.popleft())
        yield size

    def again(self, descriptor: int, path: Path, block: int, row: int) -> None:
        """Take the chunk of *row* in once more, to be packed whoever else has it."""
        at, length = self._packing.index.span(block, row)
        with told(path, LocalFailed):
            content = os.pread(descriptor, length, at)
        digest = self._chunks.digest(content)
        frame = self._chunks.frame(content, digest)
        self._packing.instead(row, digest, frame, length, path)

    def _taken(self, end: int, work: Future[list[_Found]]) -> int:
        for one in work.result():
            self._packing.take(*one)
        return end

    def _pieces(self, descriptor: int, path: Path, size: int) -> Iterator[tuple[int, int]]:
        """Where it is no hole, on the grid of the chunks; each piece once."""
        with told(path, LocalFailed):
            if (there := os.fstat(descriptor).st_size) != size:
                raise LocalFailed(f"{path}: has {there} bytes, not {size}")
            grid, done = self._grid, 0
            for start, length in extents(descriptor, size):
                begin = max(done, start // grid * grid)
                end = min(size, -(-(start + length) // grid) * grid)
                for at in range(begin, end, self._piece):
                    yield at, min(at + self._piece, end)
                done = max(done, end)

    def _look(self, descriptor: int, path: Path, number: int, start: int, end: int) -> list[_Found]:
        """In a thread of the pool: what is there, and packed where it may be new."""
        grid = self._grid
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
            digest = self._chunks.digest(view[at:stop])
            new = self._packing.is_new(digest)
            frame = self._chunks.frame(view[at:stop], digest) if new else None
            found.append(_Found(number + at // grid, digest, frame, stop - at))
        return found
