"""Thawing a guest by hand, when something left it frozen."""

from __future__ import annotations

import asyncio
from pathlib import Path

from qmpsnap.engine.machine import Machine
from qmpsnap.errors import AgentError, SnapError
from qmpsnap.host import process
from qmpsnap.hypervisor.guest import quiesce
from qmpsnap.hypervisor.machine import attach


async def thaw(machine: Machine) -> int | None:
    """Thaw until the agent says that nothing is frozen; gives how many file systems were.

    Raises AgentError without an agent socket, GuestStillFrozen.
    """
    agent = machine.agent or await asyncio.to_thread(_on_command_line, machine)
    if agent is None:
        raise AgentError(
            f"no agent socket is known for the VM {machine.name}", hint="give --agent-socket"
        )
    freezer = quiesce.Freezer(agent)
    await freezer.thaw()
    return freezer.state.thawed


def _on_command_line(machine: Machine) -> Path | None:
    """The agent's socket as the running QEMU was told; its monitor need not answer for that."""
    if machine.qmp is None:
        return None
    try:
        owner = process.find_owner(machine.qmp)
        facts = process.describe(owner) if owner is not None else None
        if facts is None or not facts.argv or facts.cwd is None:
            return None
        return attach.facts(facts.argv, Path(facts.cwd)).agent
    except SnapError:
        return None
