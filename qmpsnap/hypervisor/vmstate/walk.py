"""The records of a RAM section, thousands at a time: the only place that looks at their heads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qmpsnap.hypervisor.vmstate.records import (
    CONTENT,
    CONTINUE,
    EOS,
    PAGE,
    ZERO,
    damaged,
    refuse_flags,
)
from qmpsnap.hypervisor.vmstate.window import Window

Numbers = npt.NDArray[np.int64]

_HEAD = 8  # bytes: address and flags
_FLAGS = PAGE - 1
_SIZES = {CONTENT | CONTINUE: _HEAD + PAGE, ZERO | CONTINUE: _HEAD + 1}
_LONGEST = _HEAD + 256 + PAGE  # bytes of a record that names its block
_PROBE = 64  # records that are looked at before more are
_LONG = 32  # records of a kind from which on they are taken in one stride
_STRIDE = 1 << 16  # records taken in one stride at most
_HELD = 1 << 17  # records after which they are handed on
_MIXED = 256 << 10  # bytes of short runs that are taken at a time

# the head of each record of the current block, as long as one follows on the other; what does not
# is one last match, of an empty group
_RECORD = re.compile(
    rb"(.{6}[%b](?:\x28|\x22))(?:(?<=\x28).{%d}|(?<=\x22).)|.+"
    % (b"".join(re.escape(bytes([high << 4])) for high in range(16)), PAGE),
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Pages of one block in the order of the stream; a page may come again, and counts then.

    *pages*: their numbers. *places*: where in the window's buffer the content of each is; -1 is a
    zero page, -1 - n one that is full of the byte n.
    """

    block: int
    pages: Numbers
    places: Numbers


class Walker:
    """Walks the sections of a RAM that has these *blocks*: name and bytes of each."""

    def __init__(self, blocks: Sequence[tuple[str, int]]) -> None:
        self._numbers = {name: number for number, (name, _) in enumerate(blocks)}
        self._bytes = [size for _, size in blocks]
        self._block: int | None = None  # of the last record, which one with CONTINUE goes on with
        self._held: list[Batch] = []
        self._count = 0

    def section(self, window: Window) -> Iterator[Batch]:
        """Walk to the end of the section that *window* stands in, behind its header.

        A batch is good until the next one is asked for. Raises StreamUnknown, DamagedData.
        """
        while True:
            if self._count > _HELD:
                yield from self._handed()
            if window.left < _LONGEST and not window.ended:
                yield from self._handed()
                window.fill()
            if window.left < _HEAD:
                raise window.cut()
            head = int.from_bytes(window.buffer[window.pos : window.pos + _HEAD], "big")
            flags = head & _FLAGS
            if flags in _SIZES:
                self._run(window, flags)
            elif flags in {CONTENT, ZERO}:
                self._named(window, head)
            elif flags == EOS:
                window.pos += _HEAD
                yield from self._handed()
                return
            else:
                refuse_flags(flags, window.offset)

    def _handed(self) -> Iterator[Batch]:
        held, self._held, self._count = self._held, [], 0
        for block in dict.fromkeys(batch.block for batch in held):
            own = [batch for batch in held if batch.block == block]
            if len(own) == 1:
                yield own[0]
            else:
                yield Batch(
                    block,
                    np.concatenate([batch.pages for batch in own]),
                    np.concatenate([batch.places for batch in own]),
                )

    def _hold(self, heads: npt.NDArray[np.uint64], places: Numbers, where: int) -> None:
        if self._block is None:
            raise damaged("a RAM record goes on with no block", where)
        if (highest := int(heads.max())) >= self._bytes[self._block]:
            raise damaged(f"a page at {highest & ~_FLAGS:#x} is outside of its block", where)
        pages = (heads >> np.uint64(12)).astype(np.int64)
        self._held.append(Batch(self._block, pages, places))
        self._count += len(pages)

    def _named(self, window: Window, head: int) -> None:
        where = window.offset
        window.pos += _HEAD
        name = window.name()
        if name not in self._numbers:
            raise damaged(f"there is no RAM block {name!r}", where)
        self._block = self._numbers[name]
        size = PAGE if head & CONTENT else 1
        if window.left < size:
            raise window.cut()
        place = window.pos if head & CONTENT else -1 - window.buffer[window.pos]
        window.pos += size
        self._hold(np.array([head], np.uint64), np.array([place], np.int64), where)

    def _run(self, window: Window, flags: int) -> None:
        size, start = _SIZES[flags], window.pos
        count = min(window.left // size, _STRIDE)
        if count == 0:
            raise window.cut()
        heads = _like(window, size, flags, count)
        if len(heads) < min(count, _LONG):
            return self._mixed(window)
        places = np.arange(len(heads), dtype=np.int64) * size + (start + _HEAD)
        if flags & ZERO:
            places = -1 - _bytes(window)[places].astype(np.int64)
        window.pos += len(heads) * size
        return self._hold(heads, places, window.offset)

    def _mixed(self, window: Window) -> None:
        start = window.pos
        found = _RECORD.findall(window.buffer, start, min(window.end, start + _MIXED))
        heads = np.frombuffer(b"".join(found), ">u8").astype(np.uint64)
        content = (heads & np.uint64(CONTENT)) != 0
        sizes = np.where(content, _SIZES[CONTENT | CONTINUE], _SIZES[ZERO | CONTINUE])
        ends = start + np.cumsum(sizes)
        places = ends - sizes + _HEAD
        fills = _bytes(window)[places].astype(np.int64)
        window.pos = int(ends[-1])
        self._hold(heads, np.where(content, places, -1 - fills), window.offset)


def _bytes(window: Window) -> npt.NDArray[np.uint8]:
    return np.frombuffer(window.buffer, np.uint8)


def _like(window: Window, size: int, flags: int, count: int) -> npt.NDArray[np.uint64]:
    """The heads of the records with *flags* that come next, *count* at most, each *size* bytes."""
    heads = np.empty(0, np.uint64)
    for some in sorted({min(_PROBE, count), count}):
        heads = np.ndarray((some,), ">u8", window.buffer, window.pos, (size,)).astype(np.uint64)
        other = (heads & np.uint64(_FLAGS)) != flags
        if other.any():
            return heads[: int(other.argmax())]
    return heads
