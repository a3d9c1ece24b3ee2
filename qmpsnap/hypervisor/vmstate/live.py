"""Execution state taken live: passes over the RAM while the guest runs, held for the last one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from qmpsnap.errors import MigrationFailed
from qmpsnap.hypervisor.guest import runstate
from qmpsnap.hypervisor.guest.quiesce import Freezer
from qmpsnap.hypervisor.guest.watchdog import Debt
from qmpsnap.hypervisor.monitor import Events
from qmpsnap.hypervisor.vmstate import migration
from qmpsnap.hypervisor.vmstate.convergence import Convergence, Verdict
from qmpsnap.hypervisor.vmstate.session import Fix, Session, bounded, give_back, timed
from qmpsnap.hypervisor.vmstate.target import Target
from qmpsnap.shield import finish

_EARLY = 256 << 20  # bytes a second before the freeze, so that its moment is not missed
_CRAWL = 64 << 10  # bytes a second while the guest is being frozen


class DoesNotConverge(MigrationFailed):
    """The guest dirties its RAM faster than it can be saved; it was let alone again."""

    hint = "`--ram background` does not depend on it; a longer --max-pause may help"


class HeldTooEarly(MigrationFailed):
    """The switchover came before the freeze; the guest was let go."""


@dataclass(frozen=True, slots=True)
class Aim:
    """*pause*: seconds that the guest shall be held at most. *budget*: seconds that the passes
    after the first may take. *stretch*: when they do not suffice, double the pause, up to the
    session's max_pause, instead of giving up. *one_pass*: there may be no pass after the first
    (`Tracking.ONE_PASS`); what the guest dirties during it is saved while it is held."""

    pause: float
    budget: float
    stretch: bool
    one_pass: bool


async def live(session: Session, target: Target, fix: Fix, aim: Aim) -> None:
    """Save the RAM of the running guest; at the switchover it is held and *fix* is called.

    A guest that shall be frozen and is not yet is frozen as near to the hold as can be. Raises
    HeldTooEarly when that came too late, DoesNotConverge, PauseTooLong, MigrationFailed; the
    guest runs on then.
    """
    monitor = session.monitor
    freezer = session.freezer if session.freezer and not session.freezer.owed else None
    start: dict[str, object] = {"downtime-limit": round(aim.pause * 1000)}
    if aim.one_pass:
        start = {"downtime-limit": 0, "max-bandwidth": _CRAWL}
    elif freezer is not None:
        start = {"downtime-limit": 0, "max-bandwidth": _EARLY}
    async with (
        timed(session) as begun,
        migration.tuned(monitor, {"pause-before-switchover"}, start),
        session.watchdog.owing("cont", "cancel", within=session.deadline) as owed,
    ):
        try:
            with monitor.listen("MIGRATION") as events:
                passes = _Passes(session, events, owed, aim)
                # from here on QEMU may stop the guest at any moment
                if aim.one_pass:
                    await _begun_held(session, target, events)
                    begun()
                    await passes.go_on(_EARLY if freezer is not None else migration.UNLIMITED)
                else:
                    await monitor.execute("migrate", {"uri": target.uri})
                if freezer is not None:
                    await passes.until_short()
                    await passes.until_frozen(freezer)
                    await passes.go_on()
                await passes.until_held()
                async with bounded(session):
                    await fix()
                    await monitor.execute("migrate-continue", {"state": "pre-switchover"})
                    await migration.reach(monitor, events, "completed", at_word=True)
        except BaseException:
            await finish(_settled(owed, give_back(monitor)), within=60)
            raise
        await finish(_settled(owed, runstate.given_back(monitor)), within=30)
        await session.thaw()


async def _begun_held(session: Session, target: Target, events: Events) -> None:
    """Begin with the guest held until QEMU tracks its writes, and its TLB is empty.

    Raises PauseTooLong, MigrationFailed.
    """
    monitor = session.monitor
    async with bounded(session), runstate.stopped(monitor) as hold:
        await monitor.execute("migrate", {"uri": target.uri})
        # its rate is a crawl; should the pass be over all the same, to let it run is to call it off
        await migration.reach(monitor, events, "active", "pre-switchover")
        await hold.release()


async def _settled(owed: Debt, payment: Coroutine[Any, Any, None]) -> None:
    await payment
    owed.settled = True


class _Passes:
    """The time from `migrate` to `pre-switchover`."""

    def __init__(self, session: Session, events: Events, owed: Debt, aim: Aim) -> None:
        self._session, self._events, self._owed, self._aim = session, events, owed, aim
        self._start = time.monotonic()
        self._outlook = Convergence(aim.budget)
        self._pause = aim.pause

    async def until_short(self) -> None:
        """Until little is left, the first pass not yet over; then QEMU is slowed to a crawl.

        A tiny downtime-limit alone does not hold the switchover back: an idle guest has nothing
        left at the end of a pass, and is switched over at once.
        """
        while (now := await self._look()).status != "pre-switchover":
            # QEMU spends its rate in windows of 100 ms: two of them must be left
            short = 0 < now.ram.remaining < _EARLY // 5 and now.ram.transferred > 0
            if short or now.ram.dirty_sync_count >= 2:
                return await self._tune({"max-bandwidth": _CRAWL})
            await migration.woken(self._events, within=0.02)
        raise HeldTooEarly("the guest was held before it could be frozen")

    async def until_frozen(self, freezer: Freezer) -> None:
        """Freeze the guest. Raises HeldTooEarly if QEMU holds it before the agent has answered:

        a held guest's agent is deaf, so it is let go, and found frozen then.
        """
        freezing = asyncio.ensure_future(freezer.freeze())
        try:
            while not freezing.done():
                if (await self._look()).status == "pre-switchover":
                    await give_back(self._session.monitor)
                    await freezing
                    raise HeldTooEarly("the guest was held while it was being frozen")
                await asyncio.wait([freezing], timeout=0.02)
            await freezing
        finally:
            freezing.cancel()

    async def until_held(self) -> None:
        """Until QEMU holds the guest before the last pass. Raises DoesNotConverge."""
        if self._aim.one_pass:
            return await self._until_held_at_once()
        while (now := await self._look()).status != "pre-switchover":
            if self._stuck(now):
                await self._stretch(now)
            # the guest stands still by then, and `migrate-continue` would refuse a false alarm
            if await migration.woken(self._events, within=0.1) == "pre-switchover":
                return

    async def _until_held_at_once(self) -> None:
        """Until QEMU holds the guest after one pass. Raises MigrationFailed if it made more."""
        while (now := await self._look()).status != "pre-switchover":
            await migration.woken(self._events, within=0.1)
        if now.ram.dirty_sync_count > 1:
            raise MigrationFailed("QEMU went over the RAM once more, where it loses writes")

    async def go_on(self, rate: int = migration.UNLIMITED) -> None:
        """Full speed to the end, or *rate* bytes a second, and a last pass as long as is wanted."""
        limit = 0 if self._aim.one_pass else round(self._aim.pause * 1000)
        await self._tune({"max-bandwidth": rate, "downtime-limit": limit})

    async def _tune(self, parameters: dict[str, object]) -> None:
        await self._session.monitor.execute("migrate-set-parameters", parameters)

    async def _look(self) -> migration.Migration:
        now = await migration.query(self._session.monitor)
        now.refuse_over()
        self._session.show(now)
        await self._owed.renew()
        return now

    def _stuck(self, now: migration.Migration) -> bool:
        return self._outlook.judge(now.ram, time.monotonic() - self._start) is Verdict.STUCK

    async def _stretch(self, now: migration.Migration) -> None:
        self._pause *= 2
        bound = self._session.max_pause
        if not self._aim.stretch or (bound is not None and self._pause > bound * 0.7):
            dirtied = now.ram.dirty_pages_rate * now.ram.page_size >> 20
            raise DoesNotConverge(
                f"after {now.ram.dirty_sync_count} passes {now.ram.remaining >> 20} MiB of RAM "
                f"remain; the guest dirties {dirtied} MiB/s"
            )
        await self._tune({"downtime-limit": round(self._pause * 1000)})
        self._start = time.monotonic()
        self._outlook = Convergence(self._aim.budget / 2, first_pass=0.0)
