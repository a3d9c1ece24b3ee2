"""A bounded piece of a stream that moves along it: the only place that reads one."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from qmpsnap.errors import Failed, LocalFailed
from qmpsnap.hypervisor.vmstate import records, sparse

SIZE = 8 << 20  # bytes

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class Cancelled(Failed):
    """The caller's `cancelled` said so."""


class Window:
    """`buffer[pos:end]` is what comes next in the stream of the descriptor *source*.

    A regular file is read from its start, wherever its position was. *size*: bytes held at most.
    *forget*: what the window has passed is punched out of the file. *on_progress* is told (bytes
    read, bytes of the file or 0); *cancelled* is asked, once a move.
    """

    def __init__(
        self,
        source: int,
        *,
        size: int = SIZE,
        forget: bool = False,
        on_progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        self.buffer = bytearray(size)
        self.pos = self.end = 0
        self.ended = False
        self._base = self._forgotten = 0
        self._source, self._forget = source, forget
        self._tell, self._cancelled = on_progress, cancelled
        status = os.fstat(source)
        self.regular = stat.S_ISREG(status.st_mode)
        self._total = status.st_size
        if self.regular:
            os.lseek(source, 0, os.SEEK_SET)

    @property
    def offset(self) -> int:
        """Where `pos` is in the stream."""
        return self._base + self.pos

    @property
    def left(self) -> int:
        """Bytes of the stream that are in the window."""
        return self.end - self.pos

    def fill(self) -> None:
        """Move on: what was passed goes, and the window is as full as can be.

        Raises LocalFailed, Cancelled.
        """
        if self._cancelled is not None and self._cancelled():
            raise Cancelled("the migration stream was not read to its end: cancelled")
        rest = self.buffer[self.pos : self.end]
        self.buffer[: len(rest)] = rest
        view = memoryview(self.buffer)
        try:
            self._forget_passed()
            self._base += self.pos
            self.pos, self.end = 0, len(rest)
            while self.end < len(view) and not self.ended:
                count = os.readv(self._source, [view[self.end :]])
                self.end += count
                self.ended = count == 0
        except OSError as failed:
            raise LocalFailed(f"the migration stream: {failed.strerror}") from failed
        if self._tell is not None:
            self._tell(self._base + self.end, self._total)

    def _forget_passed(self) -> None:
        passed = (self._base + self.pos) // records.PAGE * records.PAGE
        if self._forget and passed > self._forgotten:
            length = passed - self._forgotten
            self._forget = sparse.punch(self._source, self._forgotten, length)
            self._forgotten = passed

    def has(self, count: int) -> bool:
        """Whether *count* more bytes come; they are in the window then."""
        if self.left < count and not self.ended:
            self.fill()
        return self.left >= count

    def peek(self, count: int) -> bytes:
        """The next *count* bytes, fewer at the end of the stream."""
        self.has(count)
        return bytes(self.buffer[self.pos : min(self.pos + count, self.end)])

    def take(self, count: int) -> bytes:
        """The next *count* bytes, passed. Raises DamagedData when the stream ends before."""
        taken = self.peek(count)
        if len(taken) < count:
            raise self.cut()
        self.pos += count
        return taken

    def number(self, size: int) -> int:
        """The next number, of *size* bytes. Raises DamagedData."""
        return int.from_bytes(self.take(size), "big")

    def name(self) -> str:
        """The next name, behind its length. Raises DamagedData."""
        where = self.offset
        word = self.take(self.number(1))
        try:
            return word.decode()
        except UnicodeDecodeError as odd:
            raise records.damaged(f"no name: {word!r}", where) from odd

    def expect(self, word: bytes, what: str) -> None:
        """Pass *word*, which must come next. Raises DamagedData."""
        found = self.peek(len(word))
        if found != word:
            if word.startswith(found):
                raise self.cut()
            raise records.damaged(f"{what} is not there", self.offset)
        self.pos += len(word)

    def cut(self) -> Exception:
        """The complaint that the stream ends too early."""
        return records.damaged("it ends there", self.offset + self.left)
