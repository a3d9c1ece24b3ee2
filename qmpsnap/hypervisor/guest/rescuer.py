"""The watchdog's process: thaws and continues the guest when the engine died or hangs.

Run as a plain script on the standard library alone (`python -I -S rescuer.py QMP AGENT FD`), so
that it starts in no time and needs nothing that the engine's end may have broken. It is told over
its standard input, a unix socket, a JSON object a line, what is owed. When that ends, or the
deadline passes, while something is owed, it cuts the engine's connections, for QEMU serves one
client a monitor, and one an agent's socket: that to QMP is the descriptor FD, until another one
comes along with a line `{"cut": "qmp"}`, that to the agent comes with `{"cut": "agent"}`. Then it
pays over fresh ones until it has seen the guest run. Up to there it needs no disk, and no memory
that it has not got already.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

_PATIENCE = 600.0  # seconds that it keeps trying once it must pay
_GONE_PATIENCE = 5.0  # and while nobody listens, if who did has ended as well
_ANSWER_WITHIN = 5.0
_LONGEST = 4 << 20  # bytes of one answer: the agent's are the guest's, and may have no end
_AT_WORK = {"setup", "active", "cancelling", "device", "pre-switchover"}
_MCL_CURRENT, _MCL_FUTURE = 1, 2  # sys/mman.h
_CAP_IPC_LOCK = 14  # linux/capability.h
_said: list[str] = []


class _Wire:
    """A JSON conversation over a unix socket, blocking, with a deadline for each answer."""

    def __init__(self, path: str, within: float = _ANSWER_WITHIN) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(within)
        self._socket.connect(path)
        self._file = self._socket.makefile("rb")

    def send(self, message: dict[str, Any], prefix: bytes = b"") -> None:
        self._socket.sendall(prefix + json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        while line := self._file.readline(_LONGEST).lstrip(b"\xff"):
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
        before = wire.ask("query-migrate").get("return", {})
        migration = before.get("status")
        if migration == "cancelling":  # it may wait for ever: see migration.WAKE
            wire.ask("migrate-continue", {"state": "cancelling"})
        elif cancel or migration == "pre-switchover":
            wire.ask("migrate_cancel")
        status = wire.ask("query-status")["return"]["status"]
        if status in {"paused", "postmigrate", "finish-migrate", "io-error"}:
            wire.ask("cont")
            status = wire.ask("query-status")["return"]["status"]
        _say(f"guest is {status}, migration was {migration}")
        still = wire.ask("query-migrate").get("return", {}).get("status")
        over = not (cancel and still in _AT_WORK) and not _arms(before)
        return bool(status == "running" and over)
    finally:
        wire.close()


def _arms(migration: dict[str, Any]) -> bool:
    """Whether a background save is not armed yet: it may hold a guest that runs once more."""
    ram = migration.get("ram", {})
    counted = ram.get("normal", 0) + ram.get("duplicate", 0)
    return migration.get("status") in _AT_WORK and not counted


def _thaw(agent: str, within: float) -> bool:
    wire = _Wire(agent, within)
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


def _pay(owed: list[str], qmp: str, agent: str, peer: int) -> None:
    """Until all is paid; where nobody listens, and *peer* has ended, for a while only."""
    unpaid: dict[str, Callable[[], bool]] = {}
    # a stopped guest's agent is deaf: cont before thaw
    if "cont" in owed:
        unpaid["cont"] = lambda: _continue(qmp, cancel="cancel" in owed)
    if "thaw" in owed:
        unpaid["thaw"] = lambda: _thaw(agent, 1.0 if "cont" in unpaid else _ANSWER_WITHIN)
    end = time.monotonic() + _PATIENCE
    gone_at = float("inf")
    while unpaid and time.monotonic() < min(end, gone_at):
        gone = 0
        for kind, pay in list(unpaid.items()):
            try:
                if pay():
                    del unpaid[kind]
            except (FileNotFoundError, ConnectionRefusedError) as absent:
                _say(f"{kind}: {absent}")
                gone += 1
            except (OSError, ValueError, KeyError, MemoryError, RecursionError) as trouble:
                _say(f"{kind}: {trouble!r}; again")
        soon = time.monotonic() + _GONE_PATIENCE
        gone_at = min(gone_at, soon) if gone == len(unpaid) and not _lives(peer) else float("inf")
        if unpaid:
            time.sleep(0.05)


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


def _say(text: str) -> None:
    """For the log, when all is paid: a disk that is full, or hangs, may not keep us from it."""
    if not _said or not _said[-1].endswith(f": {text}\n"):
        _said.append(f"{time.time():.3f} watchdog {os.getpid()}: {text}\n")


def _cut(connection: int) -> None:
    with contextlib.suppress(OSError):
        cut = socket.socket(fileno=connection)
        cut.shutdown(socket.SHUT_RDWR)
        cut.close()


def _watch(qmp: str, agent: str, connection: int) -> None:
    debt: dict[str, Any] = {}
    deadline = float("inf")
    peer = _peer(connection)
    cuts = {"qmp": connection}
    unread = b""
    with socket.socket(fileno=0) as engine:
        while True:
            left = None if not debt else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([engine], [], [], left)
            heard = b""
            fds: list[int] = []
            if ready:
                with contextlib.suppress(OSError):
                    heard, fds, _, _ = socket.recv_fds(engine, 65536, 1)
            if not heard:
                break
            *lines, unread = (unread + heard).split(b"\n")
            for message in map(json.loads, lines):
                if "cut" in message:
                    if (earlier := cuts.pop(message["cut"], None)) is not None:
                        os.close(earlier)
                    cuts.update(zip([message["cut"]], fds, strict=False))
                    continue
                debt = message
                deadline = time.monotonic() + debt.get("within", 0)
                with contextlib.suppress(OSError):  # who asked may be dead: its debt is not
                    engine.send(b"taken\n")
        if debt:
            _say(f"{'deadline passed' if not ready else 'engine gone'}, owed: {debt}")
            for one in cuts.values():
                _cut(one)
            _pay(debt["owed"], qmp, agent, peer)


def _harden() -> None:
    """Outlive what may have killed the engine, as far as we are allowed to."""
    os.chdir("/")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # when the engine has ended, it ends by itself
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123
        score.write("-1000")
    with contextlib.suppress(OSError, ImportError, AttributeError, ValueError):
        _lock_memory()


def _lock_memory() -> None:
    from ctypes import CDLL  # while the engine does something else: 5 ms

    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    with open("/proc/self/status") as status:  # noqa: PTH123
        mine = next(line.split()[1] for line in status if line.startswith("CapEff:"))
    unbounded = most == resource.RLIM_INFINITY or int(mine, 16) >> _CAP_IPC_LOCK & 1
    # under a bound a lock of what is still to come would have a later allocation fail
    CDLL(None).mlockall(_MCL_CURRENT | _MCL_FUTURE if unbounded else _MCL_CURRENT)


if __name__ == "__main__":
    if os.fork():
        os._exit(0)
    print(os.getpid(), flush=True)
    _harden()
    try:
        _watch(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    finally:
        with contextlib.suppress(OSError):
            os.write(2, "".join(_said).encode())
