"""A disk's file that nobody writes to, copied: the only place that clones or copies sparsely."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qmpsnap.errors import LocalFailed
from qmpsnap.store import direct
from qmpsnap.store.files import Progress, partial, told
from qmpsnap.store.sink import Cancelled, Sink, Terms, expect_room

__all__ = ["Cancelled", "Copied", "copy", "data_runs", "extents"]

Extent = tuple[int, int]
"""Offset and length in bytes."""

_FICLONE = 0x40049409
_BLOCK = 65536  # zeros of this size and alignment become a hole
_ZEROS = bytes(_BLOCK)


@dataclass(frozen=True, slots=True)
class Copied:
    """How the copy came about; a reflink shares the source's blocks, and writes none."""

    means: Literal["reflink", "copy"]
    bytes_written: int


def copy(
    src: Path,
    dst: Path,
    *,
    limit: int | None,
    reserve: int,
    cancelled: Callable[[], bool],
    on_progress: Progress | None,
) -> Copied:
    """Make *dst* a copy of the file or block device *src*: whole, mode 0600, durable.

    Blocks. A reflink where the file system can, else a copy of what is not a hole, at most *limit*
    bytes a second. *reserve* bytes stay free on the target's file system. *cancelled* is asked
    several times a second; *on_progress* is told all bytes of data before they are durable.

    Raises LocalFailed, which names the file, also when *dst* exists; Cancelled. No *dst* is left
    behind then.
    """
    terms = Terms(limit, reserve, cancelled, on_progress)
    with _source(src) as reading:
        if os.path.lexists(dst):
            raise LocalFailed(f"{dst}: exists")
        with partial(dst, LocalFailed) as writing:
            expect_room(dst, 0, reserve)
            if _cloned(reading, writing):
                return Copied("reflink", 0)
            return Copied("copy", _Copy(src, reading, dst, writing).run(terms))


@contextmanager
def _source(path: Path) -> Iterator[int]:
    with told(path, LocalFailed):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not make us wait
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise LocalFailed(f"{path}: neither a regular file nor a block device")
        yield descriptor
    finally:
        os.close(descriptor)


def _cloned(reading: int, writing: int) -> bool:
    """Whether the target shares the source's blocks now; whatever is in the way, we can copy."""
    try:
        fcntl.ioctl(writing, _FICLONE, reading)
    except OSError as failed:
        if failed.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise
        return False
    return True


class _Copy:
    """One copy between two open files, by whatever means still work."""

    def __init__(self, src: Path, reading: int, dst: Path, writing: int) -> None:
        self._src, self._reading = src, reading
        self._dst, self._writing = dst, writing
        self._regular = stat.S_ISREG(os.fstat(reading).st_mode)
        self._size = 0

    def run(self, terms: Terms) -> int:
        """Copy all there is; the bytes written."""
        with told(self._src, LocalFailed):
            self._size = os.lseek(self._reading, 0, os.SEEK_END)
            found = list(extents(self._reading, self._size))
        total = sum(length for _, length in found)
        if self._regular:  # how much of a block device is zeros is not known before it is read
            expect_room(self._dst, total, terms.reserve)
        os.ftruncate(self._writing, self._size)
        what = f"copying {self._src.name}"
        with Sink(self._writing, self._dst, terms, total=total, what=what) as sink:
            sink.look(0)
            if not (self._regular and self._past_the_cache(sink, found)):
                self._through_the_cache(sink, found)
        return sink.written

    def _past_the_cache(self, sink: Sink, extents: list[Extent]) -> bool:
        """Whether it could be done this way; if not, all of it is to be done another way."""
        written = 0
        try:
            for size in direct.pour(
                self._fill, self._writing, direct.pieces(extents, sink.step * 2)
            ):
                written += size
                sink.passed(size)
                sink.look(written)
        except direct.NotDirect:
            sink.passed(-written)
            return False
        os.ftruncate(self._writing, self._size)
        return True

    def _fill(self, view: memoryview, at: int) -> int:
        wanted = min(len(view), self._size - at)
        found = 0
        with told(self._src, LocalFailed):
            while found < wanted and (more := os.preadv(self._reading, [view[found:]], at + found)):
                found += more
        if found < wanted:
            raise self._shorter(at + found)
        return wanted

    def _through_the_cache(self, sink: Sink, extents: list[Extent]) -> None:
        done = 0
        for start, length in extents:
            at, end = start, start + length
            while at < end:
                moved = self._step(sink, at, min(sink.step - at % sink.step, end - at))
                at, done = at + moved, done + moved
                sink.look(done)

    def _step(self, sink: Sink, at: int, size: int) -> int:
        with told(self._src, LocalFailed):
            content = os.pread(self._reading, size, at)
        if not content:
            raise self._shorter(at)
        for start, end in data_runs(content, _BLOCK):
            sink.pwrite(memoryview(content)[start:end], at + start)
        return len(content)

    def _shorter(self, end: int) -> LocalFailed:
        return LocalFailed(f"{self._src}: ends at {end} bytes now: somebody writes to it")


def extents(descriptor: int, size: int, start: int = 0) -> Iterator[Extent]:
    """Where *descriptor* is no hole from *start* to *size*; all where nobody can tell. OSError."""
    at = start
    while at < size:
        try:
            begin = os.lseek(descriptor, at, os.SEEK_DATA)
            at = os.lseek(descriptor, begin, os.SEEK_HOLE)
        except OSError as failed:
            if failed.errno == errno.ENXIO:
                return
            if failed.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
                raise
            yield at, size - at
            return
        if begin < size:
            yield begin, min(at, size) - begin


def data_runs(content: bytes | bytearray, block: int) -> Iterator[tuple[int, int]]:
    """Start and end of each longest run of *block*s, the last maybe short, that hold a one."""
    assert block <= _BLOCK
    begun: int | None = None
    for at in range(0, len(content), block):
        end = min(at + block, len(content))
        if content.startswith(_ZEROS[: end - at], at):
            if begun is not None:
                yield begun, at
            begun = None
        elif begun is None:
            begun = at
    if begun is not None:
        yield begun, len(content)
