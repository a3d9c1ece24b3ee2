"""The door to QEMU's QMP monitor: the only importer of qemu.qmp, with its traps wrapped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)

from qmpsnap.errors import (
    UNREADABLE,
    CommandRefused,
    MonitorAbsent,
    MonitorBusy,
    MonitorLost,
    QemuGone,
    ReplyMalformed,
)
from qmpsnap.shield import finish

T = TypeVar("T")
Told = Callable[[int], None]
"""Called with a descriptor."""
_wire = logging.getLogger("qmpsnap.wire")
_wire.propagate = False  # what it reports reaches the caller as an exception
_wire.addHandler(logging.NullHandler())


# Seconds without an answer after which QEMU is out of reach. What takes long by its nature is a job
# or a migration; a transaction drains and flushes disks, and may wait for slow ones.
_SILENT = 120.0
# QEMU may have gone first; and what the reader broke off at, odd words, is told again at the end
_ON_LEAVING = (EOFError, OSError, QMPError, LookupError, TypeError, AttributeError, *UNREADABLE)


class _Client(QMPClient):
    logger = _wire


@dataclass(frozen=True, slots=True)
class Event:
    """One QMP event; *at* is QEMU's own timestamp, in seconds since the epoch."""

    name: str
    data: Mapping[str, Any]
    at: float


class Events:
    """The events of one `listen` block, in the order in which QEMU sent them."""

    def __init__(self, listener: EventListener, lost: asyncio.Future[None], name: str) -> None:
        self._listener, self._lost, self._name = listener, lost, name

    async def next(self) -> Event:
        """The next event; waits for ever, so bound it with asyncio.timeout.

        Raises MonitorLost when QEMU goes away (a bare listener would wait on).
        """
        if self._listener.empty():
            getting: asyncio.Future[Message] = asyncio.ensure_future(self._listener.get())
            try:
                either: list[asyncio.Future[Any]] = [getting, self._lost]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    raise MonitorLost(f"{self._name}: QEMU closed the monitor")
                return _event(getting.result())
            finally:
                getting.cancel()
        return _event(await self._listener.get())

    def pending(self) -> list[Event]:
        """What has arrived and was not yet taken."""
        return [_event(message) for message in self._listener.clear()]


