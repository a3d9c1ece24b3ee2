"""Thawing a guest by hand, when something left it frozen."""

from __future__ import annotations

from qmpsnap.engine.machine import Machine
from qmpsnap.errors import AgentError
from qmpsnap.hypervisor.guest import quiesce


async def thaw(machine: Machine) -> int | None:
    """Thaw until the agent says that nothing is frozen; gives how many file systems were.

    Raises AgentError without an agent socket, GuestStillFrozen.
    """
    if machine.agent is None:
        raise AgentError(f"no agent socket is known for the VM {machine.name}")
    freezer = quiesce.Freezer(machine.agent)
    await freezer.thaw()
    return freezer.state.thawed
