"""A RAM block's pages in a file: the only place that writes them there, and makes records of them.

A zero page is a hole, whether QEMU sent it as one or sent its zeros.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from qmpsnap.hypervisor.vmstate import records, sparse
from qmpsnap.hypervisor.vmstate.records import PAGE
from qmpsnap.hypervisor.vmstate.walk import Numbers

_PIECE = 256  # pages that are gathered at a time: they stay in the processor's cache
_HOLES = 1 << 16  # records of zero pages that are made at a time
_LOOK = 64  # every so manieth word of a page is looked at first
_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)

Rows = npt.NDArray[np.uint8]


class Marks:
    """A bit for each of *count* pages."""

    def __init__(self, count: int) -> None:
        self._bits = np.zeros((count + 7) // 8, np.uint8)

    def add(self, pages: Numbers) -> None:
        np.bitwise_or.at(self._bits, pages >> 3, _bit(pages))

    def remove(self, pages: Numbers) -> None:
        np.bitwise_and.at(self._bits, pages >> 3, ~_bit(pages))

    def has(self, pages: Numbers) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = (self._bits[pages >> 3] & _bit(pages)) != 0
        return found

    def __len__(self) -> int:
        step = 1 << 20
        pieces = range(0, len(self._bits), step)
        return sum(int(_COUNTS[self._bits[at : at + step]].sum()) for at in pieces)

    def runs(self) -> Iterator[Numbers]:
        """The pages that are marked, ascending, some thousands at a time."""
        for at in range(0, len(self._bits), _PIECE):
            bits = np.unpackbits(self._bits[at : at + _PIECE], bitorder="little")
            if bits.any():
                yield np.flatnonzero(bits) + at * 8


def _bit(pages: Numbers) -> Rows:
    return np.left_shift(np.uint8(1), (pages & 7).astype(np.uint8))


class PageFile:
    """The *count* pages of a block in the open file *fd*, from the byte *start* on; all are zero.

    Without a file they are only counted. With *whole* it has no holes, and gets none.
    """

    def __init__(self, fd: int | None, count: int, start: int = 0, *, whole: bool = False) -> None:
        self._fd, self._start, self._whole = fd, start, whole
        self.stored = Marks(count)

    def put(self, pages: Numbers, places: Numbers, buffer: bytearray) -> None:
        """Write *pages*, which are at these *places* of *buffer*, as `walk.Batch` has them.

        Of a page that is there more than once the last one counts. Raises OSError.
        """
        pages, places = _last(pages, places)
        zero = places == -1
        if zero.any():
            self._empty(pages[zero])
            pages, places = pages[~zero], places[~zero]
        for at in range(0, len(pages), _PIECE):
            self._write(pages[at : at + _PIECE], _gathered(places[at : at + _PIECE], buffer))

    def read(self, pages: Numbers) -> Rows:
        """The content of *pages*, in ascending order. Raises OSError."""
        assert self._fd is not None
        return _read(self._fd, pages, self._start)

    def _empty(self, pages: Numbers) -> None:
        pages = pages[self.stored.has(pages)]
        if not len(pages):
            return
        self.stored.remove(pages)
        if self._fd is None:
            return
        for first, end in zip(*_runs(pages), strict=True):
            start, length = int(pages[first]) * PAGE + self._start, int(end - first) * PAGE
            if self._whole or not sparse.punch(self._fd, start, length):
                _written(self._fd, memoryview(bytes(length)), start)

    def _write(self, pages: Numbers, rows: Rows) -> None:
        zero = _zero(rows)
        if zero.any():
            self._empty(pages[zero])
            pages, rows = pages[~zero], rows[~zero]
        if not len(pages):
            return
        self.stored.add(pages)
        if self._fd is None:
            return
        view = rows.data.cast("B")
        firsts, ends = _runs(pages)
        places = (pages[firsts] * PAGE + self._start).tolist()
        for first, end, place in zip(
            (firsts * PAGE).tolist(), (ends * PAGE).tolist(), places, strict=True
        ):
            if os.pwrite(self._fd, view[first:end], place) != end - first:
                _written(self._fd, view[first:end], place)


def _last(pages: Numbers, places: Numbers) -> tuple[Numbers, Numbers]:
    """The pages in ascending order, each with the last place that it had."""
    if len(pages) < 2 or (np.diff(pages) > 0).all():
        return pages, places
    order = np.argsort(pages, kind="stable")
    pages = pages[order]
    last = np.append(np.diff(pages) > 0, True)
    return pages[last], places[order[last]]


def _gathered(places: Numbers, buffer: bytearray) -> Rows:
    everywhere = np.ndarray((len(buffer) - PAGE + 1, PAGE), np.uint8, buffer, 0, (1, 1))
    full = places < 0
    if not full.any():
        return everywhere[places]
    rows = np.empty((len(places), PAGE), np.uint8)
    rows[~full] = everywhere[places[~full]]
    rows[full] = (-1 - places[full]).astype(np.uint8)[:, None]
    return rows


def _zero(rows: Rows) -> npt.NDArray[np.bool_]:
    """Which of the pages are zero."""
    words = rows.view(np.uint64)
    zero: npt.NDArray[np.bool_] = (words[:, ::_LOOK] == 0).all(axis=1)
    if zero.any():
        zero[zero] = (words[zero] == 0).all(axis=1)
    return zero


def _runs(pages: Numbers) -> tuple[Numbers, Numbers]:
    """Where pages follow one on the other: firsts and ends of the runs, as places in *pages*."""
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    return np.append(0, breaks), np.append(breaks, len(pages))


def _written(fd: int, view: memoryview, place: int) -> None:
    while view:
        count = os.pwrite(fd, view, place)
        view, place = view[count:], place + count


class Recorder:
    """Makes the records of pages of *block* and hands them to *out*; the first one names it."""

    def __init__(self, block: str, out: Callable[[memoryview], None]) -> None:
        self._block, self._out = block, out
        self._named = False

    def all(self, fd: int, size: int) -> Iterator[int]:
        """All *size* bytes of the page image *fd*: how far that is. Raises OSError."""
        for start, end, data in sparse.extents(fd, size, PAGE, _PIECE * PAGE):
            for at in range(start, end, _HOLES * PAGE):
                upto = min(at + _HOLES * PAGE, end)
                pages = np.arange(at // PAGE, upto // PAGE)
                if data:
                    self._pages(pages, _read(fd, pages, 0))
                else:
                    self._zero(pages)
                yield upto

    def some(self, pages: Numbers, file: PageFile) -> None:
        """*pages* of *file*, in ascending order. Raises OSError."""
        content = file.stored.has(pages)
        stored = pages[content]
        for at in range(0, len(stored), _PIECE):
            piece = stored[at : at + _PIECE]
            self._content(piece, file.read(piece))
        self._zero(pages[~content])

    def _pages(self, pages: Numbers, rows: Rows) -> None:
        zero = _zero(rows)
        if zero.any():
            self._zero(pages[zero])
            pages, rows = pages[~zero], rows[~zero]
        self._content(pages, rows)

    def _content(self, pages: Numbers, rows: Rows) -> None:
        self._records(pages, records.CONTENT, rows)

    def _zero(self, pages: Numbers) -> None:
        self._records(pages, records.ZERO, np.zeros((len(pages), 1), np.uint8))

    def _records(self, pages: Numbers, flags: int, data: Rows) -> None:
        if len(pages) and not self._named:
            head = records.record(int(pages[0]) * PAGE, flags, self._block)
            self._out(memoryview(head + data[0].tobytes()))
            self._named, pages, data = True, pages[1:], data[1:]
        if not len(pages):
            return
        made = np.empty((len(pages), 8 + data.shape[1]), np.uint8)
        heads = (pages * PAGE | flags | records.CONTINUE).astype(">u8")
        made[:, :8] = heads.view(np.uint8).reshape(-1, 8)
        made[:, 8:] = data
        self._out(made.data.cast("B"))


def _read(fd: int, pages: Numbers, start: int) -> Rows:
    rows = np.zeros((len(pages), PAGE), np.uint8)
    view = rows.data.cast("B")
    for first, end in zip(*_runs(pages), strict=True):
        part, place = view[first * PAGE : end * PAGE], start + int(pages[first]) * PAGE
        while part and (count := os.preadv(fd, [part], place)):
            part, place = part[count:], place + count
    return rows
