"""The store as the engine sees it: the only place that starts the store's worker and leaves it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from qmpsnap.errors import StoreError, StoreStalled
from qmpsnap.host.filesystem import Filesystem
from qmpsnap.store import wire
from qmpsnap.store.files import Progress
from qmpsnap.store.layout import Id, StoreRoot

T = TypeVar("T")
# -P: whatever lies in the current folder is not imported
_WORKER = (sys.executable, "-P", "-m", "qmpsnap.store.worker")
_PACKAGE_FOLDER = str(Path(__file__).resolve().parents[2])
_LEAVE_WITHIN = 1.0


class Store:
    """The store half's verbs, each in a process of its own.

    *within* is the longest time, in seconds, without any progress: a worker that makes none is
    killed, and left behind if even that does not end it. Cancellation does the same at once.

    Each verb raises StoreStalled then, StoreError for the store's own troubles, UsageError for a
    name that is none, and what it says besides.
    """

    def __init__(
        self, root: StoreRoot, within: float = 30.0, *, command: Sequence[str] = _WORKER
    ) -> None:
        self.root, self.within, self._command = root, within, tuple(command)

    async def examine(self) -> Filesystem:
        """The store root's facts; it takes a file. Raises StoreRefused when it is no folder."""
        return await self._ask(wire.Examine(root=str(self.root.path)), Filesystem)

    async def catalogue(
        self, vm: str | None = None, *, on_progress: Progress | None = None
    ) -> wire.Listing:
        """What is on the store, of *vm* or of all VMs; the manifests unread."""
        request = wire.Catalogue(root=self._root(vm), vm=vm)
        return await self._ask(request, wire.Listing, on_progress)

    async def ship(
        self,
        spool: Path,
        vm: str,
        id: Id,
        *,
        device: int | None = None,
        shared: Path | None = None,
        on_progress: Progress | None = None,
    ) -> wire.Shipped:
        """Copy a sealed spool to the store and seal it there; may be broken off and repeated.

        *device* (of `examine`) makes sure that the store is still mounted: else StoreRefused.
        *shared* is the folder that has the files which it shares with other snapshots.

        Raises HalfMissing, ManifestError, DigestMismatch, LocalFailed for the spool.
        """
        request = wire.Ship(
            root=self._root(vm, id), vm=vm, id=str(id), spool=_spelled(spool), device=device,
            shared=_spelled(shared) if shared is not None else None,
        )  # fmt: skip
        return await self._ask(request, wire.Shipped, on_progress)

    async def verify(
        self,
        vm: str,
        id: Id,
        *,
        seal: str | None = None,
        on_progress: Progress | None = None,
    ) -> list[wire.Problem]:
        """Read a whole store half; what is wrong with it, nothing if all is well.

        *seal* here and below is the digest of the manifest that the local half names.
        """
        request = wire.Verify(root=self._root(vm, id), vm=vm, id=str(id), seal=seal)
        return await self._ask(request, list[wire.Problem], on_progress)

    async def glance(
        self,
        vm: str,
        id: Id,
        texts: Sequence[str],
        *,
        whole: Sequence[str] = (),
        seal: str | None = None,
    ) -> wire.Glanced:
        """Small files, checked, and whether the others are there; those in *whole* are read.

        Raises DamagedData.
        """
        request = wire.Glance(
            root=self._root(vm, id), vm=vm, id=str(id), seal=seal, texts=list(texts),
            whole=list(whole),
        )  # fmt: skip
        return await self._ask(request, wire.Glanced)

    async def read(self, vm: str, id: Id, name: str, *, seal: str | None = None) -> str:
        """The text of a small file, checked. Raises DamagedData."""
        request = wire.Read(root=self._root(vm, id), vm=vm, id=str(id), seal=seal, name=name)
        return await self._ask(request, str)

    async def load(
        self,
        vm: str,
        id: Id,
        name: str,
        fd: int,
        *,
        seal: str | None = None,
        on_progress: Progress | None = None,
    ) -> int:
        """Write a file, checked and unpacked, into *fd*; the bytes written are returned.

        *fd* may be a pipe; its reader counts as the store while it takes nothing.

        Raises DamagedData, as a rule before the first byte, and LocalFailed for *fd*.
        """
        request = wire.Load(root=self._root(vm, id), vm=vm, id=str(id), seal=seal, name=name, fd=fd)
        return await self._ask(request, int, on_progress, pass_fds=(fd,))

    async def fetch(
        self,
        vm: str,
        id: Id,
        name: str,
        to: Path,
        *,
        unpack: bool = False,
        seal: str | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Publish a checked copy of a file at the local path *to*.

        Raises DamagedData, and LocalFailed, also when *to* exists with another content.
        """
        request = wire.Fetch(
            root=self._root(vm, id), vm=vm, id=str(id), seal=seal, name=name,
            to=_spelled(to), unpack=unpack,
        )  # fmt: skip
        await self._ask(request, type(None), on_progress)

    async def remove(self, vm: str, id: Id, *, sweep: bool = True) -> None:
        """Delete a store half, its manifest first; nothing to delete is as good.

        Who removes many leaves out the *sweep* for what they shared, and asks for it once.
        """
        request = wire.Remove(root=self._root(vm, id), vm=vm, id=str(id), sweep=sweep)
        await self._ask(request, type(None))

    async def sweep(self, vm: str) -> None:
        """Delete what snapshots of *vm* shared, and none needs any more."""
        await self._ask(wire.Sweep(root=self._root(vm), vm=vm), type(None))

    def _root(self, vm: str | None, id: Id | None = None) -> str:
        if vm is not None:
            self.root.vm(vm)  # refuses a name that could lead out of the root
            if id is not None:
                self.root.snapshot(vm, id)
        return str(self.root.path)

    async def _ask(
        self,
        request: wire.AnyRequest,
        kind: type[T],
        on_progress: Progress | None = None,
        *,
        pass_fds: tuple[int, ...] = (),
    ) -> T:
        loop = asyncio.get_running_loop()
        transport, talk = await loop.subprocess_exec(
            _Talk, *self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, pass_fds=pass_fds, env=_environment(),
        )  # fmt: skip
        try:
            transport.get_pipe_transport(0).write(msgspec.json.encode(request) + b"\n")  # type: ignore[union-attr]
            answer = await self._answer(talk, on_progress)
        except BaseException:
            # A process in D state takes the signal only when the mount lets go of it
            with suppress(ProcessLookupError):
                transport.kill()
            raise
        finally:
            await _leave(transport, talk)
        return msgspec.json.decode(answer, type=kind)

    async def _answer(self, talk: _Talk, on_progress: Progress | None) -> msgspec.Raw:
        while True:
            try:
                async with asyncio.timeout(self.within):
                    text = await talk.lines.get()
            except TimeoutError:
                raise StoreStalled(
                    f"the store {self.root.path} made no progress for {self.within:g} s"
                ) from None
            if text is None:
                said = talk.complaint.decode(errors="replace").strip().splitlines()[-1:]
                raise StoreError(f"the store's worker ended without an answer: {''.join(said)}")
            line = msgspec.json.decode(text, type=wire.Line)
            if line.error is not None:
                raise wire.error(line.error)
            if bytes(line.result):
                return line.result
            if line.progress is not None and on_progress is not None:
                on_progress(line.progress.done, line.progress.total, line.progress.what)


class _Talk(asyncio.SubprocessProtocol):
    """The worker's lines, in order; None once there will be no more."""

    def __init__(self) -> None:
        self.lines: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.complaint = b""
        self.gone = asyncio.Event()
        self._rest = b""

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd != 1:
            self.complaint = (self.complaint + data)[-4096:]
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self.lines.put_nowait(line)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lines.put_nowait(None)

    def process_exited(self) -> None:
        self.gone.set()


async def _leave(transport: asyncio.SubprocessTransport, talk: _Talk) -> None:
    """Wait a moment for the worker's end, and no longer: a hung mount may hold it for ever."""
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_WITHIN):
                await talk.gone.wait()
    finally:
        transport.close()


def _spelled(path: Path) -> str:
    return str(path.absolute())


def _environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": ":".join(filter(None, [_PACKAGE_FOLDER, path]))}
