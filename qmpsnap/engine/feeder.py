"""The process that brings a guest its RAM while it runs, and that the engine may die without.

It is told over its standard input, in JSON, what to bring (`Order`), and later that the guest is
let run; it tells there in lines (`Said`) how far it is, to whoever listens yet. When it ends before
its time, the guest waits at the pages that it lacks, and another one goes on from the note.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec

from qmpsnap.engine import arrivals
from qmpsnap.engine.demand import Demand, coming
from qmpsnap.engine.orders import GO, Order, Said
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import (
    UNREADABLE,
    CommandRefused,
    Failed,
    GuestLacksPages,
    MonitorAbsent,
    MonitorError,
    QemuGone,
    SnapError,
)
from qmpsnap.host import process as host_process
from qmpsnap.hypervisor.machine import spare
from qmpsnap.hypervisor.monitor import connect
from qmpsnap.hypervisor.vmstate import migration, postcopy, source
from qmpsnap.store import wire
from qmpsnap.store.keyring import Trusting
from qmpsnap.store.layout import LocalRoot, StoreRoot
from qmpsnap.store.remote import Store
from qmpsnap.store.signature import Trust

_TELL_EVERY = 0.1  # seconds
_WRITE_EVERY = 0.5
_ENDS_WITHIN = 1.0  # a QEMU that has closed our wire
_SAYS_WITHIN = 2.0  # its main loop may wait for a page as well
_UNHEARD = 1 << 16  # bytes that nobody has read yet: no more is said of progress then


class _Feeder:
    def __init__(self, order: Order, ours: asyncio.StreamWriter) -> None:
        self._order, self._ours = order, ours
        self._arrival = arrivals.read(Path(order.note))
        local, keys = LocalRoot(Path(order.local)), Path(order.keys) if order.keys else None
        self._roots = Roots(
            local,
            Store(
                StoreRoot(Path(order.store)),
                order.within,
                command=order.command,
                trust=_trusting(order.trust, self._arrival),
                keys=keys or local.keys,
            ),
            keys=keys,
        )
        self._told_at = 0.0
        self._now = (0, 0, "")
        self.runs = order.wire is None
        """The guest may run, and needs us."""

    async def bring(self, go: Callable[[], Awaitable[None]]) -> None:
        """Until all is there. Raises SnapError; *go* returns when the guest is let run."""
        pair = await asyncio.to_thread(arrivals.pair_of, self._roots, self._arrival)
        async with (
            coming(pair, Path(self._arrival.images), self._trouble) as pages,
            self._written(),
        ):
            try:
                stream = Path(self._arrival.images) / arrivals.STREAM
                if self._order.wire is None:
                    await self._instead(stream, pages)
                else:
                    await self._first(self._order.wire, stream, pages, go)
            except GuestLacksPages as lacks:
                raise (pages.failed or lacks) from lacks

    async def _first(
        self, number: int, stream: Path, pages: Demand, go: Callable[[], Awaitable[None]]
    ) -> None:
        async def ready() -> None:
            self._say(Said(step="ready"))

        async def loaded() -> None:
            self._say(Said(step="loaded"))
            await go()
            self.runs = True

        with socket.socket(fileno=number) as ours:
            await source.play(
                ours, stream, pages, reach=ready,
                on_loaded=loaded, words=self._words, on_progress=self._progress,
            )  # fmt: skip

    async def _instead(self, stream: Path, pages: Demand) -> None:
        """In the place of one that has died."""

        async def reach() -> None:
            async with self._urgently() as urgently:
                await postcopy.recovering(urgently, f"unix:{place}")
            ours.connect(str(place))

        async def taken() -> None:
            self._say(Said(step="taken"))

        with socket.socket(socket.AF_UNIX) as ours, _meeting() as place:
            try:
                await source.take_over(
                    ours, stream, pages, reach=reach,
                    on_taken=taken, words=self._words, on_progress=self._progress,
                )  # fmt: skip
            except CommandRefused as refused:
                if await self._words() != "completed":
                    told = f"QEMU takes no pages from a new source: {refused}"
                    raise GuestLacksPages(told) from refused
                await taken()  # it was killed when all was there

    async def end(self) -> None:
        """All is there: QEMU is as any other one, and nothing tells of us any more."""
        with suppress(MonitorAbsent, MonitorError, TimeoutError):
            async with asyncio.timeout(_SAYS_WITHIN), self._spare() as session:
                await postcopy.over(session.ask)
        await self.clear()
        self._say(Said(step="done"))

    async def clear(self) -> None:
        """There is nothing to go on with."""
        with suppress(MonitorAbsent):
            async with self._spare() as session:
                session.hang_up()
        await asyncio.to_thread(arrivals.over, Path(self._order.note), self._arrival)

    async def fail(self, why: SnapError) -> None:
        """Tell it, and leave no more than another one needs to go on."""
        if self.runs and not isinstance(why, QemuGone):
            done, total, _ = self._now
            await asyncio.to_thread(arrivals.tell, self._arrival, done, total, str(why))
        else:
            await self.clear()
        self._say(Said(failed=wire.trouble(why)))

    @asynccontextmanager
    async def _spare(self) -> AsyncIterator[spare.Session]:
        """Raises MonitorAbsent: it was given none, or we may not have it, or QEMU has ended."""
        one = self._arrival
        if one.spare is None or not await asyncio.to_thread(host_process.still_runs, one.process):
            raise MonitorAbsent(f"process {one.process.pid} has no spare monitor")
        with spare.taken(one.process.pid, one.spare) as session:
            yield session

    @asynccontextmanager
    async def _urgently(self) -> AsyncIterator[postcopy.Ask]:
        try:
            async with self._spare() as session:
                yield partial(session.ask, urgently=True)
                return
        except MonitorAbsent:
            pass
        async with connect(Path(self._arrival.qmp), within=_SAYS_WITHIN) as monitor:
            yield monitor.urgently

    async def _words(self) -> str:
        """What QEMU says of its migration, if it does. Raises QemuGone."""
        known = self._arrival.process
        if await asyncio.to_thread(host_process.ends, known, _ENDS_WITHIN):
            raise QemuGone(f"QEMU has ended: process {known.pid}")
        with suppress(SnapError, TimeoutError):
            async with (
                asyncio.timeout(_SAYS_WITHIN),
                connect(Path(self._arrival.qmp), within=_SAYS_WITHIN) as monitor,
            ):
                now = await migration.query(monitor)
                return now.error_desc or str(now.status)
        return "the connection was cut"

    def _progress(self, done: int, total: int) -> None:
        self._now = (done, total, self._now[2])
        now = asyncio.get_running_loop().time()
        if now - self._told_at < _TELL_EVERY and done < total:
            return
        self._told_at = now
        self._say(Said(done=done, total=total))

    def _trouble(self, text: str) -> None:
        if text != self._now[2]:
            self._now = (*self._now[:2], text)
            if text:
                self._say(Said(warning=f"the guest waits for its pages: {text}"))

    @asynccontextmanager
    async def _written(self) -> AsyncIterator[None]:
        """In the block `arriving.json` says how far it is."""

        async def write() -> None:
            last = None
            while True:
                if self._now != last:
                    last = self._now
                    await asyncio.to_thread(arrivals.tell, self._arrival, *last)
                await asyncio.sleep(_WRITE_EVERY)

        writing = asyncio.create_task(write())
        try:
            yield
        finally:
            writing.cancel()
            await asyncio.wait([writing])

    def _say(self, line: Said) -> None:
        transport = self._ours.transport
        if transport.is_closing() or (line.total and transport.get_write_buffer_size() > _UNHEARD):
            return
        self._ours.write(msgspec.json.encode(line) + b"\n")


def _trusting(trust: Trust | None, arrival: arrivals.Arrival) -> Trusting | None:
    """What is trusted all the while that RAM comes: also what whoever restored has accepted."""
    if trust is None:
        return None
    accepted = dict.fromkeys([*trust.accepted, *arrival.insecure])
    ours = Trust(keys=trust.keys, accepted=list(accepted))
    return lambda: ours


@contextmanager
def _meeting() -> Iterator[Path]:
    """A path for a socket: short enough, and ours alone."""
    with tempfile.TemporaryDirectory(prefix="qmpsnap-") as folder:
        yield Path(folder) / "pages"


def understood(line: bytes) -> Order:
    """The order in *line*. Raises Failed."""
    try:
        return msgspec.json.decode(line, type=Order)
    except UNREADABLE as odd:
        raise Failed(f"an order that is not understood: {odd}") from odd


async def _fed() -> None:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=os.dup(0)))
    line = await reader.readline()
    if not line:
        return  # it was not needed after all
    feeder = _Feeder(understood(line), writer)
    told = asyncio.Event()

    async def heard() -> None:
        """Returns when the engine has gone before it let the guest run."""
        if await reader.readline() == GO:
            told.set()
            await asyncio.Event().wait()

    async def go() -> None:
        await told.wait()

    bringing = asyncio.create_task(feeder.bring(go))
    hearing = asyncio.create_task(heard())
    waiting = {bringing} if feeder.runs else {bringing, hearing}
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    hearing.cancel()
    try:
        if not bringing.done():
            bringing.cancel()
            await asyncio.wait([bringing])
            raise Failed("the restore was given up")
        await bringing
        await feeder.end()
    except SnapError as failed:
        await feeder.fail(failed)
    except OSError as failed:
        await feeder.fail(GuestLacksPages(f"the guest has not got all of its RAM: {failed}"))
    with suppress(OSError):
        writer.close()
        await writer.wait_closed()


def main() -> int:
    try:
        asyncio.run(_fed())
    except Failed as failed:
        sys.stderr.write(f"{failed}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
