"""What every way of taking the execution state shares: the VM, its guard, and the pause."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from qmpsnap.errors import GuestLeftStopped, PauseTooLong
from qmpsnap.hypervisor.guest import runstate
from qmpsnap.hypervisor.guest.quiesce import Freezer
from qmpsnap.hypervisor.guest.watchdog import Watchdog
from qmpsnap.hypervisor.monitor import Event, Monitor, settle
from qmpsnap.hypervisor.vmstate import migration

Fix = Callable[[], Awaitable[None]]
"""Fixes the disks (the transaction): called once, at the instant whose RAM is saved."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_CALL_OFF_WITHIN = 30.0
MARGIN = 10.0  # seconds past which the watchdog takes the engine for hung


class RamMode(StrEnum):
    BACKGROUND = "background"
    LIVE = "live"
    PAUSED = "paused"
    NONE = "none"


@dataclass(slots=True)
class Pause:
    """STOP and RESUME by QEMU's own timestamps, in seconds since the epoch.

    *before*: seconds for which the guest was held before, to begin with. It counts.
    """

    stopped_at: float | None = None
    resumed_at: float | None = None
    before: float = 0.0

    @property
    def milliseconds(self) -> float:
        held = self.before
        if self.stopped_at is not None and self.resumed_at is not None:
            held += self.resumed_at - self.stopped_at
        return held * 1000

    def see(self, events: Iterable[Event]) -> None:
        """Of *events* the first STOP and the last RESUME are taken."""
        for event in events:
            if event.name == "RESUME":
                self.resumed_at = event.at
            elif self.stopped_at is None:
                self.stopped_at = event.at


@dataclass(slots=True)
class Session:
    """*running*: the guest ran before. *max_pause*: seconds, None for no bound.

    *freezer*: the guest shall be frozen at the instant; it is thawed as soon as it runs again.
    """

    monitor: Monitor
    watchdog: Watchdog
    running: bool
    max_pause: float | None
    progress: Progress | None = None
    freezer: Freezer | None = None
    pause: Pause = field(default_factory=Pause)

    @property
    def deadline(self) -> float:
        """Seconds after which the watchdog pays for a held guest."""
        return (self.max_pause or 0.0) + MARGIN

    async def thaw(self) -> None:
        """Pay the thaw, if one is owed. Raises GuestStillFrozen."""
        if self.freezer is not None and self.freezer.owed:
            await self.freezer.thaw()

    def show(self, now: migration.Migration) -> None:
        if self.progress is not None and now.ram.total:
            self.progress(now.ram.total - now.ram.remaining, now.ram.total)


@asynccontextmanager
async def timed(session: Session) -> AsyncIterator[Callable[[], None]]:
    """The first STOP and the last RESUME of the block are the session's pause.

    What it gives is called when a hold is over that was only the beginning.
    """
    with session.monitor.listen("STOP", "RESUME") as events:

        def begun() -> None:
            session.pause.see(events.pending())
            session.pause = Pause(before=session.pause.milliseconds / 1000)

        try:
            yield begun
        finally:
            session.pause.see(events.pending())


@asynccontextmanager
async def bounded(session: Session) -> AsyncIterator[None]:
    """The block, in which the guest is held, ends in PauseTooLong before max_pause is over."""
    try:
        # a tenth is kept back for the way from this deadline to the `cont`
        async with asyncio.timeout(None if session.max_pause is None else session.max_pause * 0.9):
            yield
    except TimeoutError as late:
        assert session.max_pause is not None
        raise PauseTooLong(
            f"the guest would have been held longer than {session.max_pause * 1000:g} ms"
        ) from late


async def give_back(monitor: Monitor) -> None:
    """Call off a migration of ours and let the guest run, over whatever connection there is.

    Raises GuestLeftStopped, QemuGone.
    """
    try:
        async with asyncio.timeout(_CALL_OFF_WITHIN):
            await settle(monitor, migration.call_off)
    except TimeoutError as late:
        await runstate.given_back(monitor)
        raise GuestLeftStopped(
            f"QEMU did not give its migration up within {_CALL_OFF_WITHIN:g} s"
        ) from late
    await runstate.given_back(monitor)
