"""Trying a snapshot: it is brought back for a moment, on no network, and thrown away again."""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from qmpsnap.engine import dependents
from qmpsnap.engine.capture import Report
from qmpsnap.engine.half import Pair
from qmpsnap.engine.restore import Ready, Restoration, Restored, prepared, restored
from qmpsnap.errors import (
    AgentError,
    Blocked,
    DamagedData,
    LocalFailed,
    MonitorLost,
    SnapError,
    StoreError,
)
from qmpsnap.host import lock
from qmpsnap.hypervisor import agent as door
from qmpsnap.hypervisor.guest import runstate
from qmpsnap.hypervisor.machine.attach import agent_chardev
from qmpsnap.hypervisor.machine.inventory import ChardevFacts
from qmpsnap.hypervisor.monitor import Event, Events, Monitor, connect
from qmpsnap.shield import finish
from qmpsnap.store import points

_FOLDER = "boot"
_LOCK = "boot.lock"
_STAYS = 2.0  # seconds for which a guest that cannot be asked has to run on
_ASK_AGAIN = 0.2  # seconds
_ENDS = {
    "STOP": "the guest was stopped",
    "SHUTDOWN": "the guest was powered off",
    "GUEST_PANICKED": "the guest panicked",
}
_RESTARTS = "RESET"  # a guest that boots may do that; one that goes on with its RAM has crashed


