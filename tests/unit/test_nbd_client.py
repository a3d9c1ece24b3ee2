"""The NBD client against a server that plays by a script: short, long, late and broken replies."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qmpsnap.errors import LocalFailed
from qmpsnap.hypervisor.nbd.client import Extent, Reader, opened

SIZE = 1 << 20
CONTEXT = "test:depth"
Status = Callable[[int, int], list[tuple[int, int]]]
Read = Callable[[int, int], bytes]


class Hangup(Exception):
    """The server goes away in the middle."""


class Stall(Exception):
    """The server says nothing more, and stays."""


def _whole(offset: int, length: int) -> list[tuple[int, int]]:
    return [(length, 0)]


def _zeroes(offset: int, length: int) -> bytes:
    return bytes(length)


class Server:
    """One newstyle NBD server with structured replies and one context."""

    def __init__(self, path: Path, size: int, status: Status, read: Read) -> None:
        self.size, self.status, self.read = size, status, read
        self.asked: list[tuple[int, int]] = []
        self.asking = threading.Event()
        self._open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._thread.join(10)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                with contextlib.suppress(EOFError, Hangup), client:
                    self._greet(client)
                    try:
                        self._serve(client)
                    except Stall:
                        client.recv(1)  # until the other end goes

    def _greet(self, client: socket.socket) -> None:
        client.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        _take(client, 4)
        option = 0
        while option != 7:  # NBD_OPT_GO
            _, option, length = struct.unpack(">QII", _take(client, 16))
            data = _take(client, length)

            def say(kind: int, payload: bytes = b"", option: int = option) -> None:
                head = struct.pack(">QIII", 0x3E889045565A9, option, kind, len(payload))
                client.sendall(head + payload)

            if option == 10 and CONTEXT.encode() in data:  # NBD_OPT_SET_META_CONTEXT
                say(4, struct.pack(">I", 7) + CONTEXT.encode())
            elif option == 7:
                say(3, struct.pack(">HQH", 0, self.size, 3))
            elif option not in {8, 10}:  # NBD_OPT_STRUCTURED_REPLY
                say(0x80000001)
                continue
            say(1)

    def _serve(self, client: socket.socket) -> None:
        while True:
            _, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", _take(client, 28))
            if kind == 2:
                return
            self.asked.append((offset, length))
            self.asking.set()
            if kind == 7:
                pairs = self.status(offset, length)
                payload = struct.pack(">I", 7) + b"".join(struct.pack(">II", *one) for one in pairs)
                chunk = 5
            else:
                payload, chunk = struct.pack(">Q", offset) + self.read(offset, length), 1
            head = struct.pack(">IHHQI", 0x668E33EF, 1, chunk, cookie, len(payload))
            client.sendall(head + payload)


def _take(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (more := client.recv(count - len(data))):
            raise EOFError
        data += more
    return data


@contextlib.contextmanager
def scripted(
    path: Path, *, size: int = SIZE, status: Status = _whole, read: Read = _zeroes
) -> Iterator[Server]:
    server = Server(path, size, status, read)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def path(short: Path) -> Path:
    return short / "nbd"


def _extents(path: Path) -> list[Extent]:
    with Reader(path, "it", CONTEXT) as reader:
        return reader.extents(CONTEXT)


def test_short_replies_are_asked_on(path: Path) -> None:
    step = SIZE // 8
    with scripted(path, status=lambda at, _: [(step, at // step % 4 // 2)]) as server:
        found = _extents(path)
    assert found == [Extent(n * 2 * step, 2 * step, n % 2) for n in range(4)]
    assert len(server.asked) == 8


def test_a_reply_that_overshoots_ends_with_the_export(path: Path) -> None:
    third = SIZE // 4
    told = {0: [(third, 1)], third: [(512, 0), (SIZE, 1), (512, 0)]}
    with scripted(path, status=lambda at, _: told[at]):
        found = _extents(path)
    assert found == [
        Extent(0, third, 1),
        Extent(third, 512, 0),
        Extent(third + 512, SIZE - third - 512, 1),
    ]


def test_more_than_one_question_can_hold(path: Path) -> None:
    size = (5 << 30) + 512
    with scripted(path, size=size, status=lambda at, length: [(length, 3)]) as server:
        assert _extents(path) == [Extent(0, size, 3)]
    assert len(server.asked) >= 2


def test_a_reply_that_goes_beyond_the_question(path: Path) -> None:
    size = 5 << 30
    far = 3 << 30
    with scripted(path, size=size, status=lambda at, _: [(far, at > 0)]) as server:
        assert _extents(path) == [Extent(0, far, 0), Extent(far, size - far, 1)]
    assert [offset for offset, _ in server.asked] == [0, far]


def test_an_empty_export_has_no_extents(path: Path) -> None:
    with scripted(path, size=0):
        assert _extents(path) == []


def test_a_context_that_is_not_there(path: Path) -> None:
    with (
        scripted(path),
        pytest.raises(LocalFailed, match="'it' has no qemu:allocation-depth"),
        Reader(path, "it", "qemu:allocation-depth"),
    ):
        pass


def test_large_reads_are_many_requests(path: Path) -> None:
    size = 20 << 20

    def read(offset: int, length: int) -> bytes:
        return b"".join(struct.pack(">I", at) * 128 for at in range(offset, offset + length, 512))

    with scripted(path, size=size, read=read) as server, Reader(path, "it") as reader:
        content = reader.read(512, size - 1024)
        part = bytearray(512)
        reader.read_into(1024, part)
        pieces = [(at, 512 + at % 3 * 512) for at in range(0, 40 * 65536, 65536)]
        pieces += [(1 << 20, 3 << 20), (0, 0)]
        found = reader.read_all(pieces)
    assert found == [read(*piece) for piece in pieces]
    assert content == read(512, size - 1024)
    assert part == read(1024, 512)
    assert len(server.asked) > 8


def test_a_server_that_goes_away(path: Path) -> None:
    def read(offset: int, length: int) -> bytes:
        if offset > 4 << 20:
            raise Hangup
        return bytes(length)

    with scripted(path, size=16 << 20, read=read), Reader(path, "it") as reader:
        with pytest.raises(LocalFailed, match=str(path)):
            reader.read(0, 16 << 20)
        with pytest.raises(LocalFailed):
            reader.read(0, 512)


def test_reads_beyond_the_end(path: Path) -> None:
    with scripted(path), Reader(path, "it") as reader:
        with pytest.raises(LocalFailed):
            reader.read(SIZE - 512, 1024)
        assert reader.read(SIZE - 512, 512) == bytes(512)


def _stall(offset: int, length: int) -> bytes:
    raise Stall


def test_a_read_that_waits_can_be_cut(path: Path) -> None:
    with scripted(path, read=_stall) as server, Reader(path, "it") as reader:
        cutter = threading.Thread(target=lambda: (server.asking.wait(10), reader.cut()))
        cutter.start()
        with pytest.raises(LocalFailed):
            reader.read(0, 512)
        cutter.join()


async def test_a_cancelled_call_ends_its_thread(path: Path) -> None:
    async def read() -> None:
        async with opened(path, "it") as client:
            await client.read(0, 512)

    with scripted(path, read=_stall) as server:
        task = asyncio.create_task(read())
        await asyncio.to_thread(server.asking.wait, 10)
        assert _threads()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 5)
        assert not _threads()


async def test_the_loop_goes_on_while_the_server_thinks(path: Path) -> None:
    # a binding that kept the interpreter's lock would hang here for ever
    go = threading.Event()

    def read(offset: int, length: int) -> bytes:
        assert go.wait(10)
        return b"x" * length

    with scripted(path, read=read):
        async with opened(path, "it") as client:
            reading = asyncio.create_task(client.read(0, 4))
            await asyncio.sleep(0)
            go.set()
            assert await reading == b"xxxx"
            assert client.size == SIZE


async def test_nobody_listens(path: Path) -> None:
    with pytest.raises(LocalFailed, match=str(path)):
        async with opened(path, "it"):
            pass
    assert not _threads()


async def test_libnbd_is_missing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nbd", None)
    with pytest.raises(LocalFailed) as failed:
        async with opened(path, "it"):
            pass
    assert "python3-libnbd" in failed.value.hint


def _threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("nbd_")]
