"""Chunks out of packs, wherever these lie now: the only place that reads a chunk by its place."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.errors import DamagedData, DigestMismatch, HalfMissing
from qmpsnap.store import moved
from qmpsnap.store.files import Side, told
from qmpsnap.store.manifest import FileEntry
from qmpsnap.store.ramindex import Index, Named
from qmpsnap.store.rampack import Frame, table

Folder = tuple[Path, Side]
"""A folder that packs lie in, and the error that its troubles are raised as."""

_OPEN = 16  # files that a thread keeps open
_RUN = 1 << 20  # bytes that are read at once, where frames lie side by side


@dataclass(frozen=True, slots=True)
class Lying:
    """A pack as a file; with a *table* where it stands for another one that was moved into it."""

    path: Path
    side: Side
    entry: FileEntry
    table: dict[bytes, Frame] | None


@dataclass(frozen=True, slots=True)
class _Place:
    row: int
    lying: Lying
    offset: int
    length: int


class Shelf(AbstractContextManager["Shelf"]):
    """The packs in *folders*; a pack is taken from the first that has it.

    No file is open after the block, and where packs lie is still known in a next one.
    Any number of threads may read at once.
    """

    def __init__(self, folders: Sequence[Folder]) -> None:
        self._folders = tuple(folders)
        self._found: dict[str, Lying] = {}
        self._lock = threading.Lock()
        self._mine = threading.local()
        self._all: set[int] = set()

    def __exit__(self, *ended: object) -> None:
        for descriptor in self._all:
            os.close(descriptor)
        self._all, self._mine = set(), threading.local()

    def forget(self) -> None:
        """Look for each pack anew: one may have been moved."""
        self._found.clear()

    def pack(self, named: Named) -> Lying:
        """Where *named* lies. Raises HalfMissing, DamagedData, and the folders' own errors."""
        with self._lock:
            if named.blake3 not in self._found:
                self._found[named.blake3] = self._look(named)
            return self._found[named.blake3]

    def _look(self, named: Named) -> Lying:
        trouble: HalfMissing | None = None
        for folder, side in self._folders:
            try:
                path, other = moved.lies(folder / named.blake3, side=side)
            except HalfMissing as missing:
                trouble = trouble or missing
                continue
            real = other or named
            entry = FileEntry(name=f"shared/{real.blake3}", bytes=real.bytes, blake3=real.blake3)
            return Lying(path, side, entry, table(path, side=side) if other else None)
        raise trouble or HalfMissing(f"{named.blake3}: there is no folder to look for it")

    def chunks(self, index: Index, rows: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """The chunks of *rows*, checked: row and content. What lies side by side is read at once.

        Raises HalfMissing, DigestMismatch and DamagedData, which name block, offset and pack, and
        the folders' own errors.
        """
        run: list[_Place] = []
        for row in rows:
            place = self._place(index, row)
            if run and not _follows(run, place):
                yield from self._read(index, run)
                run = []
            run.append(place)
        if run:
            yield from self._read(index, run)

    def _place(self, index: Index, row: int) -> _Place:
        named = index.pack(row)
        try:
            lying = self.pack(named)
        except DamagedData as odd:
            raise type(odd)(f"{whereabouts(index, row)}: {odd}") from odd
        if lying.table is None:
            return _Place(row, lying, index.offsets[row], index.lengths[row])
        frame = lying.table.get(index.digest(row))
        if frame is None:
            raise HalfMissing(
                f"{whereabouts(index, row)}: {lying.path}, which the pack {named.blake3} was "
                f"moved into, has not this chunk"
            )
        return _Place(row, lying, frame.offset, frame.length)

    def _read(self, index: Index, run: list[_Place]) -> Iterator[tuple[int, bytes]]:
        lying, start = run[0].lying, run[0].offset
        end = run[-1].offset + run[-1].length
        with told(lying.path, lying.side):
            content = memoryview(os.pread(self._descriptor(lying), end - start, start))
        for one in run:
            at = one.offset - start
            _, raw = index.span(index.block_of(one.row), one.row)
            try:
                frame = content[at : at + one.length]
                chunk = index.chunks.content(frame, index.digest(one.row), raw)
            except DigestMismatch as odd:
                where = whereabouts(index, one.row)
                raise DigestMismatch(f"{where}: {lying.path} at {one.offset}: {odd}") from odd
            yield one.row, chunk

    def _descriptor(self, lying: Lying) -> int:
        files: OrderedDict[Path, int] = self._mine.__dict__.setdefault("files", OrderedDict())
        if lying.path not in files:
            if len(files) >= _OPEN:
                _, oldest = files.popitem(last=False)
                with self._lock:
                    self._all.discard(oldest)
                os.close(oldest)
            opened = os.open(lying.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            files[lying.path] = opened
            with self._lock:
                self._all.add(opened)
        files.move_to_end(lying.path)
        return files[lying.path]


def whereabouts(index: Index, row: int) -> str:
    """A chunk in words: its block, and where it lies there."""
    block = index.block_of(row)
    at, length = index.span(block, row)
    return f"{length} bytes of {index.blocks[block].block} at {at:#x}"


def _follows(run: Sequence[_Place], place: _Place) -> bool:
    last, first = run[-1], run[0]
    return (
        place.lying is last.lying
        and place.offset == last.offset + last.length
        and place.offset + place.length - first.offset <= _RUN
    )
