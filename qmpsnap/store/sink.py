"""A big new file being filled: the only place that paces it and keeps room free beside it."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from qmpsnap.errors import LocalFailed
from qmpsnap.store.files import Progress

STEP = 4 << 20  # bytes between two looks at clock, room and wishes
_WINDOW = 16 << 20  # what is pushed to the disk in one go
_IN_FLIGHT = 8  # windows on their way to the disk before we wait for the oldest
_AHEAD = 24  # windows that may lie in the page cache before the writer waits
_LOOK = 0.2  # seconds
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4
_CANNOT = {errno.ENOSYS, errno.ESPIPE, errno.EINVAL, errno.EOPNOTSUPP}
_libc = ctypes.CDLL(None, use_errno=True)


class Cancelled(Exception):
    """The caller's `cancelled` said so; nothing is left of the file."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How a file may be filled: *limit* in bytes a second, *reserve* in bytes that stay free."""

    limit: int | None
    reserve: int
    cancelled: Callable[[], bool]
    on_progress: Progress | None


def expect_room(path: Path, needed: int, reserve: int) -> None:
    """Raises LocalFailed unless *path*'s file system has *needed* bytes besides *reserve*."""
    status = os.statvfs(path.parent)
    free = status.f_bavail * status.f_frsize
    if free < needed + reserve:
        raise LocalFailed(
            f"{path}: no room: {needed} bytes to write and {reserve} bytes to stay free, "
            f"but only {free} bytes are"
        )


class Sink:
    """The open file *descriptor*, to be known as *path*, while *total* bytes are worked through.

    What is written is pushed to the disk from a thread of its own, and never far behind: the last
    fsync is short, and the host's page cache is not filled with what other writers, the guest
    among them, would then have to wait for.
    """

    def __init__(self, descriptor: int, path: Path, terms: Terms, *, total: int, what: str) -> None:
        self.written = 0
        """Bytes given to the file so far."""
        self._descriptor, self._path, self._terms = descriptor, path, terms
        self._total, self._what = total, what
        self._begun = self._told = time.monotonic()
        self._start = self._end = self._dirty = 0
        self._pusher = ThreadPoolExecutor(1, "sink")
        self._pushes: deque[Future[None]] = deque()
        self._in_flight: deque[tuple[int, int]] = deque()
        limit = terms.limit
        self.step = STEP if limit is None else min(STEP, max(65536, limit // 4 // 65536 * 65536))
        """Bytes at most that are to be written between two looks."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failed: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pusher.shutdown(cancel_futures=True)  # before the descriptor is closed
        if failed is None:
            for push in self._pushes:
                if not push.cancelled():
                    push.result()

    def pwrite(self, content: bytes | memoryview, offset: int) -> None:
        """Write all of *content* at *offset*. Raises OSError."""
        view = memoryview(content)
        while view:
            taken = os.pwrite(self._descriptor, view, offset)
            self.wrote(offset, taken)
            view, offset = view[taken:], offset + taken

    def wrote(self, offset: int, size: int) -> None:
        """Somebody has written *size* bytes at *offset*. Raises OSError for those before them."""
        if offset < self._end or not self._dirty:
            self._push()
            self._start = offset
        self._end = offset + size
        self._dirty += size
        self.written += size
        if self._dirty >= _WINDOW:
            self._push()

    def passed(self, size: int) -> None:
        """Somebody has written *size* bytes that are on the disk already."""
        self.written += size

    def look(self, done: int) -> None:
        """To be called every `step` bytes: *done* bytes of the total are worked through.

        Raises Cancelled, LocalFailed when the room goes to its end, and OSError.
        """
        self._stop_if_cancelled()
        expect_room(self._path, 0, self._terms.reserve)
        while len(self._pushes) > _AHEAD:
            oldest = self._pushes[0]
            if wait({oldest}, timeout=_LOOK).done:
                self._pushes.popleft().result()
            self._stop_if_cancelled()
        if self._terms.limit is not None:
            self._sleep_until(self._begun + self.written / self._terms.limit)
        self._tell(done)

    def _sleep_until(self, due: float) -> None:
        while (left := due - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK))
            self._stop_if_cancelled()

    def _stop_if_cancelled(self) -> None:
        if self._terms.cancelled():
            raise Cancelled(str(self._path))

    def _tell(self, done: int) -> None:
        now = time.monotonic()
        if self._terms.on_progress is not None and (
            done >= self._total or now - self._told >= _LOOK
        ):
            self._told = now
            self._terms.on_progress(done, self._total, self._what)

    def _push(self) -> None:
        if self._dirty:
            window = self._start, self._end - self._start
            self._pushes.append(self._pusher.submit(self._write_back, window))
            self._dirty = 0

    def _write_back(self, window: tuple[int, int]) -> None:
        self._sync_range(*window, _WRITE)
        self._in_flight.append(window)
        if len(self._in_flight) > _IN_FLIGHT:
            # Whoever waits is told of a failed write, and fsync() then is not: it must be raised
            self._sync_range(*self._in_flight.popleft(), _WAIT_BEFORE | _WRITE | _WAIT_AFTER)

    def _sync_range(self, offset: int, size: int, flags: int) -> None:
        told = _libc.sync_file_range(
            self._descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), ctypes.c_uint(flags)
        )
        if told != 0 and (number := ctypes.get_errno()) not in _CANNOT:
            raise OSError(number, os.strerror(number), str(self._path))