class Monitor:
    """One QMP session. QEMU serves one client a monitor: hold it no longer than needed."""

    def __init__(self, path: Path, client: QMPClient, sock: socket.socket) -> None:
        self.path = path
        self.told: Told | None = None
        """Gets the descriptor of each session that `settle` opens in this one's place."""
        self._client, self._sock = client, sock
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watch = asyncio.ensure_future(self._see_it_go())

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run one command and give its `return`.

        Cancelling this stops the waiting, not the command: QEMU runs what it has read.

        Raises CommandRefused with QEMU's words, or MonitorLost (did it run? look before acting). So
        does a QEMU that is silent for two minutes: the session is over, another may be served.
        """
        return await self._executed(command, arguments, out_of_band=False)

    async def urgently(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """As `execute`, past QEMU's main loop, which may be stuck; few commands can be run so.

        On a monitor without that ability (of a chardev that cannot) it is run in its turn.
        """
        greeting = self._client.greeting
        able = greeting is not None and "oob" in greeting.QMP.capabilities
        return await self._executed(command, arguments, out_of_band=able)

    async def _executed(
        self, command: str, arguments: Mapping[str, object] | None, *, out_of_band: bool
    ) -> Any:
        try:
            async with asyncio.timeout(_SILENT):
                return await self._client.execute(command, dict(arguments or {}), oob=out_of_band)
        except TimeoutError as silent:
            self._cut()
            told = f"{self.path}: no answer to {command} within {_SILENT:g} s"
            raise MonitorLost(told) from silent
        except ExecuteError as refused:
            raise CommandRefused(command, refused.error_class, str(refused)) from refused
        except (ExecInterruptedError, StateError, OSError) as lost:
            self._mark_lost()
            raise MonitorLost(f"{self.path}: connection lost at {command}") from lost
        except QMPError as odd:
            raise ReplyMalformed(f"{command}: {odd}") from odd

    async def query(
        self, command: str, kind: type[T], arguments: Mapping[str, object] | None = None
    ) -> T:
        """Run one command and give its `return` as *kind*; fields that we do not know are dropped.

        Raises as `execute`, and ReplyMalformed naming the path of the odd value.
        """
        reply = await self.execute(command, arguments)
        try:
            return msgspec.convert(reply, kind)
        except UNREADABLE as odd:
            raise ReplyMalformed(f"{command}: {odd}") from odd

    @contextlib.contextmanager
    def listen(self, *names: str) -> Iterator[Events]:
        """Collect the events called *names* for the block. Listen first, then act."""
        with self._client.listener(names) as listener:
            yield Events(listener, self._lost, str(self.path))

    async def send_fd(self, fd: int) -> None:
        """Hand *fd* to QEMU; the command right after this one (getfd, add-fd) takes it."""
        try:
            self._client.send_fd_scm(fd)
        except (StateError, OSError) as lost:
            raise MonitorLost(f"{self.path}: connection lost at sending a descriptor") from lost

    def fileno(self) -> int:
        """The connection's descriptor, for the watchdog to cut it when we no longer can."""
        return self._sock.fileno()

    @property
    def lost(self) -> bool:
        return self._lost.done()

    async def _see_it_go(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        self._mark_lost()

    def _mark_lost(self) -> None:
        if not self._lost.done():
            self._lost.set_result(None)

    def _cut(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._mark_lost()

    async def _leave(self) -> None:
        self._watch.cancel()
        if self.told is not None:
            self._cut()  # who was told holds it too: closed it would go on
        with contextlib.suppress(*_ON_LEAVING):
            await self._client.disconnect()
        self._mark_lost()


@contextlib.asynccontextmanager
async def understood(what: str) -> AsyncIterator[None]:
    """Where answers are taken apart: one that is not as QEMU's schema has it is a ReplyMalformed.

    *what* was asked. Decorates a coroutine, too. Raises ReplyMalformed.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, *UNREADABLE) as odd:
        raise ReplyMalformed(f"{what}: QEMU's answer is not understood: {odd!r}") from odd


@contextlib.asynccontextmanager
async def connect(
    path: Path, *, within: float = 5.0, told: Told | None = None
) -> AsyncIterator[Monitor]:
    """A QMP session with the QEMU at the unix socket *path*, greeted within *within* seconds.

    *told* gets the descriptor before it is connected: who hangs from there on keeps everybody else
    from QEMU.

    Raises MonitorAbsent (nobody listens), MonitorBusy (accepted but not greeted: somebody else
    is being served, or QEMU hangs), or ReplyMalformed (this is no QMP).
    """
    sock = _reach(path, told)
    client = _Client(path.name)
    # the default listener keeps every event for ever: make it deaf
    client.events.event_filter = lambda _: False
    try:
        await finish(client.connect(sock), within=within)
    except asyncio.CancelledError:
        # the session may be complete all the same: QEMU's one place must not stay taken
        with contextlib.suppress(*_ON_LEAVING):
            await finish(client.disconnect(), within=5)
        raise
    except TimeoutError as silent:
        raise MonitorBusy(f"{path}: no greeting within {within:g} s") from silent
    except ConnectError as failed:
        if isinstance(failed.exc, EOFError | OSError):
            raise MonitorAbsent(f"{path}: closed before its greeting") from failed
        raise ReplyMalformed(f"{path}: not a QMP monitor: {failed}") from failed
    finally:
        if client.runstate is not Runstate.RUNNING:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
    monitor = Monitor(path, client, sock)
    monitor.told = told
    try:
        yield monitor
    finally:
        await finish(monitor._leave(), within=10)


async def settle(
    monitor: Monitor, debt: Callable[[Monitor], Awaitable[T]], *, within: float = 10.0
) -> T:
    """Pay *debt* over *monitor*, or over a fresh session if that one is gone, or goes under it.

    So *debt* must be one that may be paid twice. *within* is for the fresh session's greeting.

    Raises QemuGone, MonitorLost when QEMU is out of reach, and what *debt* raises.
    """
    if not monitor.lost:
        with contextlib.suppress(MonitorLost):
            return await debt(monitor)
    try:
        async with connect(monitor.path, within=within, told=monitor.told) as fresh:
            return await debt(fresh)
    except MonitorAbsent as gone:
        raise QemuGone(f"QEMU has ended: {gone}") from gone
    except MonitorBusy as busy:
        raise MonitorLost(f"the connection was lost, and no other is to be had: {busy}") from busy


def _reach(path: Path, told: Told | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if told is not None:
        told(sock.fileno())
    try:
        # the backlog is 1: behind a client that waits for its turn connect() would block
        sock.setblocking(False)
        sock.connect(str(path))
    except BlockingIOError as full:
        sock.close()
        raise MonitorBusy(f"{path}: others are queueing for it already") from full
    except OSError as absent:
        sock.close()
        raise MonitorAbsent(f"{path}: {absent.strerror or absent}") from absent
    return sock


class _Stamp(msgspec.Struct, frozen=True):
    seconds: float = 0
    microseconds: float = 0


class _Event(msgspec.Struct, frozen=True):
    event: str
    data: dict[str, Any] = {}
    timestamp: _Stamp = _Stamp()


def _event(message: Message) -> Event:
    try:
        told = msgspec.convert(dict(message), _Event)
    except UNREADABLE as odd:
        raise ReplyMalformed(f"an event: {odd}") from odd
    return Event(told.event, told.data, told.timestamp.seconds + told.timestamp.microseconds / 1e6)
