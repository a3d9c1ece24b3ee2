"""What comes in over a wire: from a monitor, an agent, a worker, a feeder, a loading QEMU."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from qmpsnap.engine import feeder, feedertalk, orders
from qmpsnap.errors import SnapError
from qmpsnap.hypervisor import agent, monitor
from qmpsnap.hypervisor.guest import addresses, quiesce, system
from qmpsnap.hypervisor.machine import spare
from qmpsnap.hypervisor.vmstate import returnpath, stream
from qmpsnap.store import talk, wire, worker
from tests.fuzz import mutation, samples
from tests.fuzz.surface import Surface
from tests.fuzz.surfaces.replies import driven
from tests.rig.stream import small

_HERE = b"@ID@"
_GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"},'
    b' "capabilities": ["oob"]}}\r\n'
)
_DONE = b'{"return": {}, "id": "@ID@"}\r\n'
_STATUS = (
    b'{"return": {"status": "running", "singlestep": false, "running": true}, "id": "@ID@"}\r\n'
)
_EVENT = (
    b'{"timestamp": {"seconds": 1700000000, "microseconds": 5}, "event": "STOP",'
    b' "data": {"guest": true}}\r\n'
)
_NO = b'{"id": "@ID@", "error": {"class": "GenericError", "desc": "no"}}\r\n'
_STRANGE = b'{"return": {}, "id": "somebody-else"}\r\n'
Script = list[bytes]
"""What is said at once, and then after each question, in which `@ID@` is the question's own."""


def _spoil(dice: Random, seed: Script) -> Script:
    """One or two parts are odd, gone, told twice, or at another place."""
    parts = list(seed)
    for _ in range(dice.choice((1, 1, 2))):
        at = dice.randrange(len(parts))
        match dice.randrange(8):
            case 0:
                parts[at] = parts[at] * dice.choice((2, 3))
            case 1:
                parts[at], parts[-1] = parts[-1], parts[at]
            case 2:
                parts[at] = dice.choice(parts) + parts[at]
            case 3:
                parts[at] = (
                    dice.choice((_EVENT, _STRANGE, _NO, b"\n", b"[]\n", b"{}\n")) + parts[at]
                )
            case _:
                parts[at] = mutation.content(dice, parts[at], json_too=True) + b"\n"
    return parts


async def _scripted(given: Script, path: Path, ask: Callable[[Path], Awaitable[object]]) -> object:
    """*ask* of somebody who listens at *path* and says what *given* has, then hangs up."""
    left = list(given)
    serving: dict[asyncio.Task[None] | None, asyncio.StreamWriter] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving[asyncio.current_task()] = writer
        with suppress(OSError, ValueError, asyncio.IncompleteReadError):
            if left:
                writer.write(left.pop(0).replace(_HERE, b"1"))
            while left and (asked := await reader.read(4096)):
                begin = asked.find(b"{")
                with suppress(ValueError, TypeError, RecursionError):
                    said = json.loads(asked[begin:]) if begin >= 0 else {}
                    id = said.get("id", said.get("arguments", {}).get("id", ""))
                    writer.write(left.pop(0).replace(_HERE, str(id).encode()))
                    await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(serve, path):
        try:
            return await ask(path)
        finally:  # nobody goes on with it under the next input
            for writer in serving.values():
                writer.transport.abort()
            await asyncio.gather(*filter(None, serving), return_exceptions=True)


def _script(
    name: str, seeds: Sequence[Script], ask: Callable[[Path], Awaitable[object]]
) -> Surface:
    def tried(given: Script, scratch: Path) -> object:
        (scratch / "sock").unlink(missing_ok=True)
        return driven(_whole(given, scratch / "sock", ask))

    return Surface(name, lambda: seeds, tried, _spoil, slow=True)


async def _whole(given: Script, path: Path, ask: Callable[[Path], Awaitable[object]]) -> object:
    return await _scripted(given, path, ask)


async def _monitored(path: Path) -> object:
    async with monitor.connect(path, within=0.05) as session:
        with session.listen("STOP") as events, suppress(TimeoutError):
            async with asyncio.timeout(0.05):  # an answer to nobody's question is none
                first = await session.query("query-status", dict[str, Any])
                with suppress(SnapError):
                    await session.execute("stop")
                await events.next()
                return first, events.pending(), await session.execute("cont")
    return None


_SYNC = b'\xff{"return": @ID@}\n'


def _agent(*answers: Any) -> Script:
    return [b"", _SYNC, *(json.dumps({"return": one}).encode() + b"\n" for one in answers)]


async def _asked(path: Path) -> object:
    missing: list[str] = []
    return msgspec.json.encode(await system.ask(path, missing, within=0.05)), missing


async def _renewed(path: Path) -> object:
    return await addresses.renew(path, {"52:54:00:00:00:01": "52:54:00:00:00:02"}, within=0.05)


async def _frozen(path: Path) -> object:
    freezer = quiesce.Freezer(path, within=0.05)
    await freezer.freeze()
    return freezer.state.held


_TOLD = _agent(
    {"id": "debian", "pretty-name": "Debian"}, {"host-name": "web"},
    {"offset": 3600, "zone": "CET"},
    [{"name": "eth0", "hardware-address": "52:54:00:00:00:01",
      "ip-addresses": [{"ip-address": "10.0.2.15", "prefix": 24}]}],
    [{"name": "vda1", "mountpoint": "/", "type": "ext4", "used-bytes": 1, "total-bytes": 2}],
)  # fmt: skip
_RENEW = _agent(
    {"supported_commands": [{"name": "guest-exec", "enabled": True}]},
    [{"name": "eth0", "hardware-address": "52:54:00:00:00:01"}], {"pid": 5},
    {"exited": True, "exitcode": 0},
)  # fmt: skip


