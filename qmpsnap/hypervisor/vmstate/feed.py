"""Pages on their way into a running guest, each of them once: the only place that knows which went.

What QEMU asks for goes first, then what lies around it; all the others follow in order.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from qmpsnap.errors import DamagedData, LocalFailed
from qmpsnap.hypervisor.vmstate import handover, records
from qmpsnap.hypervisor.vmstate.pages import Marks, Rows
from qmpsnap.hypervisor.vmstate.records import PAGE
from qmpsnap.hypervisor.vmstate.session import Progress
from qmpsnap.hypervisor.vmstate.walk import Numbers

_AROUND = 16  # pages: a chunk of the store, which comes as a whole
_SHORT = 64  # pages sent at a time while QEMU asks: a request waits for no more than that
_LONG = 256  # pages sent at a time while it does not
_HOLES = 1024  # zero pages sent at a time then
_CALM = 0.05  # seconds without a request
_LOOK = 64  # every so manieth word of a page is looked at first

Buffer = bytes | memoryview


class Pages(Protocol):
    """Where pages come from: for each RAM block a page image, perhaps still being filled."""

    @property
    def images(self) -> Mapping[str, Path]: ...

    async def ready(self, block: str, start: int, length: int) -> None:
        """Return once these bytes of *block* are in its image; what is asked first is first.

        It waits for what may come back, such as a store: an error ends the source, and leaves a
        guest that lacks pages.
        """


class Feed:
    """Sends pages of *large* blocks over *wire*, in sections of the RAM's number *ram*.

    Open for a block. Raises LocalFailed (an image cannot be opened), DamagedData (it is too short).
    """

    def __init__(
        self,
        wire: socket.socket,
        ram: int,
        large: Mapping[str, int],
        pages: Pages,
        on_progress: Progress | None = None,
    ) -> None:
        self.asked = 0
        """Requests of QEMU so far."""
        self._wire, self._ram, self._large, self._pages = wire, ram, large, pages
        self._tell = on_progress
        self._turn = asyncio.Lock()
        self._sent = {block: Marks(size // PAGE) for block, size in large.items()}
        self.done = 0
        """Bytes that QEMU has, or will have."""
        self._all = sum(large.values())
        self._last = time.monotonic()
        self._images: dict[str, int] = {}
        try:
            for block, size in large.items():
                self._images[block] = _opened(pages.images[block], size)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        while self._images:
            os.close(self._images.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has(self, block: str, bitmap: bytes) -> None:
        """QEMU has these pages already: a bit each, the lowest bit of a byte first."""
        bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
        found = np.flatnonzero(bits[: self._large[block] // PAGE])
        self._sent[block].add(found)
        self.done += len(found) * PAGE

    async def answer(self, block: str, start: int, length: int) -> None:
        """Send what QEMU asked for, at once, and then what lies around it.

        Raises OSError (the wire), LocalFailed, and what `Pages.ready` raises.
        """
        self.asked += 1
        self._last = time.monotonic()
        if block not in self._large:
            return  # of a small block all pages went before
        first, count = start // PAGE, length // PAGE
        await self._send(block, first, count)
        first = first // _AROUND * _AROUND
        await self._send(block, first, min(_AROUND, self._large[block] // PAGE - first))

    async def push(self) -> None:
        """Send all that was not sent yet, in order. Raises as `answer`, in groups."""
        async with asyncio.TaskGroup() as group:
            writing: asyncio.Task[None] | None = None
            for block, size in self._large.items():
                at, end, holes = 0, size // PAGE, False
                while at < end:
                    calm = time.monotonic() - self._last > _CALM
                    count = min((_HOLES if holes else _LONG) if calm else _SHORT, end - at)
                    taken = await self._taken(block, at, count)
                    at += count
                    if not len(taken):
                        continue
                    # what comes next is read and made into records while this is written
                    made, holes = await asyncio.to_thread(self._made, block, taken)
                    if writing is not None:
                        await writing
                    writing = group.create_task(self._written(made, len(taken)))

    async def write(self, data: bytes) -> None:
        """Put *data* between two sections. Raises OSError."""
        async with self._turn:
            await asyncio.get_running_loop().sock_sendall(self._wire, data)

    async def _send(self, block: str, first: int, count: int) -> None:
        """Send those of the pages that did not go yet."""
        taken = await self._taken(block, first, count)
        if not len(taken):
            return
        try:
            # what somebody waits for is mostly in the host's memory: a thread would be slower
            made, _ = self._made(block, taken, os.RWF_NOWAIT)
        except BlockingIOError:
            made, _ = await asyncio.to_thread(self._made, block, taken)
        await self._written(made, len(taken))

    async def _taken(self, block: str, first: int, count: int) -> Numbers:
        """Those of the pages that did not go yet, once they are there; now they count as sent."""
        sent, pages = self._sent[block], np.arange(first, first + count)
        if not sent.has(pages).all():
            await self._pages.ready(block, first * PAGE, count * PAGE)
        pages = pages[~sent.has(pages)]  # some may have gone meanwhile
        if len(pages):
            sent.add(pages)
        return pages

    def _made(self, block: str, pages: Numbers, flags: int = 0) -> tuple[bytes, bool]:
        """A section with *pages*, and whether they are all holes.

        Raises LocalFailed, and BlockingIOError where *flags* rule out that it is waited for a disk.
        """
        fd, rows = self._images[block], None
        try:
            if not (holes := _is_hole(fd, pages)):
                rows = _read(fd, pages, flags)
        except BlockingIOError:
            raise
        except OSError as failed:
            raise LocalFailed(f"{self._pages.images[block]}: {failed.strerror}") from failed
        return handover.section(self._ram, *_records(block, pages, rows)), holes

    async def _written(self, made: bytes, count: int) -> None:
        await self.write(made)
        self.done += count * PAGE
        if self._tell is not None:
            self._tell(self.done, self._all)


def _opened(path: Path, size: int) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as failed:
        raise LocalFailed(f"{path}: {failed.strerror}") from failed
    if (found := os.fstat(fd).st_size) != size:
        os.close(fd)
        raise DamagedData(f"{path} has {found} bytes, and its RAM block {size}")
    return fd


def _is_hole(fd: int, pages: Numbers) -> bool:
    start, end = int(pages[0]) * PAGE, (int(pages[-1]) + 1) * PAGE
    if os.fstat(fd).st_size < end:  # what was cut off is no hole
        raise OSError(errno.EIO, "it was cut short")
    try:
        return os.lseek(fd, start, os.SEEK_DATA) >= end
    except OSError as none:
        if none.errno != errno.ENXIO:  # no data any more
            raise
        return True


def _read(fd: int, pages: Numbers, flags: int) -> Rows:
    """The content of *pages*, in ascending order."""
    start, end = int(pages[0]) * PAGE, (int(pages[-1]) + 1) * PAGE
    data = np.empty(end - start, np.uint8)
    view = data.data
    while view:
        try:
            count = os.preadv(fd, [view], start, flags)
        except OSError as failed:
            if failed.errno == errno.EOPNOTSUPP:  # this file system cannot tell
                raise BlockingIOError from failed
            raise
        if not count:
            raise OSError(errno.EIO, "it was cut short")
        view, start = view[count:], start + count
    rows = data.reshape(-1, PAGE)
    return rows if len(rows) == len(pages) else rows[pages - pages[0]]


def _records(block: str, pages: Numbers, rows: Rows | None) -> list[Buffer]:
    """The records of *pages*, whose content is *rows*, or zeros."""
    if rows is None:
        return _of_one_kind(block, pages, records.ZERO, np.zeros((len(pages), 1), np.uint8))
    zero = _zero(rows)
    if not zero.any():
        return _of_one_kind(block, pages, records.CONTENT, rows)
    return [
        *_of_one_kind(block, pages[~zero], records.CONTENT, rows[~zero]),
        *_of_one_kind(block, pages[zero], records.ZERO, rows[zero, :1]),
    ]


def _zero(rows: Rows) -> npt.NDArray[np.bool_]:
    words = rows.view(np.uint64)
    zero = np.logical_not(words[:, ::_LOOK].any(axis=1))
    zero[zero] = ~words[zero].any(axis=1)
    return zero


def _of_one_kind(block: str, pages: Numbers, kind: int, data: Rows) -> list[Buffer]:
    """The first record names the block, those behind it go on with it."""
    if not len(pages):
        return []
    made = np.empty((len(pages) - 1, 8 + data.shape[1]), np.uint8)
    heads = (pages[1:] * PAGE | kind | records.CONTINUE).astype(">u8")
    made[:, :8] = heads.view(np.uint8).reshape(-1, 8)
    made[:, 8:] = data[1:]
    return [records.record(int(pages[0]) * PAGE, kind, block), data[0].data, made.reshape(-1).data]
