"""The engine's end of the watchdog: a process that pays for us when we no longer can.

The other end is `rescuer.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from qmpsnap.errors import Failed, LocalFailed
from qmpsnap.private import opener
from qmpsnap.shield import finish

_TAKEN_WITHIN = 3.0  # seconds
_ENDED_WITHIN = 2.0
_RESCUER = Path(__file__).with_name("rescuer.py")


class Debt:
    """What is owed while a block lasts. *settled* is set by whoever has seen it paid."""

    def __init__(self, owner: Watchdog, kinds: frozenset[str], within: float) -> None:
        self._owner, self.kinds, self._within = owner, kinds, within
        self.deadline = time.monotonic() + within
        self.settled = False

    async def renew(self) -> None:
        """Say that the engine is alive: the deadline counts from now on. Cheap; call often."""
        if self.deadline - time.monotonic() < self._within - 1:
            self.deadline = time.monotonic() + self._within
            await self._owner.tell()


class Watchdog:
    """The engine's end. Nothing is owed until the first `owing`."""

    def __init__(
        self,
        pid: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        wire: socket.socket,
    ) -> None:
        self.pid = pid
        self._reader, self._writer, self._wire = reader, writer, wire
        self._debts: list[Debt] = []
        self._turn = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def owing(self, *kinds: str, within: float) -> AsyncIterator[Debt]:
        """For the block *kinds* are owed: `cont`, `thaw`, and `cancel` (of a migration of ours).

        The other end has taken it before the block begins. It pays when the engine dies, or does
        not renew or end the block within *within* seconds. A block that fails before the debt is
        *settled* leaves it standing: then it is paid when the engine's watch ends.

        Raises Failed when the other end has gone: without it nothing may be owed.
        """
        debt = Debt(self, frozenset(kinds), within)
        self._debts.append(debt)
        try:
            await self._begin(debt)
            yield debt
            debt.settled = True
        finally:
            if debt.settled:
                await finish(self._paid(debt), within=5)

    def may_cut(self, connection: int) -> None:
        """Hand over *connection*, a session with the agent, to be cut when a debt is called in.

        The agent's socket serves one client: if we hang, nobody else could thaw. It takes some
        microseconds, and nothing is waited for. Whoever ends that session must shut it down, since
        the other end holds it too.
        """
        self._hand_over("agent", connection)

    def may_cut_monitor(self, connection: int) -> None:
        """As `may_cut`, for a session with QEMU that takes the place of the first one."""
        self._hand_over("qmp", connection)

    def _hand_over(self, kind: str, connection: int) -> None:
        with contextlib.suppress(OSError):  # it has ended: what is owed next says so
            line = json.dumps({"cut": kind}).encode() + b"\n"
            socket.send_fds(self._wire, [line], [connection])

    async def _begin(self, debt: Debt) -> None:
        debt.settled = True  # nothing was done to the guest yet
        if not await self.tell():
            raise Failed("the watchdog has ended, and without it the guest is not held")
        debt.settled = False

    async def _paid(self, debt: Debt) -> None:
        self._debts.remove(debt)
        await self.tell()

    async def tell(self) -> bool:
        """Send the sum of what is owed; whether it was taken.

        It is not when the other end has fired: it cut our connection then, and the engine sees.
        """
        left = min((debt.deadline for debt in self._debts), default=0) - time.monotonic()
        owed = frozenset().union(*(debt.kinds for debt in self._debts))
        message = {"within": left, "owed": sorted(owed)} if owed else {}
        async with self._turn:
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(_TAKEN_WITHIN):
                    self._writer.write(json.dumps(message).encode() + b"\n")
                    await self._writer.drain()
                    return bool(await self._reader.readline())
            return False


def _opened(log: Path) -> BinaryIO:
    try:
        return open(log, "ab", opener=opener)
    except OSError as failed:
        raise LocalFailed(f"{log}: {failed.strerror}") from failed


@contextlib.asynccontextmanager
async def watching(
    qmp: Path, agent: Path | None, *, connection: int, log: Path
) -> AsyncIterator[Watchdog]:
    """A watchdog for the block, over the VM at *qmp*; *connection* is the engine's QMP socket.

    What it had to do is appended to *log* when it is done. Raises LocalFailed without that file.
    """
    ours, theirs = socket.socketpair()
    try:
        with theirs, _opened(log) as report:
            starting = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-I", "-S", str(_RESCUER), str(qmp), str(agent or ""), str(connection)),
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=report,
                pass_fds=(connection,),
                start_new_session=True,  # out of the reach of Ctrl-C and of kill -PGID
            )
        await starting.wait()  # it goes on as nobody's child: it may have to outlive us
    except BaseException:
        ours.close()
        raise
    reader, writer = await asyncio.open_connection(sock=ours)
    try:
        yield Watchdog(int(await reader.readline() or b"0"), reader, writer, ours)
    finally:
        with contextlib.suppress(ConnectionError, TimeoutError):
            writer.write_eof()
            # it holds our connection too: QEMU sees that end only when it has ended; one that
            # is paying a debt is left to it
            async with asyncio.timeout(_ENDED_WITHIN):
                await reader.read()
        writer.close()
