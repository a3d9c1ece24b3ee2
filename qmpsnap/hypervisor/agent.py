"""The door to the guest agent (qemu-ga): one client at a time, and every answer checked.

qemu.qmp does not fit here: the agent's resynchronisation sends the byte 0xFF, which is no JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from qmpsnap.errors import UNREADABLE, AgentError

_SENTINEL = b"\xff"
_LONGEST = 1 << 22


class Agent:
    """A session with one agent. After a timeout it must be synchronised again: do reconnect."""

    def __init__(
        self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.path, self._reader, self._writer = path, reader, writer
        self._ids = itertools.count(os.getpid() << 16)

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, within: float = 5.0
    ) -> Any:
        """Run one agent command and give its `return`.

        Raises AgentError with the agent's words, or when it does not answer within *within*
        seconds; the command may still be carried out later.
        """
        message = {"execute": command, "arguments": dict(arguments or {})}
        try:
            async with asyncio.timeout(within):
                self._writer.write(json.dumps(message).encode() + b"\n")
                await self._writer.drain()
                reply = await self._line()
        except TimeoutError as silent:
            raise AgentError(f"{command}: no answer within {within:g} s") from silent
        except OSError as gone:
            raise AgentError(f"{command}: {gone}") from gone
        if (error := reply.get("error")) is not None:
            told = error.get("desc", error) if isinstance(error, dict) else error
            raise AgentError(f"{command}: {told}")
        return reply.get("return")

    async def count(self, command: str, *, within: float = 5.0) -> int:
        """As `execute`, for a command that answers with a number."""
        number = await self.execute(command, within=within)
        if not isinstance(number, int):
            raise AgentError(f"{command}: not a number: {str(number)[:60]!r}")
        return number

    async def synchronise(self, *, within: float = 3.0) -> None:
        """Throw away what earlier clients left unread, until the agent echoes our number.

        guest-sync-delimited: 0xFF makes the agent's parser forget half a command, and marks the
        place in its answers (qga/qapi-schema.json). Raises AgentError.
        """
        number = next(self._ids)
        ask = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        try:
            async with asyncio.timeout(within):
                self._writer.write(_SENTINEL + json.dumps(ask).encode() + b"\n")
                await self._writer.drain()
                while True:
                    await self._reader.readuntil(_SENTINEL)
                    if (await self._line()).get("return") == number:
                        return
        except TimeoutError as silent:
            raise AgentError(f"{self.path}: the guest agent does not answer") from silent
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as gone:
            raise AgentError(f"{self.path}: {gone}") from gone

    async def _line(self) -> dict[str, Any]:
        try:
            line = (await self._reader.readline()).lstrip(_SENTINEL)
        except ValueError as endless:
            raise AgentError(f"{self.path}: the agent's answer has no end") from endless
        if not line:
            raise AgentError(f"{self.path}: QEMU closed the agent's socket")
        try:
            reply = json.loads(line)
        except UNREADABLE as garbage:  # it is the guest's: it may be anything
            raise AgentError(f"{self.path}: not an agent's answer: {line[:60]!r}") from garbage
        if not isinstance(reply, dict):
            raise AgentError(f"{self.path}: not an agent's answer: {line[:60]!r}")
        return reply


@asynccontextmanager
async def connect(
    path: Path, *, within: float = 3.0, told: Callable[[int], None] | None = None
) -> AsyncIterator[Agent]:
    """A synchronised session with the agent behind the unix socket *path*.

    *told* gets the descriptor before it is connected: who hangs from there on keeps everybody else
    from the agent. Raises AgentError.
    """
    wire = socket.socket(socket.AF_UNIX)
    wire.setblocking(False)
    writer: asyncio.StreamWriter | None = None
    try:
        if told is not None:
            told(wire.fileno())
        try:
            async with asyncio.timeout(within):
                await asyncio.get_running_loop().sock_connect(wire, str(path))
                reader, writer = await asyncio.open_unix_connection(sock=wire, limit=_LONGEST)
        except (OSError, TimeoutError) as absent:
            raise AgentError(f"{path}: {absent or 'busy'}") from absent
        agent = Agent(path, reader, writer)
        await agent.synchronise(within=within)
        yield agent
    finally:
        with suppress(OSError):  # whoever was told holds it too: closed alone it would go on
            wire.shutdown(socket.SHUT_RDWR)
        await _closed(wire, writer)


async def _closed(wire: socket.socket, writer: asyncio.StreamWriter | None) -> None:
    if writer is None:
        wire.close()
        return
    # what is not sent yet goes to nobody who would read it; a failed write is not told later
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()