async def _fed(given: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=1 << 16)
    reader.feed_data(given)
    reader.feed_eof()
    return reader


class _Nobody:
    """Takes what is written."""

    def write(self, _data: bytes) -> None:
        pass

    async def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


async def _agent_lines(given: bytes) -> object:
    reader = await _fed(given.replace(_HERE, str(os.getpid() << 16).encode()))
    session = agent.Agent(Path("/run/qga.sock"), reader, _Nobody())  # type: ignore[arg-type]
    await session.synchronise()
    with suppress(SnapError):
        await session.execute("guest-info")
    return await session.count("guest-fsfreeze-freeze")


async def _spare(given: bytes) -> object:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        with suppress(BlockingIOError):
            theirs.sendall(given.replace(_HERE, f"{os.getpid()}-1".encode()))
        theirs.shutdown(socket.SHUT_WR)
        session = spare.Session(ours)
        await session.greeted()
        return await session.ask("query-migrate")


async def _feeder_says(given: bytes) -> object:
    reader = await _fed(given)
    speaker = feedertalk.Talk(Path("/nowhere.log"), reader, _Nobody())  # type: ignore[arg-type]
    return await speaker.until("done", lambda *_: None)


async def _worker_says(given: bytes) -> object:
    lines = talk._Lines()
    for at in range(0, len(given), 97):
        lines.pipe_data_received(1, given[at : at + 97])
    lines.connection_lost(None)
    speaker = talk.Talk(["worker"], "/store", 1.0)
    try:
        answer = await speaker._answer(lines, lambda *_: None)
    except wire.Told as told:
        raise told.error from None
    return talk.understood(answer, wire.Shipped)


async def _returned(given: bytes) -> object:
    path = returnpath.ReturnPath(await _fed(given), {"pc.ram": 64 * 4096, "vga.vram": 4096})
    found = []
    with suppress(EOFError):
        while True:
            found.append(await path.next())
    return found


def _back() -> list[bytes]:
    def message(kind: int, body: bytes) -> bytes:
        return kind.to_bytes(2, "big") + len(body).to_bytes(2, "big") + body

    place = (4096).to_bytes(8, "big") + (4096).to_bytes(4, "big")
    bitmap = message(5, b"\6pc.ram") + (8).to_bytes(8, "big") + bytes(8)
    bitmap += 0x0123456789ABCDEF.to_bytes(8, "big")
    return [
        message(2, bytes(4)) + message(4, place + b"\6pc.ram") + message(3, place) + bitmap,
        message(4, place + b"\6pc.ram") + message(6, b"") + message(1, bytes(4)),
    ]


def _read(ask: Callable[[bytes], Awaitable[object]]) -> Callable[[bytes, Path], object]:
    async def whole(given: bytes) -> object:
        return await ask(given)

    return lambda given, _scratch: driven(whole(given))


def _streamed(given: bytes, scratch: Path) -> object:
    (scratch / "stream").write_bytes(given)
    with (scratch / "stream").open("rb") as file:
        return stream.examine(file.fileno(), window_bytes=1 << 16)


def _lines(dice: Random, seed: bytes) -> bytes:
    parts = _spoil(dice, seed.splitlines(keepends=True))
    return b"".join(parts)


def _orders() -> list[bytes]:
    requests = [wire.Ship, wire.Fill, wire.Glance, wire.Sweep, wire.Catalogue]
    return [*map(samples.content, requests), samples.content(orders.Order)]


def _ordered(given: bytes, _scratch: Path) -> object:
    with suppress(SnapError):
        return worker.understood(given)
    return feeder.understood(given)


ALL = [
    _script(
        "monitor-wire",
        [[_GREETING, _DONE, _STATUS, _EVENT + _DONE, _DONE], [_GREETING, _DONE, _STATUS, _NO]],
        _monitored,
    ),
    _script("agent-facts", [_TOLD], _asked),
    _script("agent-renew", [_RENEW], _renewed),
    _script("agent-freeze", [_agent("thawed", 3)], _frozen),
    Surface("agent-wire", lambda: [b'x\xff{"return": @ID@}\n{"return": {}}\n{"return": 3}\n',
                                   b'\xff{"return": 7}\n\xff{"return": @ID@}\n{"error": {}}\n'],
            _read(_agent_lines), _lines),
    Surface("spare-wire", lambda: [_GREETING + _DONE + _STATUS, _GREETING + _STRANGE + _DONE],
            _read(_spare), _lines),
    Surface("feeder-lines",
            lambda: [samples.content(orders.Said, step="ready", failed=None) + b"\n"
                     b'{"step":"done"}\n', samples.content(orders.Said) + b"\n"],
            _read(_feeder_says), _lines),
    Surface("worker-lines",
            lambda: [b'{"progress":{"done":1,"total":2,"what":"x"}}\n'
                     b'{"result":{"manifest_blake3":"ab","bytes":7}}\n',
                     b'{"error":{"code":"packs-missing","message":"m","hint":"h","packs":["a"]}}\n'],
            _read(_worker_says), _lines),
    Surface("orders", _orders, _ordered, lambda d, s: mutation.content(d, s, json_too=True)),
    Surface("return-path", _back, _read(_returned)),
    Surface("vmstate", lambda: [bytes(small().raw)], _streamed),
]  # fmt: skip
