"""A talk with the store's worker: the only place that starts that process, and leaves it."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from qmpsnap.errors import UNREADABLE, StoreError, StoreStalled
from qmpsnap.store import wire
from qmpsnap.store.files import Progress

T = TypeVar("T")
_PACKAGE_FOLDER = str(Path(__file__).resolve().parents[2])
_LEAVE_WITHIN = 1.0


class Talk:
    """Questions, one after the other, to a worker that is started for the first of them.

    *within*: seconds without any progress after which it is killed, and left behind if even that
    does not end it; so it is when somebody is cancelled who asks. *pass_fds* are inherited by it.
    """

    def __init__(
        self, command: Sequence[str], store: str, within: float, *, pass_fds: tuple[int, ...] = ()
    ) -> None:
        self._command, self._store, self._within = command, store, within
        self._pass_fds = pass_fds
        self._turn = asyncio.Lock()
        self._process: tuple[asyncio.SubprocessTransport, _Lines] | None = None

    async def ask(self, request: wire.AnyRequest, on_progress: Progress | None) -> msgspec.Raw:
        """The worker's answer. Raises StoreStalled, StoreError, and what the worker says."""
        async with self._turn:
            transport, lines = self._process or await self._started()
            done = False
            try:
                pipe = transport.get_pipe_transport(0)
                pipe.write(msgspec.json.encode(request) + b"\n")  # type: ignore[union-attr]
                answer = await self._answer(lines, on_progress)
                done = True
            except wire.Told as told:
                done = True
                raise told.error from None
            else:
                return answer
            finally:
                if not done:
                    # a process in D state takes the signal only when the mount lets go of it
                    with suppress(ProcessLookupError):
                        transport.kill()
                    await self.end()

    async def end(self) -> None:
        """Leave the worker, if there is one; it is waited for a moment, and no longer."""
        if self._process is None:
            return
        (transport, lines), self._process = self._process, None
        try:
            transport.get_pipe_transport(0).close()  # type: ignore[union-attr]
            with suppress(TimeoutError):
                async with asyncio.timeout(_LEAVE_WITHIN):
                    await lines.gone.wait()
        finally:
            transport.close()

    async def _started(self) -> tuple[asyncio.SubprocessTransport, _Lines]:
        self._process = await asyncio.get_running_loop().subprocess_exec(
            _Lines, *self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, pass_fds=self._pass_fds, env=environment(),
        )  # fmt: skip
        return self._process

    async def _answer(self, lines: _Lines, on_progress: Progress | None) -> msgspec.Raw:
        while True:
            try:
                async with asyncio.timeout(self._within):
                    text = await lines.queue.get()
            except TimeoutError:
                raise StoreStalled(
                    f"the store {self._store} made no progress for {self._within:g} s"
                ) from None
            if text is None:
                said = lines.complaint.decode(errors="replace").strip().splitlines()[-1:]
                raise StoreError(f"the store's worker ended without an answer: {''.join(said)}")
            line = understood(text, wire.Line)
            if line.error is not None:
                raise wire.Told(wire.error(line.error))
            if bytes(line.result):
                return line.result
            if line.progress is not None and on_progress is not None:
                on_progress(line.progress.done, line.progress.total, line.progress.what)


class _Lines(asyncio.SubprocessProtocol):
    """The worker's lines, in order; None once there will be no more."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.complaint = b""
        self.gone = asyncio.Event()
        self._rest: list[bytes] = []

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd != 1:
            self.complaint = (self.complaint + data)[-4096:]
            return
        *lines, rest = data.split(b"\n")
        for line in lines:
            self.queue.put_nowait(b"".join([*self._rest, line]))
            self._rest.clear()
        self._rest.append(rest)  # joined once: a catalogue is a line of some MiB

    def connection_lost(self, exc: Exception | None) -> None:
        self.queue.put_nowait(None)

    def process_exited(self) -> None:
        self.gone.set()


def understood(said: bytes | msgspec.Raw, kind: type[T]) -> T:
    """What the worker says, as *kind*. Raises StoreError."""
    try:
        return msgspec.json.decode(said, type=kind)
    except UNREADABLE as odd:
        raise StoreError(f"the store's worker is not understood: {odd}") from odd


def environment() -> dict[str, str]:
    """That of a Python process that finds this package where we found it."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": ":".join(filter(None, [_PACKAGE_FOLDER, path]))}
