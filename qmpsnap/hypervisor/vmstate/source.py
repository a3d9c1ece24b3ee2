"""Our end of a postcopy migration: sends what there is to send, and answers what QEMU wants."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from qmpsnap.errors import (
    DamagedData,
    GuestLacksPages,
    MigrationFailed,
    MonitorLost,
    ReplyMalformed,
    SnapError,
)
from qmpsnap.hypervisor.vmstate import handover
from qmpsnap.hypervisor.vmstate.feed import Feed, Pages
from qmpsnap.hypervisor.vmstate.handover import Handover
from qmpsnap.hypervisor.vmstate.returnpath import (
    Acknowledged,
    Pong,
    Received,
    ReturnPath,
    Shut,
    Wanted,
)
from qmpsnap.hypervisor.vmstate.session import Progress

Words = Callable[[], Awaitable[str]]
"""What QEMU says of a wire that was cut. Raises MonitorLost: it has ended."""

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
async def told(words: Words, source: Source) -> AsyncIterator[None]:
    """What goes wrong in the block is told by what it means for the guest.

    Raises MonitorLost (it has ended), MigrationFailed (nothing runs), GuestLacksPages (it may run).
    """
    try:
        yield
    except (SnapError, EOFError, OSError, BaseExceptionGroup) as failed:
        cause = _first(failed)
        known = isinstance(cause, SnapError | EOFError | OSError)
        if not known or cause is source.unwilling or isinstance(cause, MonitorLost):
            raise cause from None
        said = str(cause) if isinstance(cause, SnapError) else await words()
        if isinstance(cause, DamagedData):
            raise cause from None
        if source.loaded.is_set():
            raise GuestLacksPages(f"the guest has not got all of its RAM: {said}") from cause
        if isinstance(cause, SnapError):
            raise cause from None
        raise MigrationFailed(f"QEMU did not take the state: {said}") from cause


async def play(
    wire: socket.socket,
    stream: Path,
    pages: Pages,
    *,
    reach: Callable[[], Awaitable[None]],
    on_loaded: Callable[[], Awaitable[None]],
    words: Words,
    on_progress: Progress | None = None,
) -> None:
    """Send the small *stream* into *wire*, then, after *on_loaded*, the *pages*.

    *reach* lets QEMU read at the other end (`postcopy.accept`): all is open by then that can fail.
    Returns when all RAM is there. *words* tells what QEMU says of a wire that was cut.
    *on_progress* is told bytes of the large blocks: done, and in all.

    Raises MigrationFailed (QEMU did not take the state), MonitorLost (it has ended),
    GuestLacksPages (the guest may run; whoever touches a page that is missing waits: `take_over`),
    StreamUnknown, DamagedData, and what *reach* and *on_loaded* raise.
    """
    plan = await asyncio.to_thread(handover.read, stream, pages.images)
    with Feed(wire, plan.opening.ram, plan.large, pages, on_progress) as feed:
        await reach()
        async with (
            speaking(wire, plan, feed) as source,
            told(words, source),
            asyncio.TaskGroup() as group,
        ):
            group.create_task(source.listen(group))
            await source.begun()
            try:
                await on_loaded()
            except SnapError as unwilling:
                source.unwilling = unwilling
                raise
            group.create_task(source.sent())


async def take_over(
    wire: socket.socket,
    stream: Path,
    pages: Pages,
    *,
    reach: Callable[[], Awaitable[None]],
    on_taken: Callable[[], Awaitable[None]],
    words: Words,
    on_progress: Progress | None = None,
) -> None:
    """Send a guest that has lost its source (`postcopy-paused`) the pages that it still lacks.

    QEMU tells which these are. *reach* connects *wire* to it, when all is open that can fail: from
    11.1 on QEMU gives up for ever on somebody who comes, says nothing, and leaves. *on_taken* is
    awaited once it takes pages again.

    Raises GuestLacksPages, MonitorLost, StreamUnknown, DamagedData, and what *reach* raises.
    """
    plan = await asyncio.to_thread(handover.read, stream, pages.images)
    with Feed(wire, plan.opening.ram, plan.large, pages, on_progress) as feed:
        await reach()
        async with speaking(wire, plan, feed) as source, told(words, source):
            await source.taken_up()
            await on_taken()
            async with asyncio.TaskGroup() as group:
                group.create_task(source.listen(group))
                group.create_task(source.sent())


def _first(failed: BaseException) -> BaseException:
    return _first(failed.exceptions[0]) if isinstance(failed, BaseExceptionGroup) else failed
