"""A guest that runs before its RAM is there: we play the source of a postcopy migration.

QEMU catches the guest at a page that it lacks (userfaultfd), asks for it on the return path, and
lets the guest go on when it has come. At the end all RAM is QEMU's own, and nobody else's.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path

from qmpsnap.errors import (
    Blocked,
    CommandRefused,
    MigrationFailed,
    MonitorLost,
    SnapError,
)
from qmpsnap.hypervisor.abilities import set_capabilities
from qmpsnap.hypervisor.guest.runstate import RunState, query
from qmpsnap.hypervisor.machine.asking import Asking
from qmpsnap.hypervisor.monitor import Monitor, settle
from qmpsnap.hypervisor.vmstate import handover
from qmpsnap.hypervisor.vmstate.feed import Feed, Pages
from qmpsnap.hypervisor.vmstate.records import PAGE
from qmpsnap.hypervisor.vmstate.session import Progress
from qmpsnap.hypervisor.vmstate.source import speaking, told
from qmpsnap.shield import finish

__all__ = ["Pages", "postcopy", "resume", "trouble"]

_FDNAME = "qmpsnap-in"
_CAPABILITY = "postcopy-ram"
_LOOK_AGAIN = 0.001  # seconds
_PAUSES_WITHIN = 2.0
_RAM_BLOCK = re.compile(r"\s*(.+?)\s+(\d+ [KMGT]iB)\s+0x[0-9a-f]+ ")


async def trouble(monitor: Monitor) -> str:
    """Why the QEMU that waits there cannot take its pages on demand; empty if it can.

    It is left as it was. Setting the capability is the probe: QEMU then looks at the kernel, its
    privileges, its memory and its devices; 7.2 writes what it found to its stderr only.
    """
    if (size := os.sysconf("SC_PAGE_SIZE")) != PAGE:
        return f"this host's pages are of {size} bytes"
    asking = Asking(monitor)
    if why := huge(await asking.human("info ramblock") or []):
        return why
    for one in await asking.quietly("qom-list", path="/objects") or []:
        # a page that was thrown away would come back out of the file, and nobody would ask for it
        if one["type"] == "child<memory-backend-file>":
            return f"memory backend {one['name']} is a file"
    try:
        await set_capabilities(monitor, {_CAPABILITY: True})
    except CommandRefused as refused:
        return refused.desc
    finally:
        await finish(settle(monitor, _off), within=20)
    return ""


def huge(said: Iterable[str]) -> str:
    """Which RAM block is of huge pages, of those that `info ramblock` *said*; empty if none is."""
    for line in said:
        found = _RAM_BLOCK.match(line)
        if found is not None and found[2] != f"{PAGE >> 10} KiB":
            return f"RAM block {found[1]} is made of pages of {found[2]}"
    return ""


async def postcopy(
    monitor: Monitor,
    stream: Path,
    pages: Pages,
    *,
    on_running: Callable[[], Awaitable[None]],
    on_progress: Progress | None = None,
) -> None:
    """Load the small *stream* into a QEMU that waits with `-incoming defer -S`, then its *pages*.

    As soon as the machine is loaded and paused *on_running* is awaited, whose `cont` lets it run:
    its pages come meanwhile, those first that it touches. Returns when all RAM is local.
    *on_progress* is told bytes of the large blocks: done, and in all.

    Raises Blocked (it cannot be done with this QEMU; nothing was loaded), MigrationFailed (QEMU did
    not take the state), MonitorLost (it exits then: its stderr has the reason), GuestLacksPages
    (the guest may run; whoever touches a page that is missing waits: `resume`), StreamUnknown,
    DamagedData, and what *on_running* raises.
    """
    plan = await asyncio.to_thread(handover.read, stream, pages.images)
    if why := await trouble(monitor):
        raise Blocked(f"its RAM cannot come on demand: {why}")
    await set_capabilities(monitor, {"events": True, _CAPABILITY: True})
    ours, theirs = socket.socketpair()
    with ours, theirs, Feed(ours, plan.opening.ram, plan.large, pages, on_progress) as feed:
        await monitor.send_fd(theirs.fileno())
        await monitor.execute("getfd", {"fdname": _FDNAME})
        theirs.close()
        await monitor.execute("migrate-incoming", {"uri": f"fd:{_FDNAME}"})
        async with (
            speaking(ours, plan, feed) as source,
            told(monitor, source),
            asyncio.TaskGroup() as group,
        ):
            group.create_task(source.listen(group))
            await source.begun()
            await _paused(monitor)
            group.create_task(source.sent())
            try:
                await on_running()
            except SnapError as unwilling:
                source.unwilling = unwilling
                raise
    await _set_back(monitor)


async def resume(
    monitor: Monitor,
    stream: Path,
    pages: Pages,
    *,
    meeting: Path,
    on_progress: Progress | None = None,
) -> None:
    """Send a guest that has lost its source (`postcopy-paused`) the pages that it still lacks.

    QEMU tells which these are. *meeting*: where QEMU is to listen, a path for a unix socket.

    *monitor* must have been connected before QEMU's main loop touched a missing page: a new session
    begins with a command that this loop answers.

    Raises CommandRefused (no source was lost), GuestLacksPages, StreamUnknown, DamagedData.
    """
    plan = await asyncio.to_thread(handover.read, stream, pages.images)
    await asyncio.to_thread(meeting.unlink, missing_ok=True)
    await _recovering(monitor, f"unix:{meeting}")
    try:
        with (
            socket.socket(socket.AF_UNIX) as ours,
            Feed(ours, plan.opening.ram, plan.large, pages, on_progress) as feed,
        ):
            # from 11.1 on QEMU gives up for ever on somebody who comes, says nothing, and leaves
            ours.connect(str(meeting))
            async with speaking(ours, plan, feed) as source, told(monitor, source):
                await source.taken_up()
                async with asyncio.TaskGroup() as group:
                    group.create_task(source.listen(group))
                    group.create_task(source.sent())
    finally:
        await asyncio.to_thread(meeting.unlink, missing_ok=True)
    await _set_back(monitor)


async def _recovering(monitor: Monitor, uri: str) -> None:
    """Let QEMU wait at *uri* for a new source. Raises CommandRefused, MonitorLost."""
    end = time.monotonic() + _PAUSES_WITHIN
    while True:
        try:
            await monitor.urgently("migrate-recover", {"uri": uri})
        except CommandRefused:
            # it may not have seen yet that the old one has gone
            if time.monotonic() > end:
                raise
            await asyncio.sleep(_LOOK_AGAIN * 10)
        else:
            return


async def _paused(monitor: Monitor) -> None:
    """Wait for QEMU to leave `inmigrate`: only then `cont` is one. Raises MigrationFailed."""
    while True:
        state = await query(monitor)
        if state is not RunState.INMIGRATE:
            break
        await asyncio.sleep(_LOOK_AGAIN)  # it takes microseconds, and no event tells
    if state is not RunState.PAUSED:
        raise MigrationFailed(f"after loading its state the guest is {state}, not paused")


async def _set_back(monitor: Monitor) -> None:
    with suppress(CommandRefused, MonitorLost):  # who saves this guest sets it as he needs it
        await finish(settle(monitor, _off), within=20)


async def _off(monitor: Monitor) -> None:
    await set_capabilities(monitor, {_CAPABILITY: False})
