"""The engine's end of the process that brings a guest its RAM: the only place that starts it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec

from qmpsnap.engine import arrivals
from qmpsnap.engine.arrivals import Arrival
from qmpsnap.engine.half import Pair
from qmpsnap.engine.orders import GO, Order, Said
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import (
    Blocked,
    Failed,
    GuestLacksPages,
    HalfMissing,
    LocalFailed,
    MigrationFailed,
    MonitorLost,
    QemuGone,
    SnapError,
    StoreError,
    StreamUnknown,
    VmBusy,
)
from qmpsnap.host import process as host_process
from qmpsnap.hypervisor.machine.launch import Launched
from qmpsnap.hypervisor.vmstate.session import Progress
from qmpsnap.shield import finish
from qmpsnap.store import wire
from qmpsnap.store.talk import environment

log = logging.getLogger(__name__)
# A child of nobody; a shell gives what it leaves behind no stdin, so it has what is its stdout
_BEGIN = ("/bin/sh", "-c", '"$@" <&1 &', "sh")
_FEEDER = (sys.executable, "-P", "-m", "qmpsnap.engine.feeder")
_LEAVES_WITHIN = 10.0  # seconds: it removes what it has filled
_LOOK_AGAIN = 0.5
_ASK_AGAIN = 5.0
_KINDS: dict[str, type[SnapError]] = {
    kind("").code: kind
    for kind in (
        Blocked, Failed, GuestLacksPages, MigrationFailed, MonitorLost, QemuGone, StreamUnknown,
        VmBusy,
    )
}  # fmt: skip


class FeederLost(Failed):
    """The process that brought the RAM has ended without a word."""


class _Talk:
    """A feeder, and what it says."""

    def __init__(
        self, log: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._log, self._reader, self._writer = log, reader, writer

    async def order(self, roots: Roots, note: Path, wire: int | None) -> None:
        store = roots.store
        order = Order(
            note=str(note), local=str(roots.local.path), store=str(store.root.path),
            within=store.within, command=list(store.command), wire=wire,
        )  # fmt: skip
        self._writer.write(msgspec.json.encode(order) + b"\n")

    def say(self, line: bytes) -> None:
        self._writer.write(line)

    async def until(self, step: str, on_progress: Progress | None = None) -> None:
        """Returns at that *step*. Raises what it says that went wrong, FeederLost."""
        while True:
            try:
                line = await self._reader.readline()
            except ConnectionError:
                line = b""
            if not line:
                words = await asyncio.to_thread(_last_words, self._log)
                raise FeederLost(f"the process that brought the RAM has ended{words}")
            said = msgspec.json.decode(line, type=Said)
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
                async with asyncio.timeout(_LEAVES_WITHIN):
                    while await self._reader.read(1 << 16):
                        pass
            self._writer.close()


class Feeder:
    """Brings the RAM of *pair* into a machine; *theirs* is QEMU's end of the migration."""

    def __init__(
        self, pair: Pair, note: Path, talk: _Talk, ours: int, theirs: socket.socket
    ) -> None:
        self._pair, self.note, self._talk, self._ours, self.theirs = pair, note, talk, ours, theirs
        self.remaining = False
        """Whether it goes on when we end."""

    async def order(self, to: Path, images: Path, process: Launched) -> None:
        """Write down what is to come into *process*, and let it be brought.

        *images*: a folder with the small stream, which the page images will be in. Raises
        LocalFailed.
        """
        facts = await asyncio.to_thread(host_process.describe, process.pid)
        known = host_process.identified(facts)
        assert known is not None
        self._process = known
        arrival = _arrival(self._pair, to, images, process, known)
        await asyncio.to_thread(arrivals.note, self.note, self._pair, arrival)
        await self._talk.order(self._pair.roots, self.note, self._ours)

    async def ready(self) -> None:
        """Returns when QEMU may read. Raises DamagedData, StoreError, LocalFailed."""
        await self._talk.until("ready")

    async def loaded(self) -> None:
        """Returns when QEMU has all but the pages. Raises MigrationFailed, QemuGone."""
        await self._talk.until("loaded")

    def go(self) -> None:
        """The guest is let run: from now on the RAM is brought whatever becomes of us."""
        self._talk.say(GO)

    async def arrived(self, on_progress: Progress) -> None:
        """Returns when all RAM is there. Raises DamagedData, GuestLacksPages, QemuGone.

        Another one goes on where ours was killed.
        """
        while True:
            try:
                await self._talk.until("done", on_progress)
            except FeederLost as lost:
                log.warning("%s: another one goes on", lost)
                if not await self._again():
                    return
            else:
                return

    async def _again(self) -> bool:
        """Whether there is one that brings what is missing, and anything missing."""
        await self._talk.left(waiting=False)
        while True:
            try:
                talk = await _resumed(self._pair.roots, self.note)
            except VmBusy:
                await asyncio.sleep(_LOOK_AGAIN)  # somebody else was first: let him
                continue
            except (StoreError, HalfMissing) as dead:
                log.warning("the guest waits for its pages: %s", dead)
                await asyncio.sleep(_ASK_AGAIN)
                continue
            if talk is not None:
                self._talk = talk
            elif not await asyncio.to_thread(host_process.still_runs, self._process):
                raise QemuGone("QEMU has ended")
            return talk is not None

    async def ended(self) -> None:
        """It has ended, and left nothing; done twice, it does nothing."""
        await self._talk.left(waiting=True)
        with suppress(SnapError):  # it has removed all that; unless it was killed
            one = await asyncio.to_thread(arrivals.read, self.note)
            await asyncio.to_thread(arrivals.over, self.note, one)
        await asyncio.to_thread(arrivals.unlocked, self.note)

    async def left(self) -> None:
        await self._talk.left(waiting=False)


