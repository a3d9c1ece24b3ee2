"""The only place that changes the MAC addresses of a running guest, by a command of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmpsnap.errors import AgentError
from qmpsnap.hypervisor import agent as door

_PAUSE = 0.02  # seconds between two questions whether the command has ended


@dataclass(slots=True)
class Addresses:
    """*changed*: the interfaces with a new address, by name; *kept*: why one has its old one."""

    changed: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


async def renew(path: Path, macs: Mapping[str, str], *, within: float = 5.0) -> Addresses:
    """Each interface with an address of *macs* has the one that it stands for.

    The guest's kernel tells the card; no interface goes down for it, and one that cannot change
    while it is up keeps what it has. It takes at most *within* seconds.
    """
    done = Addresses()
    left = dict(macs)
    try:
        async with asyncio.timeout(within), door.connect(path, within=within) as agent:
            await _refuse_silence(agent, within)
            for name, old in _interfaces(
                await agent.execute("guest-network-get-interfaces", within=within)
            ):
                if (new := left.get(old)) is None:
                    continue
                words = ["link", "set", "dev", name, "address", new]
                if trouble := await _ran(agent, "ip", words, within):
                    done.kept.append(f"{name} keeps the MAC address {old}: {trouble}")
                else:
                    done.changed[name] = new
                del left[old]
    except AgentError as failed:
        why = str(failed)
    except TimeoutError:
        why = f"the guest agent took longer than {within:g} s"
    else:
        why = "the guest has no interface with it"
    done.kept += [f"MAC address {old} is kept: {why}" for old in left]
    return done


async def _refuse_silence(agent: door.Agent, within: float) -> None:
    """Raises AgentError where an administrator has switched the commands off."""
    told = await agent.execute("guest-info", within=within)
    commands = told.get("supported_commands") if isinstance(told, dict) else None
    for one in commands if isinstance(commands, list) else []:
        if isinstance(one, dict) and one.get("name") == "guest-exec" and one.get("enabled"):
            return
    raise AgentError("the guest agent runs no commands (guest-exec is off)")


def _interfaces(told: Any) -> list[tuple[str, str]]:
    """Name and address of each. What the agent says is the guest's: it may be anything."""
    found = []
    for one in told if isinstance(told, list) else []:
        if not isinstance(one, dict):
            continue
        name, mac = one.get("name"), one.get("hardware-address")
        if isinstance(name, str) and isinstance(mac, str):
            found.append((name, mac.lower()))
    return found


async def _ran(agent: door.Agent, command: str, words: list[str], within: float) -> str:
    """Empty when the command has ended well. Raises AgentError."""
    arguments = {"path": command, "arg": words}
    started = await agent.execute("guest-exec", arguments, within=within)
    pid = started.get("pid") if isinstance(started, dict) else None
    while True:
        status = await agent.execute("guest-exec-status", {"pid": pid}, within=within)
        if not isinstance(status, dict):
            raise AgentError("guest-exec-status: not an object")
        if status.get("exited"):
            break
        await asyncio.sleep(_PAUSE)
    code = status.get("exitcode")
    return "" if code == 0 else f"`{command}` ended with {code}"
