"""What goes wrong in a soak: each fault on a real part, and whether it was felt."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.rig.console import CommandFailed
from tests.rig.graph import ask
from tests.rig.wire import Fault
from tests.soak.plot import VM, Plot, Ran

Process = asyncio.subprocess.Process
_COMMANDS = [
    "blockdev-add", "stop", "transaction", "cont", "getfd", "migrate", "query-migrate",
    "migrate-set-capabilities", "nbd-server-start", "block-export-add", "block-export-del",
    "block-commit", "job-complete", "job-dismiss", "blockdev-del", "block-dirty-bitmap-remove",
    "query-jobs", "query-named-block-nodes", "query-status",
]  # fmt: skip
_HELD = ["stop", "transaction", "cont", "query-status", "migrate"]
_DEADLINE = 17.0  # seconds: --max-pause of a soak, and the watchdog's margin


@dataclass
class Blow:
    """One fault that is to come. *codes*: the exit codes that the verb may have then."""

    name: str
    codes: frozenset[int]
    felt: Callable[[Ran], bool] = lambda _: True
    before: Callable[[], None] | None = None
    until: Callable[[], Awaitable[None]] | None = None
    """What has to be waited for when the verb has ended."""
    quit: bool = False
    """QEMU is gone: *tops* are the files that its disks had then."""
    tops: dict[str, list[Path]] = field(default_factory=dict)


Struck = AsyncIterator[tuple[Blow, Callable[[Process], Coroutine[Any, Any, None]]]]
_UNHURT = {0, 3, 4, 5}


def names() -> list[str]:
    return list(_TABLE)


@contextlib.asynccontextmanager
async def struck(
    name: str, plot: Plot, dice: random.Random, lasts: float
) -> AsyncIterator[tuple[Blow, Callable[[Process], None]]]:
    """The fault *name* for the block: with what the process needs, and what to call with it.

    *lasts*: how many seconds the verb takes when nothing is wrong. All is well again afterwards.
    """
    async with _TABLE[name](name, plot, dice, lasts) as (blow, strike):
        tasks: list[asyncio.Task[None]] = []
        yield blow, lambda process: tasks.append(asyncio.ensure_future(strike(process)))
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@contextlib.asynccontextmanager
async def _killed(name: str, plot: Plot, dice: random.Random, lasts: float) -> Struck:
    async def strike(process: Process) -> None:
        await asyncio.sleep(dice.uniform(0.2, lasts))
        _signal(process, signal.SIGKILL)

    yield Blow(name, frozenset({0, -9}), lambda ran: ran.code == -9), strike


@contextlib.asynccontextmanager
async def _killed_at(name: str, plot: Plot, dice: random.Random, lasts: float) -> Struck:
    async def strike(process: Process) -> None:
        plot.wire.arm(
            Fault(
                _at(dice),
                delivered=dice.random() < 0.6,
                then=lambda: _signal(process, signal.SIGKILL),
            )
        )

    with _rewired(plot):
        yield Blow(name, frozenset({0, -9}), lambda ran: ran.code == -9), strike


@contextlib.asynccontextmanager
async def _stopped(name: str, plot: Plot, dice: random.Random, lasts: float) -> Struck:
    """The engine hangs, past the watchdog's deadline, at a command that holds the guest."""
    happened = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def strike(process: Process) -> None:
        def then() -> None:
            _signal(process, signal.SIGSTOP)
            loop.call_soon_threadsafe(happened.set)

        plot.wire.arm(Fault(dice.choice(_HELD), held=True, then=then))
        plot.wire.release()
        try:
            await happened.wait()
            await asyncio.sleep(_DEADLINE)
        finally:
            _signal(process, signal.SIGCONT)

    with _rewired(plot):
        yield Blow(name, frozenset(_UNHURT | {6}), lambda _: happened.is_set()), strike


@contextlib.asynccontextmanager
async def _told_to_end(name: str, plot: Plot, dice: random.Random, lasts: float) -> Struck:
    async def strike(process: Process) -> None:
        number = dice.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        await asyncio.sleep(dice.uniform(0.4, lasts))
        for _ in range(dice.randint(1, 3)):
            _signal(process, number)
            await asyncio.sleep(dice.uniform(0, 0.2))

    # before Python has begun to hear them, they end it as they end any process
    codes = {130, 143, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}
    yield Blow(name, frozenset({0, 5} | codes), lambda ran: ran.code in codes), strike


@contextlib.asynccontextmanager
async def _cut(name: str, plot: Plot, dice: random.Random, lasts: float) -> Struck:
    async def strike(process: Process) -> None:
        plot.wire.arm(Fault(_at(dice), delivered=dice.random() < 0.6, dead=dice.random() < 0.3))

    with _rewired(plot):
        happened = plot.wire.happened
        yield Blow(name, frozenset(_UNHURT | {6}), lambda _: happened.is_set()), strike


@contextlib.asynccontextmanager
async def _agent(name: str, plot: Plot, dice: random.Random, lasts: float) -> Struck:
    async def strike(process: Process) -> None:
        await asyncio.sleep(dice.choice([0, dice.uniform(0.3, lasts)]))
        plot.line.fails(name.removeprefix("agent "))

    try:
        yield Blow(name, frozenset(_UNHURT | {6}), lambda _: plot.line.happened > 0), strike
    finally:
        plot.line.fails("")