@dataclass(frozen=True, slots=True)
class Trial:
    """How to try. *cold*: boot the disks, even where there is RAM. *within*: seconds that the
    guest's agent has to answer. *revision*: of the local half; any but 0 is booted cold.
    """

    cold: bool = False
    within: float = 60.0
    revision: int | None = None


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen; *problem* is empty when the guest ran, and ran on.

    *ram*: it went on with its RAM, instead of booting. *agent*: whether its agent answered, or
    that there was none to ask. *running_ms* from the start of QEMU until the guest ran,
    *answered_ms* until the agent answered.
    """

    revision: int
    ram: bool
    agent: Literal["answered", "silent", "absent"]
    running_ms: float | None
    answered_ms: float | None
    problem: str


def settled(pair: Pair, trial: Trial) -> Trial:
    """*trial* with its defaults filled in. Raises Blocked for a revision that is not there."""
    root = pair.roots.local
    there = {
        point.storage.revision
        for name in (pair.id, *(f"{pair.id}/{one}" for one in root.revisions(pair.vm, pair.id)))
        if (point := _readable(root.point(pair.vm, name))) is not None
    }
    if trial.revision is not None and trial.revision not in there:
        raise Blocked(f"{pair.vm} {pair.id} has no revision {trial.revision}")
    cold = trial.cold or bool(trial.revision) or pair.manifest.ram.mode == "none"
    newest = max(there, default=0) if cold else 0
    revision = newest if trial.revision is None else trial.revision
    return replace(trial, cold=cold, revision=revision)


def _readable(folder: Path) -> points.Point | None:
    try:
        return points.read_one(folder)
    except SnapError:
        return None  # it is a finding of its own


async def boot(pair: Pair, trial: Trial, report: Report) -> Boot:
    """Bring *pair* back as the *settled* trial says, look at it, and leave nothing behind.

    What goes wrong with the snapshot or with its guest is in the `problem` of what comes back.

    Raises VmBusy while another trial of this VM is under way, Blocked for a machine that no
    restore can bring back, LocalFailed and StoreError.
    """
    root = pair.roots.local
    folder = root.vm(pair.vm) / _FOLDER
    async with lock.held(root.vm(pair.vm) / _LOCK, "verify --boot"):
        await asyncio.to_thread(_removed, pair, folder)  # what a run that was killed has left
        try:
            return await _tried(pair, trial, folder, report)
        finally:
            await finish(asyncio.to_thread(_removed, pair, folder), within=60)


def _removed(pair: Pair, folder: Path) -> None:
    root = pair.roots.local
    if not folder.exists():
        return
    try:
        shutil.rmtree(folder)
        for id in root.ids(pair.vm):
            dependents.forget(root, pair.vm, str(id), folder)
    except OSError as failed:
        raise LocalFailed(f"{failed.filename}: {failed.strerror}") from failed


async def _tried(pair: Pair, trial: Trial, folder: Path, report: Report) -> Boot:
    seen = Boot(
        revision=trial.revision or 0,
        ram=not trial.cold,
        agent="absent",
        running_ms=None,
        answered_ms=None,
        problem="",
    )
    # only the disks of a later revision are asked for by number: revision 0 is what a pair is
    wish = Restoration(folder, cold=trial.cold, revision=trial.revision, isolated=True)
    try:
        ready = await prepared(pair.roots, pair.vm, pair.id, wish, report)
    except DamagedData as damaged:
        return msgspec.structs.replace(seen, problem=str(damaged))
    watch = _Watch(ready, trial, seen)
    try:
        async with restored(ready, report) as back:
            await watch.look(back)
    except (LocalFailed, StoreError):
        raise  # it could not be tried: that says nothing of the snapshot
    except SnapError as failed:
        watch.note(problem=str(failed))
    return watch.seen


class _Watch:
    """One guest, looked at from the start of its QEMU."""

    def __init__(self, ready: Ready, trial: Trial, seen: Boot) -> None:
        self._ready, self._trial, self.seen = ready, trial, seen
        self._since = time.monotonic()

    def note(self, **what: object) -> None:
        self.seen = msgspec.structs.replace(self.seen, **what)

    async def look(self, back: Restored) -> None:
        """Raises SnapError for what is wrong with the guest that is not in a `problem` yet."""
        async with connect(back.machine.socket) as monitor:
            with monitor.listen(*_ENDS, _RESTARTS) as events:
                # one that was paused when it was captured has to show that it can run, too
                await runstate.let_run(monitor)
                self.note(running_ms=self._elapsed())
                agent = back.machine.agent if await self._to_be_asked(monitor) else None
                await self._watched(events, agent)
            if not self.seen.problem and (state := await runstate.query(monitor)) != "running":
                self.note(problem=f"the guest does not go on running: it is {state}")

    async def _watched(self, events: Events, agent: Path | None) -> None:
        """Until the agent has answered, the guest has run for long enough, or it has ended."""
        asking = asyncio.create_task(_answered(agent) if agent else asyncio.sleep(_STAYS))
        ending = asyncio.create_task(self._end(events))
        try:
            limit = self._trial.within if agent else None
            await asyncio.wait({asking, ending}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                self.note(problem=ending.result(), agent="silent" if agent else "absent")
            elif not asking.done():
                told = f"the guest runs, and its agent did not answer within {limit:g} s"
                self.note(problem=told, agent="silent")
            elif agent is not None:
                asking.result()
                self.note(agent="answered", answered_ms=self._elapsed())
        finally:
            asking.cancel()
            ending.cancel()
            await asyncio.gather(asking, ending, return_exceptions=True)

    async def _end(self, events: Events) -> str:
        """What ended the guest, once something has."""
        try:
            while True:
                event: Event = await events.next()
                if event.name == _RESTARTS and self.seen.ram and event.data.get("guest"):
                    return "the guest did not go on with its RAM: it restarted"
                if event.name in _ENDS:
                    return _ENDS[event.name]
        except MonitorLost:
            return "QEMU has ended"

    async def _to_be_asked(self, monitor: Monitor) -> bool:
        """Whether an agent has to answer.

        In a machine that goes on with its RAM nobody does whose end of the port was closed.
        """
        if self._ready.relocated.agent is None:
            return False
        if not self.seen.ram or self._ready.pair.manifest.quiesce == "agent":
            return True
        wanted = agent_chardev(self._ready.relocated.cmdline)
        there = await monitor.query("query-chardev", list[ChardevFacts])
        return any(one.label == wanted and one.frontend_open for one in there)

    def _elapsed(self) -> float:
        return round((time.monotonic() - self._since) * 1000, 1)


async def _answered(agent: Path) -> None:
    """Returns once the agent says that it is there."""
    while True:
        try:
            async with door.connect(agent, within=2.0) as session:
                await session.execute("guest-ping", within=2.0)
                return
        except AgentError:
            await asyncio.sleep(_ASK_AGAIN)
