"""Reading from an NBD server on a Unix socket: the only importer of libnbd."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from socket import AF_UNIX, SHUT_RDWR, SOCK_STREAM
from socket import socket as Socket
from typing import Any, NamedTuple, Self, TypeVar

from qmpsnap.errors import LocalFailed
from qmpsnap.shield import finish

T = TypeVar("T")
_REQUEST = 1 << 20  # bytes of one read; QEMU takes up to 32 MiB
_IN_FLIGHT = 8  # QEMU works on 16 a connection
_STRIDE = 1 << 31  # bytes of one question about extents: without extended headers 32 bits hold it
_LEAVING = 5.0  # seconds that a server may take to let us go


class Extent(NamedTuple):
    """A run of bytes of which one context tells the same; *flags* mean what the context says."""

    start: int
    length: int
    flags: int


class Reader:
    """One connection, blocking, for one thread at a time; only `cut` may come from another.

    Used as a context it is open for the block. All but `cut` raise LocalFailed.
    """

    def __init__(self, socket: Path, export: str = "", *contexts: str) -> None:
        self._path, self._export, self._contexts = socket, export, contexts
        self._socket = Socket(AF_UNIX, SOCK_STREAM)
        self._nbd: Any = None
        self._handle: Any = None
        self.size = 0

    def __enter__(self) -> Self:
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.cut()
        self.close()

    def open(self) -> None:
        """Connect, and see that the server offers all the contexts that were asked for."""
        self._nbd = _libnbd()
        with self._told():
            self._socket.setblocking(False)  # nobody could cut a wait for room in the backlog
            self._socket.connect(str(self._path))
            self._socket.setblocking(True)
            handle = self._nbd.NBD()
            handle.set_export_name(self._export)
            for context in self._contexts:
                handle.add_meta_context(context)
            if hasattr(handle, "set_pread_initialize"):  # 1.12
                handle.set_pread_initialize(False)  # what a failed read leaves is not looked at
            self._handle = handle
            handle.connect_socket(self._socket.dup().detach())
            for context in self._contexts:
                if not handle.can_meta_context(context):
                    raise LocalFailed(f"{self._path}: export {self._export!r} has no {context}")
            self.size = handle.get_size()

    def read(self, offset: int, length: int) -> bytes:
        """The *length* bytes at *offset*."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill *buffer* from *offset* on, several requests in flight."""
        self._fill([(offset, memoryview(buffer).cast("B"))])

    def read_all(self, pieces: Sequence[tuple[int, int]]) -> list[bytearray]:
        """What lies at each of *pieces*, offset and length, several requests in flight."""
        found = [bytearray(length) for _, length in pieces]
        offsets = (offset for offset, _ in pieces)
        self._fill(list(zip(offsets, (memoryview(one) for one in found), strict=True)))
        return found

    def _fill(self, wanted: list[tuple[int, memoryview]]) -> None:
        flying, failed = deque[int](), deque[Exception]()
        handle = self._opened()
        for offset, part in _requests(wanted):
            if len(flying) == _IN_FLIGHT:
                self._land(flying.popleft(), failed)
            if failed:
                break
            with self._told():
                flying.append(handle.aio_pread(part, offset))
        # libnbd writes into the buffers until each of them is back, failed or not
        while flying:
            self._land(flying.popleft(), failed)
        if failed:
            raise failed[0]

    def extents(self, context: str) -> list[Extent]:
        """What *context* tells of the whole export: in order, without gaps, neighbours merged."""
        starts: list[int] = []
        kinds: list[int] = []
        at = 0
        while at < self.size:
            before = at
            for length, flags in self._status(context, at, min(self.size - at, _STRIDE)):
                # the last one may reach beyond what was asked for, and beyond the end
                if at < self.size and kinds[-1:] != [flags]:
                    starts.append(at)
                    kinds.append(flags)
                at += length
            if at == before:
                raise LocalFailed(f"{self._path}: the server tells nothing of {context} at {at}")
        ends = [*starts[1:], self.size][: len(starts)]
        return [
            Extent(start, end - start, flags)
            for start, end, flags in zip(starts, ends, kinds, strict=True)
        ]

    def cut(self) -> None:
        """Make whatever waits for the server fail at once, in whatever thread it is."""
        with suppress(OSError):
            self._socket.shutdown(SHUT_RDWR)

    def close(self) -> None:
        """Leave; the server is told so, if it listens. Nothing to do if it is done."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(self._nbd.Error):
                if handle.aio_is_ready():
                    handle.shutdown()
        self._socket.close()

    def _status(self, context: str, offset: int, count: int) -> list[tuple[int, int]]:
        """Lengths and flags from *offset* on, as many as one reply has."""
        told: list[tuple[int, int]] = []

        def take_pairs(name: str, at: int, pairs: list[tuple[int, int]], _error: object) -> None:
            if name == context and at == offset:
                told.extend(pairs)

        def take_flat(name: str, at: int, flat: list[int], error: object) -> None:
            take_pairs(name, at, list(zip(flat[::2], flat[1::2], strict=True)), error)

        handle = self._opened()
        with self._told():
            if hasattr(handle, "block_status_64"):  # 1.18
                handle.block_status_64(count, offset, take_pairs)
            else:
                handle.block_status(count, offset, take_flat)
        return told

    def _land(self, cookie: int, failed: deque[Exception]) -> None:
        try:
            with self._told():
                while not self._handle.aio_command_completed(cookie):
                    self._handle.poll(-1)
        except LocalFailed as one:
            failed.append(one)

    def _opened(self) -> Any:
        if self._handle is None:
            raise LocalFailed(f"{self._path}: the connection is closed")
        return self._handle

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._nbd.Error as failed:
            raise LocalFailed(f"{self._path}: {failed.string}") from failed
        except OSError as failed:
            raise LocalFailed(f"{self._path}: {failed.strerror or failed}") from failed


class Client:
    """A `Reader` on a thread of its own. A cancelled call ends the connection, and the thread."""

    def __init__(self, reader: Reader, thread: ThreadPoolExecutor) -> None:
        self._reader, self._thread = reader, thread

    @property
    def size(self) -> int:
        """Of the export, in bytes."""
        return self._reader.size

    async def read(self, offset: int, length: int) -> bytes:
        """As `Reader.read`."""
        return await self._call(partial(self._reader.read, offset, length))

    async def extents(self, context: str) -> list[Extent]:
        """As `Reader.extents`."""
        return await self._call(partial(self._reader.extents, context))

    async def _call(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except asyncio.CancelledError:
            self._reader.cut()
            raise


@asynccontextmanager
async def opened(socket: Path, export: str, *contexts: str) -> AsyncIterator[Client]:
    """A connection to *export* for the block; *contexts* are what `extents` will be asked for.

    Raises LocalFailed: libnbd is missing, nobody listens, no such export or context.
    """
    reader = Reader(socket, export, *contexts)
    with ThreadPoolExecutor(1, "nbd") as thread:
        client = Client(reader, thread)
        try:
            await client._call(reader.open)
            yield client
        except BaseException:
            reader.cut()
            raise
        finally:
            with suppress(TimeoutError):  # it was cut then
                await finish(client._call(reader.close), within=_LEAVING)


def _requests(wanted: list[tuple[int, memoryview]]) -> Iterator[tuple[int, memoryview]]:
    for offset, view in wanted:
        for start in range(0, len(view), _REQUEST):
            yield offset + start, view[start : start + _REQUEST]


def _libnbd() -> Any:
    try:
        import nbd
    except ImportError as missing:
        raise LocalFailed(_MISSING, hint=_HINT) from missing
    if not hasattr(nbd, "NBD"):  # PyPI has something else under this name
        raise LocalFailed(_MISSING, hint=_HINT)
    return nbd


_MISSING, _HINT = "the Python module of libnbd is missing", "Debian: python3-libnbd"
