"""The guest's run state: stopped for a block of code, and seen running again after it."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from enum import StrEnum
from functools import partial

import msgspec

from qmpsnap.errors import Blocked, CommandRefused, GuestLeftStopped, QemuGone, SnapError
from qmpsnap.hypervisor.guest.watchdog import Debt
from qmpsnap.hypervisor.monitor import Monitor, settle
from qmpsnap.shield import finish

log = logging.getLogger(__name__)


class RunState(StrEnum):
    """QEMU's RunState (qapi/run-state.json), as far as we act on it."""

    RUNNING = "running"
    PAUSED = "paused"
    POSTMIGRATE = "postmigrate"
    FINISH_MIGRATE = "finish-migrate"
    INMIGRATE = "inmigrate"
    PRELAUNCH = "prelaunch"
    IO_ERROR = "io-error"
    OTHER = "other"

    @classmethod
    def _missing_(cls, value: object) -> RunState:
        return cls.OTHER


class _Status(msgspec.Struct, frozen=True):
    status: str = ""


# where `cont` is the way back to a guest that ran before we came
_CONTINUABLE = {RunState.PAUSED, RunState.POSTMIGRATE, RunState.FINISH_MIGRATE}
# migration states in which QEMU itself lets the guest run once it is told to cancel
_HOLDING = {"pre-switchover", "device"}
_LOOK_AGAIN = 0.001  # seconds
_AT_ONCE = 3  # refusals after which it is worth the time to ask for the reason


async def query(monitor: Monitor) -> RunState:
    return RunState((await monitor.query("query-status", _Status)).status)


async def is_held(monitor: Monitor) -> bool:
    """Whether the guest is in a state that a capture leaves behind, and that `cont` ends."""
    return await query(monitor) in _CONTINUABLE


async def retry_io(monitor: Monitor) -> bool:
    """Let a guest that QEMU stopped at a write that failed try it again; whether there was one.

    Where the write fails again, QEMU stops the guest again. Raises CommandRefused, MonitorLost.
    """
    if await query(monitor) is not RunState.IO_ERROR:
        return False
    await monitor.execute("cont")
    return True


@asynccontextmanager
async def io_retried(monitor: Monitor) -> AsyncIterator[None]:
    """A guest that runs before the block does so after it, as far as `retry_io` can help.

    For what takes room where the guest's writes want some, too. Raises MonitorLost.
    """
    running = await query(monitor) is RunState.RUNNING
    try:
        yield
    finally:
        with suppress(SnapError):
            if running and await retry_io(monitor):
                log.warning("QEMU had stopped the guest: a write of its own had failed meanwhile")


class Hold:
    """The debt of a stopped guest: `release` pays it, and only then is it paid."""

    def __init__(self, monitor: Monitor, debt: Debt | None) -> None:
        self.monitor, self._debt, self.released = monitor, debt, False

    async def release(self, by: Callable[[Monitor], Awaitable[None]] | None = None) -> None:
        """Let the guest run and see that it does; *by* does so in another way than `cont`.

        Raises GuestLeftStopped if it will not.
        """
        await (by or given_back)(self.monitor)
        self.released = True
        if self._debt is not None:
            self._debt.settled = True


@asynccontextmanager
async def stopped(
    monitor: Monitor, debt: Debt | None = None, *, within: float = 30
) -> AsyncIterator[Hold]:
    """The guest is stopped for the block, and runs again however the block ends.

    *debt* is the watchdog's, if it knows, and settled as soon as the guest is seen running.

    The body may `release` it early. Raises Blocked when QEMU's state after `stop` is not exactly
    `paused` (an I/O error, a panic: there the RAM must not be saved), GuestLeftStopped when
    within *within* seconds it could not be made to run, over this connection or a new one,
    QemuGone when there is no guest any more.
    """
    hold = Hold(monitor, debt)
    try:
        await monitor.execute("stop")  # from the moment this is sent, a cont is owed
        state = await query(monitor)
        if state is not RunState.PAUSED:
            raise Blocked(f"after `stop` the guest is {state}, not paused")
        yield hold
    finally:
        if not hold.released:
            await finish(_released(hold), within=within)


async def _released(hold: Hold) -> None:
    try:
        await hold.release()
    except (GuestLeftStopped, QemuGone):
        raise
    except (SnapError, TimeoutError) as failed:
        raise GuestLeftStopped(f"the guest could not be continued: {failed}") from failed


async def let_run(monitor: Monitor, *, within: float = 20) -> None:
    """`cont` until the guest is seen running, over a fresh connection if ours is gone.

    Raises GuestLeftStopped (QEMU refuses, or is in a state that `cont` does not leave), QemuGone.
    """
    await _let_be(monitor, {RunState.RUNNING}, within)


async def given_back(monitor: Monitor) -> None:
    """As `let_run`, to a guest that we held, and that ran before.

    That QEMU stops it again at a write that fails is no debt of a hold: `retry_io` is for that.
    """
    await _let_be(monitor, {RunState.RUNNING, RunState.IO_ERROR}, within=20)


async def _let_be(monitor: Monitor, wanted: set[RunState], within: float) -> None:
    try:
        async with asyncio.timeout(within):
            await settle(monitor, partial(_continue, wanted=wanted))
    except TimeoutError as late:
        raise GuestLeftStopped(f"not running again after {within:g} s") from late


async def _continue(monitor: Monitor, *, wanted: set[RunState]) -> None:
    refusal = ""
    with monitor.listen("RESUME", "MIGRATION") as events:
        for turn in itertools.count():
            try:
                # the reply comes after vm_start(): cheaper than asking for the state first
                await monitor.execute("cont")
            except CommandRefused as refused:
                # "Migration is not finalized yet": `completed` is said a moment too early
                refusal = str(refused)
                if turn < _AT_ONCE:
                    continue
                await _unhold(monitor)
            state = await query(monitor)
            if state in wanted:
                return
            if state not in _CONTINUABLE:
                raise GuestLeftStopped(f"the guest is {state}; {refusal}")
            # the guest waits, and not every change of state has an event: look again soon
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN):
                    await events.next()


async def _unhold(monitor: Monitor) -> None:
    now = await monitor.query("query-migrate", _Status)
    with suppress(CommandRefused):
        if now.status in _HOLDING:
            await monitor.execute("migrate_cancel")