@contextlib.asynccontextmanager
async def _agent_dies(name: str, plot: Plot, dice: random.Random, lasts: float) -> Struck:
    died = False

    async def strike(process: Process) -> None:
        nonlocal died
        await asyncio.sleep(dice.uniform(0.3, lasts))
        with contextlib.suppress(TimeoutError, CommandFailed):
            async with plot.console() as console:
                await console.run("killall -9 qemu-ga", within=20)
            died = True

    yield Blow(name, frozenset(_UNHURT | {6}), lambda _: died), strike


@contextlib.asynccontextmanager
async def _store(name: str, plot: Plot, dice: random.Random, lasts: float) -> Struck:
    how = {
        "store hangs": "hang",
        "store EIO": f"write {dice.choice([0, 4096, 1 << 20, 8 << 20])}",
        "store fsync": "fsync 0",
        "store full": "full",
        "store read-only": "readonly",
        "store slow": "slow 0.03",
    }[name]

    async def strike(process: Process) -> None:
        await asyncio.sleep(dice.choice([0, dice.uniform(0.3, lasts)]))
        plot.bad.fails(how)

    try:
        yield Blow(name, frozenset(_UNHURT), lambda _: plot.bad.happened > 0), strike
    finally:
        plot.bad.fails("")


@contextlib.asynccontextmanager
async def _local_full(name: str, plot: Plot, dice: random.Random, lasts: float) -> Struck:
    filler = plot.local / ".filler"

    async def strike(process: Process) -> None:
        await asyncio.sleep(dice.choice([0, dice.uniform(0.3, lasts)]))
        free = os.statvfs(plot.local).f_bavail * os.statvfs(plot.local).f_frsize
        fill = free - dice.randint(8, 40) * (1 << 20)  # the guest's own writes still have room
        with filler.open("wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(fill, 4096))

    def felt(ran: Ran) -> bool:
        return ran.code != 0 and any(word in ran.err for word in ("room", "space", "free"))

    try:
        yield Blow(name, frozenset(_UNHURT), felt), strike
    finally:
        filler.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def _qemu_killed(name: str, plot: Plot, dice: random.Random, lasts: float) -> Struck:
    blow = Blow(name, frozenset(_UNHURT | {6, 7}), lambda _: blow.quit)

    def then() -> None:
        asyncio.run(_pivoted(plot))
        blow.tops = asyncio.run(plot.tops_now())
        plot.guest.qemu.kill()
        blow.quit = True

    async def strike(process: Process) -> None:
        plot.wire.arm(Fault(_at(dice), delivered=dice.random() < 0.6, then=then))

    with _rewired(plot):
        yield blow, strike


async def _pivoted(plot: Plot) -> None:
    """A disk that is on its way from its overlay to what lies beneath has come there."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2 if "job-complete" in plot.wire.names else 0):
            while any(one["status"] != "concluded" for one in await _jobs(plot)):  # noqa: ASYNC110 - another process tells nothing
                await asyncio.sleep(0.01)


async def _jobs(plot: Plot) -> list[dict[str, Any]]:
    return list(await ask(plot.guest.qemu.witness, "query-jobs"))


@contextlib.asynccontextmanager
async def _two(name: str, plot: Plot, dice: random.Random, lasts: float) -> Struck:
    words = ["create", VM, "--level", "overlay", "--ram", "none", "--max-pause", "5s"]
    second: list[asyncio.Task[Ran]] = []

    async def run(after: float) -> Ran:
        await asyncio.sleep(after)
        return await plot.run(*words)

    async def strike(process: Process) -> None:
        second.append(asyncio.create_task(run(dice.uniform(0, lasts))))

    async def both() -> None:
        await asyncio.wait(second)

    def felt(ran: Ran) -> bool:
        return 3 in {ran.code, second[0].result().code}

    yield Blow(name, frozenset({0, 3}), felt, until=both), strike


@contextlib.asynccontextmanager
async def _limited(name: str, plot: Plot, dice: random.Random, lasts: float) -> Struck:
    kind, value = dice.choice(
        [
            (resource.RLIMIT_NOFILE, dice.randint(12, 40)),
            (resource.RLIMIT_FSIZE, dice.choice([4096, 1 << 20, 8 << 20])),
        ]
    )

    async def strike(process: Process) -> None:
        pass

    codes = frozenset(_UNHURT | {1})
    yield (
        Blow(
            name,
            codes,
            lambda ran: ran.code != 0,
            before=lambda: resource.setrlimit(kind, (value, value)),
        ),
        strike,
    )


def _at(dice: random.Random) -> str | int:
    return dice.choice(_COMMANDS) if dice.random() < 0.7 else dice.randint(1, 90)


def _signal(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


@contextlib.contextmanager
def _rewired(plot: Plot) -> Iterator[None]:
    try:
        yield
    finally:
        plot.wire.arm(None)
        plot.wire.close()
        plot.wire.listen()


_TABLE = {
    "engine killed": _killed,
    "engine killed at a command": _killed_at,
    "engine stopped": _stopped,
    "engine told to end": _told_to_end,
    "monitor cut": _cut,
    **{f"agent {how}": _agent for how in ("deaf", "garbage", "late", "cut")},
    "agent dies": _agent_dies,
    **{f"store {how}": _store for how in ("hangs", "EIO", "fsync", "full", "read-only", "slow")},
    "local root full": _local_full,
    "QEMU killed": _qemu_killed,
    "two engines": _two,
    "limits": _limited,
}
