"""Guest file systems frozen for a block of code, by the guest's own agent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.errors import AgentError, Blocked, FreezeTooLong, GuestStillFrozen
from qmpsnap.hypervisor import agent as door
from qmpsnap.hypervisor.guest.watchdog import Debt, Watchdog
from qmpsnap.shield import finish

MAX_FREEZE = 30.0  # seconds that a guest may be frozen, unless somebody says otherwise
_MARGIN = 10.0  # seconds past which the watchdog takes the engine for hung


@dataclass(slots=True)
class Frozen:
    """How a freeze went: file systems frozen and thawed, and for how many milliseconds."""

    count: int = 0
    thawed: int | None = None
    milliseconds: float = 0.0
    since: float = 0.0

    @property
    def held(self) -> bool:
        """Whether nobody else thawed the guest meanwhile: only then is it consistent."""
        return self.count > 0 and self.thawed == self.count


class Freezer:
    """Freeze and thaw of one guest; a thaw is owed from the moment that freeze is sent.

    It may be frozen for *longest* seconds, which `thawed_after` sees to, and the *watchdog* a while
    later. An answer of the agent may take *within* seconds.
    """

    def __init__(
        self,
        path: Path,
        watchdog: Watchdog | None = None,
        *,
        longest: float = MAX_FREEZE,
        within: float = 10.0,
    ) -> None:
        self._path, self._watchdog, self._within = path, watchdog, within
        self.longest = longest
        self.timer: asyncio.Timeout | None = None
        self._debts = AsyncExitStack()
        self._debt: Debt | None = None
        self.state = Frozen()
        self.owed = False

    async def freeze(self) -> None:
        """Freeze all file systems. Raises AgentError, or Blocked if somebody else froze them."""
        async with self._session() as agent:
            if await agent.execute("guest-fsfreeze-status") != "thawed":
                raise Blocked("the guest is frozen already, by somebody else")
            if self._watchdog is not None:
                owing = self._watchdog.owing("thaw", within=self.longest + _MARGIN)
                self._debt = await self._debts.enter_async_context(owing)
            self.owed, self.state.since = True, time.monotonic()
            # a tenth is kept back for the way from there to the thaw
            self._ends(asyncio.get_running_loop().time() + self.longest * 0.9)
            self.state.count = await agent.count("guest-fsfreeze-freeze", within=self._within)
        if self.state.count == 0:
            raise AgentError("the guest agent found no file system that it could freeze")

    async def thaw(self) -> None:
        """Thaw, over fresh connections, until the agent says that nothing is frozen.

        Raises GuestStillFrozen when it cannot be had.
        """
        trouble: AgentError | None = None
        for _ in range(3):
            try:
                async with self._session() as agent:
                    thawed = await agent.count("guest-fsfreeze-thaw", within=self._within)
                    if self.state.thawed is None:
                        self.state.thawed = thawed
                        self.state.milliseconds = (time.monotonic() - self.state.since) * 1000
                    if await agent.execute("guest-fsfreeze-status") == "thawed":
                        return await self._settled()
            except AgentError as failed:
                trouble = failed
        raise GuestStillFrozen(f"the guest could not be thawed: {trouble}") from trouble

    def _session(self) -> AbstractAsyncContextManager[door.Agent]:
        told = self._watchdog.may_cut if self._watchdog is not None else None
        return door.connect(self._path, told=told)

    async def _settled(self) -> None:
        self.owed = False
        self._ends(None)
        if self._debt is not None:
            self._debt.settled = True
        await self._debts.aclose()

    def _ends(self, at: float | None) -> None:
        if self.timer is not None and not self.timer.expired():
            self.timer.reschedule(at)


@asynccontextmanager
async def thawed_after(freezer: Freezer) -> AsyncIterator[Freezer]:
    """Whatever the block froze is thawed when it ends, cancelled or not.

    Raises FreezeTooLong when it ends because the guest may not be frozen any longer.
    """
    freezer.timer = timer = asyncio.timeout(None)
    try:
        async with timer:
            yield freezer
    except TimeoutError as late:
        if not timer.expired():
            raise
        raise FreezeTooLong(
            f"the guest would have been frozen longer than {freezer.longest:g} s"
        ) from late
    finally:
        freezer.timer = None
        if freezer.owed:
            await finish(freezer.thaw(), within=60)


async def is_answering(path: Path) -> str:
    """Empty if an agent answers behind *path*, else why not."""
    try:
        async with door.connect(path, within=2.0):
            return ""
    except AgentError as absent:
        return str(absent)
