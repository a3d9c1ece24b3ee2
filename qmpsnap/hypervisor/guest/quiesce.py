"""Guest file systems frozen for a block of code, by the guest's own agent."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.errors import AgentError, Blocked, GuestStillFrozen
from qmpsnap.hypervisor import agent as door
from qmpsnap.shield import finish


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
    """Freeze and thaw of one guest; a thaw is owed from the moment that freeze is sent."""

    def __init__(self, path: Path, *, within: float = 10.0) -> None:
        self._path, self._within = path, within
        self.state = Frozen()
        self.owed = False

    async def freeze(self) -> None:
        """Freeze all file systems. Raises AgentError, or Blocked if somebody else froze them."""
        async with door.connect(self._path) as agent:
            if await agent.execute("guest-fsfreeze-status") != "thawed":
                raise Blocked("the guest is frozen already, by somebody else")
            self.owed, self.state.since = True, time.monotonic()
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
                async with door.connect(self._path) as agent:
                    thawed = await agent.count("guest-fsfreeze-thaw", within=self._within)
                    if self.state.thawed is None:
                        self.state.thawed = thawed
                    if await agent.execute("guest-fsfreeze-status") == "thawed":
                        self.state.milliseconds = (time.monotonic() - self.state.since) * 1000
                        self.owed = False
                        return
            except AgentError as failed:
                trouble = failed
        raise GuestStillFrozen(f"the guest could not be thawed: {trouble}") from trouble


@asynccontextmanager
async def thawed_after(freezer: Freezer) -> AsyncIterator[Freezer]:
    """Whatever the block froze is thawed when it ends, cancelled or not."""
    try:
        yield freezer
    finally:
        if freezer.owed:
            await finish(freezer.thaw(), within=60)


async def is_answering(path: Path) -> str:
    """Empty if an agent answers behind *path*, else why not."""
    try:
        async with door.connect(path, within=2.0):
            return ""
    except AgentError as absent:
        return str(absent)
