"""The only place that sets a guest's clock: that of a guest that was away for a while."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from qmpsnap.errors import AgentError
from qmpsnap.hypervisor import agent as door

_NEAR_NS = 2_000_000_000


async def to_now(path: Path, *, within: float = 3.0) -> str:
    """The guest has the host's time, by the agent behind *path*; empty, or why it has not.

    It takes at most *within* seconds.
    """
    try:
        async with asyncio.timeout(within), door.connect(path, within=within) as agent:
            try:
                arguments = {"time": time.time_ns()}
                await agent.execute("guest-set-time", arguments, within=within)
            except AgentError:
                # it sets the clock first, then fails where hwclock cannot set the machine's as well
                now = await agent.count("guest-get-time", within=within)
                if abs(now - time.time_ns()) > _NEAR_NS:
                    raise
    except AgentError as failed:
        return str(failed)
    except TimeoutError:
        return f"{path}: the guest agent did not set the clock within {within:g} s"
    return ""