def _arrival(
    pair: Pair, to: Path, images: Path, process: Launched, known: host_process.ProcessFacts
) -> Arrival:
    folder, filled, qmp = (str(one.absolute()) for one in (to, images, process.qmp))
    return Arrival(
        id=pair.id, vm=pair.vm, folder=folder, images=filled, qmp=qmp,
        process=known, spare=process.spare, seal=pair.seal, spooled=pair.spooled,
    )  # fmt: skip


@asynccontextmanager
async def begun(pair: Pair, to: Path) -> AsyncIterator[Feeder]:
    """A feeder for the machine that is about to be started in *to*: it starts at the same time.

    It has ended after the block, and what it filled is gone, unless it is `remaining`; who has let
    it `go` ends QEMU before. Raises LocalFailed, VmBusy.
    """
    note = arrivals.place(pair.roots.local, pair.vm, to)
    lock = await asyncio.to_thread(arrivals.taken, note, "restore")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            talk = await _started(note, lock, wire=ours.fileno())
        finally:
            os.close(lock)
        number = ours.fileno()
        ours.close()
        feeder = Feeder(pair, note, talk, number, theirs)
        try:
            yield feeder
        finally:
            ending = feeder.left() if feeder.remaining else feeder.ended()
            await finish(ending, within=_LEAVES_WITHIN + 5)


async def resumed(roots: Roots, note: Path) -> str:
    """Let the RAM that *note* tells of come again, if nobody brings it; what was done, in words.

    Empty if somebody does. Raises GuestLacksPages, DamagedData, StoreError, LocalFailed.
    """
    try:
        talk = await _resumed(roots, note)
    except VmBusy:
        return ""
    if talk is None:
        return "QEMU has ended: what was left of its page images was removed"
    await talk.left(waiting=False)
    return "its pages come again"


async def _resumed(roots: Roots, note: Path) -> _Talk | None:
    """A feeder that QEMU takes pages from again; None where there is nothing to bring any more.

    Raises VmBusy where there is one.
    """
    lock = await asyncio.to_thread(arrivals.taken, note, "recover")
    try:
        try:
            arrival = await asyncio.to_thread(arrivals.read, note)
        except LocalFailed:
            await asyncio.to_thread(arrivals.unlocked, note)
            return None
        if not await asyncio.to_thread(host_process.still_runs, arrival.process):
            await asyncio.to_thread(arrivals.over, note, arrival)
            return None
        talk = await _started(note, lock)
    finally:
        os.close(lock)
    try:
        await talk.order(roots, note, None)
        await talk.until("taken")
    except BaseException:
        await talk.left(waiting=False)
        raise
    return talk


async def _started(note: Path, lock: int, *, wire: int | None = None) -> _Talk:
    """A feeder that waits for its order. It has the *lock*, and our end of the *wire*."""
    ours, theirs = socket.socketpair()
    try:
        with theirs, note.with_suffix(".log").open("ab") as errors:
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
    return _Talk(note.with_suffix(".log"), *await asyncio.open_connection(sock=ours))


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()[-1:]
    except OSError:
        lines = []
    return "".join(f": {line}" for line in lines)
