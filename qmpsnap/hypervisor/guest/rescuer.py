"""The watchdog's process: thaws and continues the guest when the engine died or hangs.

Run as a plain script on the standard library alone (`python -I -S rescuer.py QMP AGENT FD`), so
that it starts in no time and needs nothing that the engine's end may have broken. It is told over
its standard input, a JSON object a line, what is owed. When that pipe ends or the deadline passes
while something is owed, it cuts the engine's QMP connection (descriptor FD: QEMU serves one
client a monitor) and pays over fresh connections until it has seen the guest run.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

_PATIENCE = 600.0  # seconds that it keeps trying once it must pay
_GONE_PATIENCE = 5.0  # and while nobody listens, if who did has ended as well
_AT_WORK = {"setup", "active", "cancelling", "device", "pre-switchover"}


class _Wire:
    """A JSON conversation over a unix socket, blocking, with a deadline for each answer."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(5)
        self._socket.connect(path)
        self._file = self._socket.makefile("rb")

    def send(self, message: dict[str, Any], prefix: bytes = b"") -> None:
        self._socket.sendall(prefix + json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        while line := self._file.readline().lstrip(b"\xff"):
            message = json.loads(line)
            if isinstance(message, dict) and "event" not in message:
                return message
        raise ConnectionError("closed")

    def ask(self, command: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        self.send({"execute": command, "arguments": arguments or {}})
        return self.receive()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def _continue(qmp: str, *, cancel: bool) -> bool:
    wire = _Wire(qmp)
    try:
        wire.receive()  # the greeting
        wire.ask("qmp_capabilities")
        migration = wire.ask("query-migrate").get("return", {}).get("status")
        if migration == "cancelling":  # it may wait for ever: see migration.WAKE
            wire.ask("migrate-continue", {"state": "cancelling"})
        elif cancel or migration == "pre-switchover":
            wire.ask("migrate_cancel")
        status = wire.ask("query-status")["return"]["status"]
        if status in {"paused", "postmigrate", "finish-migrate"}:
            wire.ask("cont")
            status = wire.ask("query-status")["return"]["status"]
        _say(f"guest is {status}, migration was {migration}")
        still = wire.ask("query-migrate").get("return", {}).get("status")
        return bool(status == "running" and not (cancel and still in _AT_WORK))
    finally:
        wire.close()


def _thaw(agent: str) -> bool:
    wire = _Wire(agent)
    try:
        number = time.monotonic_ns() & 0x7FFFFFFF
        wire.send({"execute": "guest-sync-delimited", "arguments": {"id": number}}, b"\xff")
        while wire.receive().get("return") != number:
            pass
        answer = wire.ask("guest-fsfreeze-thaw")
        _say(f"thaw: {answer}")
        return bool(wire.ask("guest-fsfreeze-status").get("return") == "thawed")
    finally:
        wire.close()


def _pay(debt: dict[str, Any], qmp: str, agent: str, peer: int) -> None:
    # a stopped guest's agent is deaf: cont before thaw
    if "cont" in debt["owed"]:
        _insist("cont", lambda: _continue(qmp, cancel="cancel" in debt["owed"]), peer)
    if "thaw" in debt["owed"]:
        _insist("thaw", lambda: _thaw(agent), peer)


def _peer(connection: int) -> int:
    """The process at the other end, QEMU or a proxy before it; 0 if it cannot be told."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection)) as wire:
        found = wire.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", found)[0])
    return 0


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 - few imports
            return pid > 0 and stat.read().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def _insist(kind: str, pay: Callable[[], bool], peer: int) -> None:
    """Until it is paid; where nobody listens, and *peer* has ended, for a while only."""
    end = time.monotonic() + _PATIENCE
    gone_at = float("inf")
    while time.monotonic() < min(end, gone_at):
        try:
            if pay():
                return
        except (FileNotFoundError, ConnectionRefusedError) as gone:
            _say(f"{kind}: {gone}")
            soon = time.monotonic() + _GONE_PATIENCE
            gone_at = float("inf") if _lives(peer) else min(gone_at, soon)
        except (OSError, ValueError, KeyError) as trouble:
            _say(f"{kind}: {trouble!r}; again")
            gone_at = float("inf")
        time.sleep(0.05)


def _say(text: str) -> None:
    print(f"{time.time():.3f} watchdog {os.getpid()}: {text}", file=sys.stderr, flush=True)


def _watch(qmp: str, agent: str, connection: int) -> None:
    debt: dict[str, Any] = {}
    deadline = float("inf")
    peer = _peer(connection)
    unread = b""
    while True:
        left = None if not debt else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([0], [], [], left)
        heard = os.read(0, 65536) if ready else b""
        if ready and heard:
            *lines, unread = (unread + heard).split(b"\n")
            for line in lines:
                debt = json.loads(line)
                deadline = time.monotonic() + debt.get("within", 0)
                with contextlib.suppress(OSError):  # who asked may be dead: its debt is not
                    os.write(1, b"taken\n")
            continue
        if debt:
            _say(f"{'deadline passed' if not ready else 'engine gone'}, owed: {debt}")
            with contextlib.suppress(OSError):
                cut = socket.socket(fileno=connection)
                cut.shutdown(socket.SHUT_RDWR)
                cut.close()
            _pay(debt, qmp, agent, peer)
        return


if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    print(os.getpid(), flush=True)
    _watch(sys.argv[1], sys.argv[2], int(sys.argv[3]))
