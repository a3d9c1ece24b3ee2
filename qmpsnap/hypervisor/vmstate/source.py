"""Our end of a postcopy migration: sends what there is to send, and answers what QEMU wants."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from qmpsnap.errors import GuestLacksPages, MigrationFailed, MonitorLost, ReplyMalformed, SnapError
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.hypervisor.vmstate import handover, migration
from qmpsnap.hypervisor.vmstate.feed import Feed
from qmpsnap.hypervisor.vmstate.handover import Handover
from qmpsnap.hypervisor.vmstate.returnpath import (
    Acknowledged,
    Pong,
    Received,
    ReturnPath,
    Shut,
    Wanted,
)

_SAYS_WITHIN = 2.0  # seconds
_MOST_ASKED = 512  # requests that are answered at a time; more wait in QEMU


class Source:
    """Our end of a migration: *feed* sends, *path* says what QEMU wants."""

    def __init__(self, plan: Handover, feed: Feed, path: ReturnPath) -> None:
        self.plan, self.feed, self.path = plan, feed, path
        self.loaded = asyncio.Event()
        self.unwilling: SnapError | None = None  # what the caller said once it was loaded
        self._room = asyncio.Semaphore(_MOST_ASKED)
        self._answers: set[asyncio.Task[None]] = set()

    async def listen(self, group: asyncio.TaskGroup) -> None:
        """Answer QEMU until it has all.

        Raises MigrationFailed (it gave up), ReplyMalformed, EOFError, OSError.
        """
        while True:
            match await self.path.next():
                case Shut(error=0):
                    return
                case Shut(error=error):
                    raise MigrationFailed(f"QEMU gave its migration up with {error}")
                case Pong(value=handover.LOADED):
                    self.loaded.set()
                case Wanted(block=block, start=start, bytes=length):
                    await self._room.acquire()
                    answer = group.create_task(self.feed.answer(block, start, length))
                    self._answers.add(answer)
                    answer.add_done_callback(self._answered)

    def _answered(self, answer: asyncio.Task[None]) -> None:
        self._answers.discard(answer)
        self._room.release()

    async def sent(self) -> None:
        """Send all pages, and that these were all."""
        await self.feed.push()
        while self._answers:  # pages that the others have left to them
            await asyncio.wait(self._answers)
        await self.feed.write(self.plan.end())

    async def begun(self) -> None:
        """Send all but the pages, and wait for QEMU to have loaded it."""
        pieces = self.plan.head()
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            await self.feed.write(piece)
        await self.loaded.wait()

    async def taken_up(self) -> None:
        """Learn what QEMU has, and let it ask again. Raises as `listen`, and as `Feed.write`."""
        self.loaded.set()
        for block in self.plan.large:
            await self.feed.write(handover.received(block))
            match await self.path.next():
                case Received(block=said, bitmap=bitmap) if said == block:
                    self.feed.has(block, bitmap)
                case other:
                    raise ReplyMalformed(f"{other} instead of the pages of {block} that are there")
        await self.feed.write(handover.resume())
        if (answer := await self.path.next()) != Acknowledged():
            raise ReplyMalformed(f"QEMU was to take up its migration, and said {answer}")


@asynccontextmanager
async def speaking(wire: socket.socket, plan: Handover, feed: Feed) -> AsyncIterator[Source]:
    """A source at our end of *wire*, through which *feed* sends, for the block."""
    wire.setblocking(False)
    # a descriptor of its own: asyncio does not write past a stream that it reads
    reader, writer = await asyncio.open_unix_connection(sock=wire.dup())
    try:
        yield Source(plan, feed, ReturnPath(reader, dict(plan.opening.blocks)))
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


@asynccontextmanager
async def told(monitor: Monitor, source: Source) -> AsyncIterator[None]:
    """What goes wrong in the block is told by what it means for the guest.

    Raises MonitorLost, MigrationFailed (nothing runs), GuestLacksPages (it may run).
    """
    try:
        yield
    except (SnapError, EOFError, OSError, BaseExceptionGroup) as failed:
        cause = _first(failed)
        known = isinstance(cause, SnapError | EOFError | OSError)
        if not known or cause is source.unwilling or isinstance(cause, MonitorLost):
            raise cause from None
        words = str(cause) if isinstance(cause, SnapError) else await _of_qemu(monitor)
        if source.loaded.is_set():
            raise GuestLacksPages(f"the guest has not got all of its RAM: {words}") from cause
        if isinstance(cause, SnapError):
            raise cause from None
        raise MigrationFailed(f"QEMU did not take the state: {words}") from cause


def _first(failed: BaseException) -> BaseException:
    return _first(failed.exceptions[0]) if isinstance(failed, BaseExceptionGroup) else failed


async def _of_qemu(monitor: Monitor) -> str:
    """What QEMU says of a wire that was cut. Raises MonitorLost: it has ended."""
    try:
        async with asyncio.timeout(_SAYS_WITHIN):  # its main loop may wait for a page as well
            now = await migration.query(monitor)
    except TimeoutError:
        return "the connection was cut"
    return now.error_desc or f"the connection was cut, and the migration is {now.status}"
