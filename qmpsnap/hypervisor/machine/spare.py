"""A QMP session with a machine of ours whose other end QEMU itself keeps: no client holds it.

QEMU's main loop may stand at a page that is missing. It answers no new session then, as each begins
with a command that this loop runs; a session that was greeted before goes past it (`exec-oob`).
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from qmpsnap.errors import UNREADABLE, CommandRefused, MonitorAbsent, MonitorLost
from qmpsnap.hypervisor.machine.cmdline import Option
from qmpsnap.hypervisor.machine.keyval import Fields
from qmpsnap.hypervisor.machine.options import option_of
from qmpsnap.hypervisor.monitor import understood

ID = "qmpsnap-spare"
_ABOVE = 64  # the shell on the way to QEMU uses low descriptors for itself
_PIDFD_GETFD = 438  # on all architectures; Python has no name for it
_MOST = 1 << 20  # bytes of an answer


@contextmanager
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our end of a connection and the monitor's, for a QEMU that inherits both."""
    first, second = socket.socketpair()
    with _raised(first) as ours, _raised(second) as theirs:
        yield ours, theirs


def _raised(end: socket.socket) -> socket.socket:
    with end:
        return socket.socket(fileno=fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, _ABOVE))


def options(descriptor: int) -> tuple[Option, Option]:
    """The options that give a machine a QMP monitor on the connected socket *descriptor*."""
    where = Fields((("backend", "socket"), ("id", ID), ("fd", str(descriptor))))
    monitor = Fields((("chardev", ID), ("mode", "control")))
    return option_of("chardev", where), option_of("mon", monitor)


class Session:
    """Our end *sock*. One at a time may speak; answers that a former one left are passed over."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock, self._rest, self._asked = sock, b"", 0

    async def greeted(self) -> None:
        """Begin the session, once for the life of QEMU. Raises MonitorLost, CommandRefused."""
        greeting = await self._line()
        async with understood("the spare monitor's greeting"):
            able = "oob" in greeting["QMP"]["capabilities"]
        await self.ask("qmp_capabilities", {"enable": ["oob"] if able else []})

    async def ask(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        urgently: bool = False,
    ) -> Any:
        """Run one command, *urgently* past the main loop. Raises CommandRefused, MonitorLost,
        ReplyMalformed.
        """
        self._asked += 1
        number = f"{os.getpid()}-{self._asked}"
        verb = "exec-oob" if urgently else "execute"
        message = {verb: command, "arguments": dict(arguments or {}), "id": number}
        try:
            data = json.dumps(message).encode() + b"\n"
            await asyncio.get_running_loop().sock_sendall(self._sock, data)
        except OSError as lost:
            raise MonitorLost(f"QEMU closed its spare monitor at {command}") from lost
        while (answer := await self._line()).get("id") != number:
            pass
        async with understood(command):
            if "error" in answer:
                refused = answer["error"]
                raise CommandRefused(command, str(refused["class"]), str(refused["desc"]))
            return answer["return"]

    def hang_up(self) -> None:
        """End the session for all: QEMU need not keep events that nobody will read."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    async def _line(self) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        while b"\n" not in self._rest and len(self._rest) < _MOST:
            try:
                data = await loop.sock_recv(self._sock, 65536)
            except OSError as lost:
                raise MonitorLost("QEMU closed its spare monitor") from lost
            if not data:
                raise MonitorLost("QEMU closed its spare monitor")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            found = json.loads(line)
        except UNREADABLE:
            return {}  # a line that another reader has begun
        return found if isinstance(found, dict) else {}


@contextmanager
def taken(process: int, descriptor: int) -> Iterator[Session]:
    """The session whose end is *descriptor* in the QEMU *process*. Raises MonitorAbsent.

    The caller has seen that this is the process it was. It takes the right to trace it (ptrace(2)).
    """
    try:
        pidfd = os.pidfd_open(process)
    except OSError as gone:
        raise MonitorAbsent(f"there is no process {process} any more") from gone
    import ctypes  # few need it, and it takes its time

    try:
        libc = ctypes.CDLL(None, use_errno=True)
        number = libc.syscall(_PIDFD_GETFD, pidfd, descriptor, 0)
        if number < 0:
            why = os.strerror(ctypes.get_errno())
            raise MonitorAbsent(f"the spare monitor of process {process}: {why}")
    finally:
        os.close(pidfd)
    with socket.socket(fileno=number) as sock:
        yield Session(sock)
