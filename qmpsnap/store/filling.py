"""Page images out of chunks: the only place that makes RAM again of what is stored once.

An image is a sparse file of its block's size; a page of zeros is a hole.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from qmpsnap.errors import LocalFailed, SnapError
from qmpsnap.store import ramindex
from qmpsnap.store.chunking import stop_if
from qmpsnap.store.copying import data_runs
from qmpsnap.store.files import Progress, told
from qmpsnap.store.ramindex import Index
from qmpsnap.store.shelf import Shelf

STREAM = "stream.zst"
"""The name of the rest of the state, packed, beside page images that are kept."""
INDEX = "ram.index"
"""The name of an index beside the page images that it tells of."""
ELSEWHERE = "images"
"""The name of a link beside an index, to the folder of the images, where they are not beside it."""
Span = tuple[int, int, int]
"""A part of the RAM: the number of its block, and start and length in that, in bytes."""
_PAGE = 4096
_THREADS = 2
_PIECE = 2 << 20  # bytes of RAM that a thread makes at a time
_AHEAD = 3 * _THREADS


class Filled(msgspec.Struct, frozen=True, kw_only=True):
    """Where the chunks came from, in bytes of RAM: other images here, or packs."""

    near_bytes: int
    pack_bytes: int


def image(folder: Path, block: int) -> Path:
    """The page image of the *block*-th block of an index."""
    return folder / f"{block}.pages"


def place(folder: Path) -> Path:
    """Where the images of the index in *folder* are: there, or where a link leads to."""
    try:
        return (folder / ELSEWHERE).readlink()
    except OSError:
        return folder


def hollow(path: Path, size: int) -> None:
    """An empty page image of *size* bytes; what *path* was is replaced. Raises LocalFailed."""
    with told(path, LocalFailed):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)


def fill(
    index: Index,
    shelf: Shelf,
    to: Path,
    *,
    near: Sequence[Path] = (),
    near_index: Callable[[Path], Index] | None = None,
    spans: Sequence[Span] | None = None,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Filled:
    """Make the page images of *index* in the folder *to*, `0.pages` and so on, in order.

    Each chunk is checked. One that a folder of *near* has, which holds the images of another
    snapshot with its `ram.index`, is taken from there if it is still what it was; the others are
    taken from the *shelf*. What is in *to* under these names is replaced. Nothing is flushed to
    the disk. Blocks. *near_index* reads their indexes, where somebody has
    them at hand, or the key that they are encrypted with.

    With *spans* only the chunks that these touch are made, in images that are there (`hollow`):
    perhaps beside another who fills them.

    *on_progress* is told the bytes of RAM that are there, from the first one on.

    Raises HalfMissing, DigestMismatch, DamagedData, which name what is lost, LocalFailed, what the
    shelf's folders raise, and Cancelled. What was made is left to the caller.
    """
    with ExitStack() as stack:
        neighbours = []
        for folder in near:
            if (one := neighbour(folder, near_index or read_near, index.chunks.key)) is not None:
                neighbours.append(one)
                stack.callback(one.close)
        run = _Filling(index, shelf, neighbours, spans)
        total, done = sum(block.bytes for block in index.blocks), 0
        for number, block in enumerate(index.blocks):
            path = image(to, number)
            if spans is None:
                hollow(path, block.bytes)
            elif not any(span[0] == number for span in spans):
                done += block.bytes
                continue
            with told(path, LocalFailed):
                descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
                stack.callback(os.close, descriptor)
            # the file is closed only when no thread writes to it any more
            with ThreadPoolExecutor(_THREADS, "fill") as pool:
                for end in run.block(pool, number, descriptor, path):
                    stop_if(cancelled, path)
                    if on_progress is not None:
                        on_progress(done + end, total, f"filling {block.block}")
            done += block.bytes
            if on_progress is not None:
                on_progress(done, total, f"filling {block.block}")
        return Filled(near_bytes=run.near_bytes, pack_bytes=run.pack_bytes)


class _Filling:
    def __init__(
        self,
        index: Index,
        shelf: Shelf,
        near: Sequence[Neighbour],
        spans: Sequence[Span] | None,
    ) -> None:
        self._index, self._shelf, self._near, self._spans = index, shelf, near, spans
        self.near_bytes = self.pack_bytes = 0

    def block(
        self, pool: ThreadPoolExecutor, block: int, descriptor: int, path: Path
    ) -> Iterator[int]:
        """Make a block's pages; the bytes up to which they are there, again and again."""
        step = max(1, _PIECE // self._index.chunk_bytes)
        waiting: deque[tuple[int, Future[tuple[int, int]]]] = deque()
        for rows in self._wanted(block):
            for first in range(rows.start, rows.stop, step):
                piece = range(first, min(first + step, rows.stop))
                at, length = self._index.span(block, piece[-1])
                work = pool.submit(self._make, block, piece, descriptor, path)
                waiting.append((at + length, work))
                if len(waiting) >= _AHEAD:
                    yield self._made(*waiting.popleft())
        while waiting:
            yield self._made(*waiting.popleft())

    def _wanted(self, block: int) -> Iterator[range]:
        """The rows that are to be made, in order."""
        if self._spans is None:
            yield self._index.rows(block)
            return
        for number, start, length in self._spans:
            if number == block:
                yield self._index.rows(block, start, length)

    def _made(self, end: int, work: Future[tuple[int, int]]) -> int:
        near, packs = work.result()
        self.near_bytes += near
        self.pack_bytes += packs
        return end

    def _make(self, block: int, rows: range, descriptor: int, path: Path) -> tuple[int, int]:
        """In a thread of the pool: the bytes that came from near images, and from packs."""
        far, near_bytes, pack_bytes = [], 0, 0
        for row in rows:
            at, length = self._index.span(block, row)
            digest = self._index.digest(row)
            found = (one.chunk(digest, length) for one in self._near)
            content = next((one for one in found if one is not None), None)
            if content is None:
                far.append(row)
                continue
            _write(descriptor, path, content, at)
            near_bytes += length
        for row, content in self._shelf.chunks(self._index, far):
            at, length = self._index.span(block, row)
            _write(descriptor, path, content, at)
            pack_bytes += length
        return near_bytes, pack_bytes


def _write(descriptor: int, path: Path, content: bytes, at: int) -> None:
    with told(path, LocalFailed):
        view = memoryview(content)
        for start, end in data_runs(content, _PAGE):
            while start < end:
                start += os.pwrite(descriptor, view[start:end], at + start)


@dataclass(slots=True)
class Neighbour:
    """The images of another snapshot, which may be what we need; or may have gone."""

    index: Index
    images: dict[int, int] = field(default_factory=dict)

    def chunk(self, digest: bytes, length: int) -> bytes | None:
        """The chunk, if it is there and of this length."""
        row = self.index.find(digest)
        if row is None or (block := self.index.block_of(row)) not in self.images:
            return None
        at, there = self.index.span(block, row)
        if there != length:
            return None
        try:
            content = os.pread(self.images[block], length, at)
        except OSError:
            return None
        return content if self.index.chunks.digest(content) == digest else None

    def close(self) -> None:
        """Its images are closed."""
        for descriptor in self.images.values():
            os.close(descriptor)


def read_near(path: Path) -> Index:
    """A near index that is not encrypted, read anew. Raises LocalFailed, DamagedData."""
    return ramindex.read(path, side=LocalFailed)


def neighbour(folder: Path, read: Callable[[Path], Index], key: str | None) -> Neighbour | None:
    """The images in *folder*, open; None for what cannot be read: it only saves work.

    None also where chunks have other names than with the *key* of whoever looks for some.
    """
    try:
        index = read(folder / INDEX)
        if index.chunks.key != key:
            return None
        index.ready()  # before threads ask it
    except SnapError:
        return None
    found, folder = Neighbour(index), place(folder)
    for number in range(len(index.blocks)):
        try:
            found.images[number] = os.open(
                image(folder, number), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            )
        except OSError:
            continue
    return found
