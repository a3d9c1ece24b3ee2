"""What QEMU says back while it loads: the only place that reads its return path.

Facts: QEMU's migration/migration.c and ram.c; all numbers big-endian, but for a bitmap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from qmpsnap.errors import ReplyMalformed
from qmpsnap.hypervisor.vmstate.records import PAGE

_SHUT = 1
_PONG = 2
_REQ_PAGES_ID = 3
_REQ_PAGES = 4
_RECV_BITMAP = 5
_RESUME_ACK = 6

_RANGE = 12  # bytes: where, how much
_BITMAP_ENDS = 0x0123456789ABCDEF
_MOST = 1 + 255 + _RANGE  # bytes of a message


@dataclass(frozen=True, slots=True)
class Shut:
    """QEMU has all it wants, or gave up: then *error* is not 0."""

    error: int


@dataclass(frozen=True, slots=True)
class Pong:
    value: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """Somebody in QEMU waits for these bytes of *block*: whole pages."""

    block: str
    start: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Received:
    """The pages of *block* that QEMU has: a bit each, the lowest bit of a byte first."""

    block: str
    bitmap: bytes


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """QEMU takes pages from its new source."""


Message = Shut | Pong | Wanted | Received | Acknowledged


class ReturnPath:
    """Reads the messages of a QEMU that has these *blocks*: the bytes of each."""

    def __init__(self, reader: asyncio.StreamReader, blocks: Mapping[str, int]) -> None:
        self._reader, self._blocks = reader, blocks
        self._block: str | None = None  # of the last request; the next one may not name it again

    async def next(self) -> Message:
        """The next message.

        Raises EOFError (QEMU, or who is between, has closed), OSError, ReplyMalformed.
        """
        kind, length = await self._number(2), await self._number(2)
        if length > _MOST:
            raise ReplyMalformed(f"a message of {length} bytes on the return path")
        body = await self._reader.readexactly(length)
        if kind in {_SHUT, _PONG} and length == 4:
            value = int.from_bytes(body, "big")
            return Shut(value) if kind == _SHUT else Pong(value)
        if kind == _REQ_PAGES and length == _RANGE and self._block is not None:
            return self._wanted(self._block, body)
        if kind == _REQ_PAGES_ID and length > _RANGE:
            self._block = self._named(body[_RANGE:])
            return self._wanted(self._block, body)
        if kind == _RECV_BITMAP:
            return await self._received(self._named(body))
        if kind == _RESUME_ACK:
            return Acknowledged()
        raise ReplyMalformed(f"a message {kind} of {length} bytes on the return path")

    async def _number(self, size: int) -> int:
        return int.from_bytes(await self._reader.readexactly(size), "big")

    def _named(self, word: bytes) -> str:
        block = word[1:].decode(errors="replace")
        if not word or word[0] != len(word) - 1 or block not in self._blocks:
            raise ReplyMalformed(f"the return path names a RAM block {block!r}")
        return block

    def _wanted(self, block: str, body: bytes) -> Wanted:
        start, length = int.from_bytes(body[:8], "big"), int.from_bytes(body[8:_RANGE], "big")
        if start % PAGE or length % PAGE or not 0 < length <= self._blocks[block] - start:
            raise ReplyMalformed(f"{length} bytes at {start} of RAM block {block} are asked for")
        return Wanted(block, start, length)

    async def _received(self, block: str) -> Received:
        size, pages = await self._number(8), self._blocks[block] // PAGE
        if not pages <= size * 8 < pages + 128:  # QEMU rounds up to words
            raise ReplyMalformed(f"a bitmap of {size} bytes for RAM block {block}")
        bitmap = await self._reader.readexactly(size)
        if await self._number(8) != _BITMAP_ENDS:
            raise ReplyMalformed(f"the bitmap of RAM block {block} does not end where it should")
        return Received(block, bitmap)
