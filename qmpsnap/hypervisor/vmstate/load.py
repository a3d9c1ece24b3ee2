"""Giving a captured execution state to a QEMU that waits for it (`-incoming defer -S`)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

from qmpsnap.errors import MigrationFailed
from qmpsnap.hypervisor.abilities import set_capabilities
from qmpsnap.hypervisor.guest import runstate
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.hypervisor.vmstate import migration
from qmpsnap.shield import finish

_FDNAME = "qmpsnap-in"


async def load(monitor: Monitor, feed: Callable[[int], Awaitable[None]]) -> None:
    """Let *feed* write the stream into a descriptor from which QEMU loads it.

    Ends with the machine loaded and paused; `cont` makes it run. A pipe is the one way that QEMU
    7.2 to 11.1 all take.

    Raises MigrationFailed (QEMU did not take it), MonitorLost (before 9.1 QEMU exits then: its
    stderr has the reason), and what *feed* raises.
    """
    await set_capabilities(monitor, {"events": True})
    reading, writing = os.pipe()
    try:
        await monitor.send_fd(reading)
        await monitor.execute("getfd", {"fdname": _FDNAME})
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    with monitor.listen("MIGRATION") as events:
        feeding = asyncio.ensure_future(_fed(feed, writing))

        async def fed_so_far(_now: migration.Migration) -> None:
            # a pipe that ends before its first byte wakes no QEMU: it would wait for ever
            if feeding.done() and not _refused(feeding):
                feeding.result()

        try:
            await monitor.execute("migrate-incoming", {"uri": f"fd:{_FDNAME}"})
            await migration.reach(monitor, events, "completed", each=fed_so_far, incoming=True)
            await feeding
        except BaseException:
            feeding.cancel()
            await finish(_ended(feeding), within=10)
            over = feeding.done() and not feeding.cancelled() and not _refused(feeding)
            if over and (cause := feeding.exception()):
                raise cause from None  # the stream was cut short on our side: that is the reason
            raise
    state = await runstate.query(monitor)
    if state is not runstate.RunState.PAUSED:
        raise MigrationFailed(f"after loading its state the guest is {state}, not paused")


async def _fed(feed: Callable[[int], Awaitable[None]], writing: int) -> None:
    try:
        await feed(writing)
    finally:
        os.close(writing)


def _refused(feeding: asyncio.Future[None]) -> bool:
    """Whether it was QEMU that took no more: it says why."""
    failed = None if feeding.cancelled() else feeding.exception()
    if failed is None:
        return False
    # another process that fed it can only tell of that
    return isinstance(failed.__cause__ or failed, BrokenPipeError) or "EPIPE" in str(failed)


async def _ended(feeding: asyncio.Future[None]) -> None:
    await asyncio.wait([feeding])
