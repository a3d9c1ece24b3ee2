"""A guest that is brought its RAM while it runs, by a process that needs us no more then."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from qmpsnap.engine import arrivals
from qmpsnap.engine.arrivals import Arrival
from qmpsnap.engine.feedertalk import LEAVES_WITHIN, FeederLost, Talk, started
from qmpsnap.engine.half import Pair
from qmpsnap.engine.orders import GO
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import (
    Failed,
    HalfMissing,
    LocalFailed,
    QemuGone,
    SnapError,
    StoreError,
    VmBusy,
)
from qmpsnap.host import process as host_process
from qmpsnap.hypervisor.machine.launch import Launched
from qmpsnap.hypervisor.vmstate.session import Progress
from qmpsnap.shield import finish

log = logging.getLogger(__name__)
_LOOK_AGAIN = 0.5  # seconds
_ASK_AGAIN = 5.0


class Feeder:
    """Brings the RAM of *pair* into a machine; *theirs* is QEMU's end of the migration."""

    def __init__(
        self, pair: Pair, note: Path, talk: Talk, ours: int, theirs: socket.socket
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
        await self._until("ready")

    async def loaded(self) -> None:
        """Returns when QEMU has all but the pages. Raises MigrationFailed, QemuGone."""
        await self._until("loaded")

    async def _until(self, step: str) -> None:
        try:
            await self._talk.until(step)
        except FeederLost as lost:
            raise Failed(str(lost)) from lost  # no guest runs yet

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
        insecure=list(pair.roots.insecure),
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
            talk = await started(note, lock, wire=ours.fileno())
        finally:
            os.close(lock)
        number = ours.fileno()
        ours.close()
        feeder = Feeder(pair, note, talk, number, theirs)
        try:
            yield feeder
        finally:
            ending = feeder.left() if feeder.remaining else feeder.ended()
            await finish(ending, within=LEAVES_WITHIN + 5)


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


async def _resumed(roots: Roots, note: Path) -> Talk | None:
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
        talk = await started(note, lock)
    finally:
        os.close(lock)
    try:
        await talk.order(roots, note, None)
        await talk.until("taken")
    except BaseException:
        await talk.left(waiting=False)
        raise
    return talk
