"""A talk with the process that brings a guest its RAM: the only place that starts it."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from qmpsnap.engine.orders import Order, Said
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import (
    UNREADABLE,
    Failed,
    GuestLacksPages,
    MigrationFailed,
    MonitorAbsent,
    MonitorBusy,
    MonitorLost,
    QemuGone,
    SnapError,
    StreamUnknown,
)
from qmpsnap.hypervisor.vmstate.session import Progress
from qmpsnap.private import opener
from qmpsnap.store import wire
from qmpsnap.store.talk import environment

log = logging.getLogger(__name__)
# A child of nobody; a shell gives what it leaves behind no stdin, so it has what is its stdout
_BEGIN = ("/bin/sh", "-c", '"$@" <&1 &', "sh")
_FEEDER = (sys.executable, "-P", "-m", "qmpsnap.engine.feeder")
LEAVES_WITHIN = 10.0
"""Seconds in which it removes what it has filled, and ends."""
_KINDS: dict[str, type[SnapError]] = {
    kind("").code: kind
    for kind in (
        Failed, GuestLacksPages, MigrationFailed, MonitorAbsent, MonitorBusy, MonitorLost, QemuGone,
        StreamUnknown,
    )
}  # fmt: skip


class FeederLost(Failed):
    """The process that brought the RAM has ended without a word."""


class Talk:
    """A feeder, and what it says."""

    def __init__(
        self, log: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._log, self._reader, self._writer = log, reader, writer

    async def order(self, roots: Roots, note: Path, wire: int | None) -> None:
        store, trust = roots.store, await asyncio.to_thread(roots.trust)
        order = Order(
            note=str(note), local=str(roots.local.path), store=str(store.root.path),
            within=store.within, command=list(store.command), wire=wire,
            trust=trust, keys=str(roots.keys) if roots.keys is not None else None,
        )  # fmt: skip
        self._writer.write(msgspec.json.encode(order) + b"\n")

    def say(self, line: bytes) -> None:
        self._writer.write(line)

    async def until(self, step: str, on_progress: Progress | None = None) -> None:
        """Returns at that *step*. Raises what it says that went wrong, FeederLost."""
        while True:
            try:
                line = await self._reader.readline()
            except (ConnectionError, ValueError):  # or a line without end
                line = b""
            if not line:
                words = await asyncio.to_thread(_last_words, self._log)
                raise FeederLost(f"the process that brought the RAM has ended{words}")
            try:
                said = msgspec.json.decode(line, type=Said)
            except UNREADABLE as odd:
                raise FeederLost(f"what brings the RAM is not understood: {odd}") from odd
            if said.failed is not None:
                kind = _KINDS.get(said.failed.code)
                if kind is None:
                    raise wire.error(said.failed)
                raise kind(said.failed.message, hint=said.failed.hint)
            if said.warning:
                log.warning("%s", said.warning)
            if said.total and on_progress is not None:
                on_progress(said.done, said.total)
            if said.step == step:
                return

    async def left(self, *, waiting: bool) -> None:
        """Let it go; *waiting*: until it has ended."""
        with suppress(OSError, TimeoutError):
            if waiting:
                self._writer.write_eof()
                async with asyncio.timeout(LEAVES_WITHIN):
                    while await self._reader.read(1 << 16):
                        pass
            self._writer.close()


def _log(note: Path) -> BinaryIO:
    return open(note.with_suffix(".log"), "ab", opener=opener)


async def started(note: Path, lock: int, *, wire: int | None = None) -> Talk:
    """A feeder that waits for its order. It has the *lock*, and our end of the *wire*."""
    ours, theirs = socket.socketpair()
    try:
        with theirs, _log(note) as errors:
            starting = await asyncio.create_subprocess_exec(
                *_BEGIN,
                *_FEEDER,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=errors,
                pass_fds=(lock, *([wire] if wire is not None else [])),
                cwd="/",  # it keeps nobody's folder busy
                start_new_session=True,  # out of the reach of Ctrl-C and of kill -PGID
                env=environment(),
            )
            await starting.wait()
    except BaseException:
        ours.close()
        raise
    return Talk(note.with_suffix(".log"), *await asyncio.open_connection(sock=ours))


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()[-1:]
    except OSError:
        lines = []
    return "".join(f": {line}" for line in lines)
