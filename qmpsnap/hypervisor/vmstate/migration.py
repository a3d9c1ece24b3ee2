"""QEMU's migration as we use it: tuned for one capture, watched, called off, and set back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec

from qmpsnap.errors import CommandRefused, MigrationFailed, SnapError
from qmpsnap.hypervisor.abilities import capabilities as query_capabilities
from qmpsnap.hypervisor.abilities import set_capabilities
from qmpsnap.hypervisor.monitor import Events, Monitor, settle, understood
from qmpsnap.shield import finish

Scalar = bool | int | float | str
log = logging.getLogger(__name__)
UNLIMITED = 1 << 40  # bytes a second; QEMU's default of 128 MiB/s also holds back files
# A cancel that comes just before QEMU reaches `pre-switchover` leaves its migration thread waiting
# for ever to be continued, and the guest stopped (7.2: migration_maybe_pause). This wakes it; where
# nobody waits it does nothing.
WAKE = {"state": "cancelling"}
_ON_THE_WAY = {"setup", "active", "pre-switchover", "device"}
_OVER = {"completed", "failed", "cancelled", "none"}


class Ram(msgspec.Struct, frozen=True, rename="kebab"):
    """`ram` of query-migrate: bytes, pages, passes."""

    transferred: int = 0
    remaining: int = 0
    total: int = 0
    duplicate: int = 0
    normal: int = 0
    mbps: float = 0.0
    dirty_sync_count: int = 0
    dirty_pages_rate: int = 0
    page_size: int = 4096


class Migration(msgspec.Struct, frozen=True, rename="kebab"):
    """query-migrate, as far as we read it; times in milliseconds."""

    status: str = "none"
    ram: Ram = Ram()
    error_desc: str = ""
    blocked_reasons: list[str] = []
    total_time: int = 0

    @property
    def over(self) -> bool:
        return self.status in _OVER

    def refuse_over(self) -> None:
        """Raises MigrationFailed with QEMU's words if nothing is under way any more."""
        if self.over:
            raise MigrationFailed(
                f"migration {self.status}: {self.error_desc or 'QEMU gave no reason'}"
            )


async def query(monitor: Monitor) -> Migration:
    return await monitor.query("query-migrate", Migration)


async def query_parameters(monitor: Monitor, names: Iterable[str]) -> dict[str, Scalar]:
    """The migration parameters *names*. Raises ReplyMalformed, also where one is not told."""
    told = await monitor.query("query-migrate-parameters", dict[str, Any])
    async with understood("query-migrate-parameters"):
        return msgspec.convert({name: told[name] for name in names}, dict[str, Scalar])


@asynccontextmanager
async def tuned(
    monitor: Monitor, capabilities: set[str], parameters: Mapping[str, object]
) -> AsyncIterator[None]:
    """For the block exactly *capabilities* (and `events`) are on, and *parameters* hold.

    Afterwards everything is as it was found: capabilities and parameters outlive a migration.
    """
    before = await query_capabilities(monitor)
    wanted = {name: name in capabilities | {"events"} for name in before}
    changes = {name: state for name, state in wanted.items() if state != before[name]}
    ours = {"max-bandwidth": UNLIMITED, **parameters}
    old = await query_parameters(monitor, ours)

    async def as_found(current: Monitor) -> None:
        found = {name: not to for name, to in changes.items()}
        await set_back(current, found, old)

    try:
        # off before on: QEMU checks each call's outcome, and some exclude one another
        for state in (False, True):
            if some := {name: to for name, to in changes.items() if to is state}:
                await set_capabilities(monitor, some)
        await monitor.execute("migrate-set-parameters", ours)
        yield
    except BaseException:
        try:
            await finish(settle(monitor, as_found), within=20)
        except SnapError as trouble:
            log.info("not set back yet: %s", trouble)  # the journal knows: `recover` does it
        raise
    await finish(settle(monitor, as_found), within=20)


async def set_back(
    monitor: Monitor, capabilities: dict[str, bool], parameters: Mapping[str, object]
) -> None:
    """Give QEMU these capabilities and parameters again."""
    if parameters:
        await monitor.execute("migrate-set-parameters", parameters)
    for state in (False, True):
        if some := {name: to for name, to in capabilities.items() if to is state}:
            await set_capabilities(monitor, some)


async def reach(
    monitor: Monitor,
    events: Events,
    *statuses: str,
    each: Callable[[Migration], Awaitable[None]] | None = None,
    incoming: bool = False,
    at_word: bool = False,
) -> Migration:
    """Wait until the migration is in one of *statuses*; *each* is awaited with every look at it.

    An *incoming* one says `none` until its first byte came. *at_word*: what an event says is
    believed, since the guest stands still meanwhile and each look costs it half a millisecond.

    Woken by MIGRATION events, decided by query-migrate. Raises MigrationFailed with QEMU's words
    if it ends in another way.
    """
    while at_word:
        said = await woken(events, within=0.1)
        if said in statuses:
            return Migration(status=said)
        at_word = said in _ON_THE_WAY
    while True:
        now = await query(monitor)
        if each is not None:
            await each(now)
        if now.status in statuses:
            return now
        if not (incoming and now.status == "none"):
            now.refuse_over()
        await woken(events, within=0.1)


async def woken(events: Events, *, within: float) -> str:
    """The status that a MIGRATION event told within *within* seconds; empty if none came."""
    try:
        async with asyncio.timeout(within):
            return str((await events.next()).data.get("status", ""))
    except TimeoutError:
        return ""


async def call_off(monitor: Monitor) -> None:
    """Cancel what is under way and see it end; nothing to do if nothing is."""
    with monitor.listen("MIGRATION") as events:
        while not (now := await query(monitor)).over:
            with suppress(CommandRefused):
                if now.status != "cancelling":
                    await monitor.execute("migrate_cancel")
                else:
                    await monitor.execute("migrate-continue", WAKE)
            await woken(events, within=0.05)
