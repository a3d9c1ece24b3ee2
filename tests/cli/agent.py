"""A guest agent that a test holds by the hand: it answers when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

_UNKNOWN = {"guest-get-osinfo", "guest-get-host-name", "guest-get-timezone"}
_UNKNOWN |= {"guest-get-fsinfo", "guest-network-get-interfaces"}


@dataclass(slots=True)
class Agent:
    """*freezing* and *thawing* are set once the command came; *may_freeze* and *may_thaw* let it
    answer. A *stubborn* one never thaws."""

    path: Path
    stubborn: bool = False
    frozen: bool = False
    commands: list[str] = field(default_factory=list)
    freezing: asyncio.Event = field(default_factory=asyncio.Event)
    thawing: asyncio.Event = field(default_factory=asyncio.Event)
    may_freeze: asyncio.Event = field(default_factory=asyncio.Event)
    may_thaw: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while line := (await reader.readline()).lstrip(b"\xff"):
                message = json.loads(line)
                if message["execute"] in _UNKNOWN:
                    reply: dict[str, object] = {"error": {"desc": "it has been disabled"}}
                else:
                    reply = {"return": await self._answer(message)}
                mark = b"\xff" if message["execute"] == "guest-sync-delimited" else b""
                writer.write(mark + json.dumps(reply).encode() + b"\n")
                await writer.drain()
        writer.close()

    async def _answer(self, message: dict[str, object]) -> object:
        command = str(message["execute"])
        if command == "guest-sync-delimited":
            arguments = message["arguments"]
            assert isinstance(arguments, dict)
            return arguments["id"]
        self.commands.append(command)
        match command:
            case "guest-fsfreeze-status":
                return "frozen" if self.frozen else "thawed"
            case "guest-fsfreeze-freeze":
                self.frozen = True
                self.freezing.set()
                await self.may_freeze.wait()
                return 1
            case "guest-fsfreeze-thaw":
                self.thawing.set()
                await self.may_thaw.wait()
                was, self.frozen = self.frozen, self.stubborn
                return int(was)
            case other:
                raise AssertionError(other)


@contextlib.asynccontextmanager
async def agent(path: Path, *, stubborn: bool = False) -> AsyncIterator[Agent]:
    held = Agent(path, stubborn)
    server = await asyncio.start_unix_server(held.serve, path)
    try:
        yield held
    finally:
        held.may_freeze.set()
        held.may_thaw.set()
        server.close()
