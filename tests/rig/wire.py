"""A faulty wire between an engine and a QMP socket, and a witness that does not use it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong at the command *at*: the how-manieth it is, or the first of that name.

    *delivered*: QEMU has carried the command out and its reply is lost; else QEMU never saw it.
    *then* is called at that moment (a kill). *held*: nothing is cut, but the reply does not come
    before `release`.
    *dead*: nobody listens any more after the cut; else the next connection is served again.
    """

    at: int | str
    delivered: bool = True
    then: Callable[[], None] | None = None
    held: bool = False
    dead: bool = False


@dataclass(slots=True)
class Wire:
    """A proxy in front of the socket *behind*; counts commands and carries descriptors along."""

    path: Path
    behind: Path
    fault: Fault | None = None
    names: list[str] = field(default_factory=list)
    happened: threading.Event = field(default_factory=threading.Event)
    _release: threading.Event = field(default_factory=threading.Event)
    trouble: list[BaseException] = field(default_factory=list)
    _listener: socket.socket = field(init=False)
    _open: set[socket.socket] = field(default_factory=set)
    _threads: list[threading.Thread] = field(default_factory=list)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def seen(self) -> int:
        """Commands since the last `arm`, over all connections."""
        return len(self.names)

    def arm(self, fault: Fault | None) -> None:
        """Count anew, with *fault* to come."""
        with self._turn:
            self.fault, self.names = fault, []
            self.happened.clear()
            self._release.clear()

    def listen(self) -> None:
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(8)
        self._start(self._accept)

    def close(self) -> None:
        self._hang_up()
        for one in list(self._open):
            _shut(one)
        for thread in self._threads:
            thread.join()

    def _hang_up(self) -> None:
        self.path.unlink(missing_ok=True)
        _shut(self._listener)
        self._listener.close()

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            self._open |= {client, server}
            try:
                server.connect(str(self.behind))
                self._pump(client, server)
            except OSError:
                pass  # either end went away: so does the other
            except BaseException as odd:
                self.trouble.append(odd)
                raise
            finally:
                self._open -= {client, server}

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        commands = _Commands()
        with selectors.DefaultSelector() as ready:
            ready.register(client, selectors.EVENT_READ)
            ready.register(server, selectors.EVENT_READ)
            while True:
                sides = [key.fileobj for key, _ in ready.select()]
                if server in sides:
                    if not (data := server.recv(65536)):
                        return
                    client.sendall(data)
                if client in sides:
                    data, fds, _, _ = socket.recv_fds(client, 65536, 8)
                    if not data:
                        return
                    with _closed(fds):
                        for command in commands.feed(data, fds):
                            if not self._carry(command, client, server):
                                return

    def _carry(self, command: _Command, client: socket.socket, server: socket.socket) -> bool:
        """Hand one command on; False when the wire is cut."""
        fault = self._due(command.name)
        if fault is None:
            command.send(server)
            return True
        reply = b""
        if fault.delivered:
            command.send(server)
            reply = _reply(server)
        if fault.then is not None:
            fault.then()
        if fault.dead:
            self._hang_up()
        self.happened.set()
        if fault.held and self._released_by(client):
            client.sendall(reply)
            return True
        return False

    def release(self) -> None:
        """Let the reply through that was held."""
        self._release.set()

    def _released_by(self, client: socket.socket) -> bool:
        """Wait for `release`; False if the client hangs up before."""
        while not self._release.wait(0.01):
            client.setblocking(False)
            try:
                if not client.recv(1, socket.MSG_PEEK):
                    return False
            except BlockingIOError:
                pass
            finally:
                client.setblocking(True)
        return True

    def _due(self, name: str) -> Fault | None:
        with self._turn:
            self.names.append(name)
            fault = self.fault
            if fault is not None and fault.at in {len(self.names), name}:
                self.fault = None
                return fault
            return None


@dataclass(slots=True)
class _Command:
    name: str
    text: bytes
    fds: list[int]

    def send(self, server: socket.socket) -> None:
        socket.send_fds(server, [self.text], self.fds)


@dataclass(slots=True)
class _Commands:
    """Splits what a client sends: JSON objects with nothing between them, descriptors before."""

    _text: str = ""
    _fds: list[int] = field(default_factory=list)

    def feed(self, data: bytes, fds: list[int]) -> Iterator[_Command]:
        self._fds += [os.dup(fd) for fd in fds]
        self._text += data.decode()
        decoder = json.JSONDecoder()
        while text := self._text.lstrip():
            try:
                command, end = decoder.raw_decode(text)
            except ValueError:
                return
            self._text = text[end:]
            taken, self._fds = self._fds, []
            with _closed(taken):
                name = command.get("execute") or command.get("exec-oob") or ""
                yield _Command(name, text[:end].encode(), taken)


@contextlib.contextmanager
def _closed(fds: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


def _reply(server: socket.socket) -> bytes:
    """What QEMU says up to its next reply, events included."""
    said = b""
    while data := server.recv(65536):
        said += data
        *lines, _ = said.split(b"\n")
        if any(line.strip() and {"return", "error"} & set(json.loads(line)) for line in lines):
            break
    return said


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def wired(path: Path, behind: Path) -> Iterator[Wire]:
    """A wire at *path* for the block."""
    wire = Wire(path, behind)
    wire.listen()
    try:
        yield wire
    finally:
        wire.close()
    if wire.trouble:
        raise wire.trouble[0]


class Witness:
    """A second monitor's client: blocking, plain, and of no code of ours."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self._file.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> Any:
        """The `return` of one command."""
        message = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(message).encode())
        while line := self._file.readline():
            answer = json.loads(line)
            if "event" not in answer:
                return answer["return"]
        raise ConnectionError(f"QEMU closed the witness at {command}")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    @property
    def status(self) -> str:
        return str(self.ask("query-status")["status"])

    def until_running(self, *, within: float) -> None:
        """Wait for the guest to run. Raises TimeoutError."""
        self.until(lambda: self.status == "running", within=within)

    def until(self, holds: Callable[[], bool], *, within: float) -> None:
        """Look again until *holds*. Raises TimeoutError."""
        end = time.monotonic() + within
        while not holds():
            if time.monotonic() > end:
                raise TimeoutError(f"not within {within:g} s; the guest is {self.status}")
            time.sleep(0.01)


@contextlib.contextmanager
def witness(path: Path) -> Iterator[Witness]:
    one = Witness(path)
    try:
        yield one
    finally:
        one.close()
