"""Several machines from one snapshot, which share the pages of its RAM: all of them, or none."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from qmpsnap.engine import fitness, restore
from qmpsnap.engine.capture import Report
from qmpsnap.engine.ramback import Way
from qmpsnap.engine.restoration import Ready, Restoration, refuse_folder
from qmpsnap.engine.restore import Restored
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import LocalFailed, UsageError
from qmpsnap.hypervisor.guest import addresses, clock, quiesce
from qmpsnap.hypervisor.machine.clones import clone
from qmpsnap.shield import finish

T = TypeVar("T")
_AT_ONCE = 4  # that are made, or started
_PAGES = "ram"  # beside the folders of the clones, which have numbers


@dataclass(frozen=True, slots=True)
class Planned:
    """Clone *number* as it would be started. *macs*: its cards' addresses by the original's."""

    number: int
    ready: Ready
    macs: dict[str, str]


@dataclass(frozen=True, slots=True)
class Clone:
    """A clone that is up. *clock*: `set` to the host's time, or why it was not.

    *macs*: the addresses of its interfaces that were changed in the running guest, by name.
    """

    number: int
    restored: Restored
    clock: str
    macs: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def shown(self) -> dict[str, Any]:
        """What `restore --clones --json` prints of it."""
        shown = self.restored.shown()
        notices = [*shown["notices"], *self.notices]
        here = {"clone": self.number, "clock": self.clock, "macs": self.macs, "notices": notices}
        return shown | here


async def prepared(
    roots: Roots,
    vm: str,
    word: str,
    wish: Restoration,
    count: int,
    report: Report,
    *,
    keep_macs: bool = False,
) -> list[Planned]:
    """Check and build *count* machines, in the folders 1, 2... of that of *wish*; none is started.

    Page images that are not on the local root are made once, beside them.
    Raises what `restore.prepared` does; nothing is left behind then.
    """
    if wish.qmp is not None:
        raise UsageError("clones have a QMP socket each, in their folders")
    await asyncio.to_thread(_make_folder, wish.to)
    done: list[Ready] = []
    gate = asyncio.Semaphore(_AT_ONCE)

    def own(number: int) -> Restoration:
        return replace(wish, to=wish.to / str(number), pages=wish.to / _PAGES)

    async def one(number: int, ready: Ready) -> Planned:
        async with gate:
            done.append(await restore.built(ready, report))
        return _as_clone(ready, number, keep_macs)

    try:
        assessed = await fitness.assess(roots, vm, word, own(1))
        # it makes the page images too, if need be: for the others they are there
        first = await one(1, assessed.ready())
        others = [one(number, assessed.another(own(number))) for number in range(2, count + 1)]
        return [first, *await _all(others)]
    except BaseException:
        await finish(asyncio.to_thread(_unmade, wish.to, done), within=60)
        raise


@asynccontextmanager
async def cloned(
    these: Sequence[Planned], report: Report, *, detach: bool = False
) -> AsyncIterator[list[Clone]]:
    """All the machines of *these*, up for the block; for good if *detach*.

    Raises what the first one raised that could not be started; all others are ended then, and
    what was built is removed.
    """
    gate, over = asyncio.Semaphore(_AT_ONCE), asyncio.Event()
    loop = asyncio.get_running_loop()
    up: list[asyncio.Future[Clone]] = [loop.create_future() for _ in these]
    # each lives in a task of its own, as what it is made of has to be left where it was entered
    lives = [
        asyncio.create_task(_lived(one, gate, up[at], over, report, detach=detach))
        for at, one in enumerate(these)
    ]
    folder = these[0].ready.wish.to.parent
    try:
        clones = list(await asyncio.gather(*up))
        if not any(one.ready.memory.way is Way.MAPPED for one in these):
            made = these[0].ready.wish.ram_in or folder / _PAGES
            await asyncio.to_thread(shutil.rmtree, made, ignore_errors=True)
    except BaseException:
        await finish(_ended(lives), within=90)
        await finish(asyncio.to_thread(_unmade, folder, [one.ready for one in these]), within=60)
        raise
    try:
        yield clones
    finally:
        over.set()
        await finish(_settled(lives), within=90)


async def _lived(
    one: Planned,
    gate: asyncio.Semaphore,
    up: asyncio.Future[Clone],
    over: asyncio.Event,
    report: Report,
    *,
    detach: bool,
) -> None:
    """One machine, until it is *over*. When it fails before, or is cancelled, it is ended."""
    life = restore.restored(one.ready, report, detach=detach)
    try:
        async with gate:
            back = await life.__aenter__()
    except BaseException as failed:
        _failed(up, failed)
        raise
    try:
        found = await _renewed(one, back)
        if not up.done():
            up.set_result(found)
        await over.wait()
    except BaseException as failed:
        _failed(up, failed)
        await finish(back.process.kill(), within=10)
        raise
    finally:
        await life.__aexit__(None, None, None)


def _failed(up: asyncio.Future[Clone], failed: BaseException) -> None:
    if up.done():
        return
    if isinstance(failed, asyncio.CancelledError):
        up.cancel()
    else:
        up.set_exception(failed)


async def _renewed(one: Planned, back: Restored) -> Clone:
    """What only the running guest can change of itself; what it does not is told."""
    agent, manifest = back.machine.agent, back.ready.pair.manifest
    if back.ready.wish.cold:
        return Clone(one.number, back, "it has the host's time as it boots")
    why = "the guest is paused" if manifest.was != "running" else "there is no guest agent"
    if agent is not None and manifest.was == "running":
        # one that is silent is asked once, and not again for each thing
        why = await quiesce.is_answering(agent)
    if agent is None or why:
        kept = f"the guest's interfaces keep their MAC addresses until it is reset: {why}"
        return Clone(one.number, back, why, {}, [kept] if one.macs else [])
    said = await clock.to_now(agent) or "set"
    if not one.macs:
        return Clone(one.number, back, said)
    renewed = await addresses.renew(agent, one.macs)
    return Clone(one.number, back, said, renewed.changed, renewed.kept)


def _as_clone(ready: Ready, number: int, keep_macs: bool) -> Planned:
    pair, relocated = ready.pair, ready.relocated
    of = f"{pair.vm}/{pair.id}"
    own = clone(
        relocated.cmdline,
        relocated.notices,
        of=of,
        number=number,
        keep_macs=keep_macs,
        cold=ready.wish.cold,
    )
    moved = replace(relocated, cmdline=own.cmdline, notices=list(own.notices))
    # the page images are there, and stay as long as another one has to read them
    memory = replace(ready.memory, lacking="")
    return Planned(number, replace(ready, relocated=moved, memory=memory), dict(own.macs))


async def _all(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What they give. When one fails the others have ended before that is raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        await finish(_ended(tasks), within=90)
        raise


async def _ended(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _settled(tasks: Sequence[asyncio.Task[None]]) -> None:
    for said in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(said, BaseException):
            raise said


def _make_folder(to: Path) -> None:
    refuse_folder(to)
    try:
        to.mkdir(0o700, parents=True, exist_ok=True)
    except OSError as failed:
        raise LocalFailed(f"{to}: {failed.strerror}") from failed


def _unmade(folder: Path, made: Sequence[Ready]) -> None:
    """*folder* is empty, as it was when we came: all in it is ours."""
    for ready in made:
        if ready.wish.to.is_dir():
            restore.unmade(ready)
    for path in folder.iterdir():
        shutil.rmtree(path)
