"""A source of pages in the test's own process: what is done by two of them otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.hypervisor.vmstate import migration
from qmpsnap.hypervisor.vmstate.feed import Pages
from qmpsnap.hypervisor.vmstate.postcopy import accept, over, paused, recovering
from qmpsnap.hypervisor.vmstate.session import Progress
from qmpsnap.hypervisor.vmstate.source import Words, play, take_over


async def postcopy(
    monitor: Monitor,
    stream: Path,
    pages: Pages,
    *,
    on_running: Callable[[], Awaitable[None]],
    on_progress: Progress | None = None,
) -> None:
    """Load the small *stream*, await *on_running* and bring the *pages* meanwhile."""

    async def loaded() -> None:
        await paused(monitor)
        await on_running()

    async def reach() -> None:
        await accept(monitor, theirs)
        theirs.close()

    ours, theirs = socket.socketpair()
    with ours, theirs:
        await play(
            ours, stream, pages, reach=reach, on_loaded=loaded, words=_words(monitor),
            on_progress=on_progress,
        )  # fmt: skip
    await over(monitor.execute)


async def resume(monitor: Monitor, stream: Path, pages: Pages, *, meeting: Path) -> None:
    """Be the new source of a guest that has lost its former one."""

    async def reach() -> None:
        await recovering(monitor.urgently, f"unix:{meeting}")
        ours.connect(str(meeting))

    async def taken() -> None:
        await asyncio.to_thread(meeting.unlink)

    with socket.socket(socket.AF_UNIX) as ours:
        await take_over(ours, stream, pages, reach=reach, on_taken=taken, words=_words(monitor))
    await over(monitor.execute)


def _words(monitor: Monitor) -> Words:
    async def words() -> str:
        # its main loop may wait for a page as well
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                return (await migration.query(monitor)).error_desc or ""
        return ""

    return words
