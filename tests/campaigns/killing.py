"""One kind of snapshot on one QEMU, killed at given places, and what must hold after each kill."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import traceback
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qmpsnap.engine.machine import Machine
from qmpsnap.engine.wishes import Level, Quiesce, RamChoice, Wishes
from tests.campaigns.awaits import Strike
from tests.campaigns.forked import Forked, Job, run
from tests.faults.bench import Bench, bench, wishes
from tests.faults.fake_agent import FakeAgent, fake_agent
from tests.rig.qemu import binaries

_MARGIN = 10.0  # seconds: that of the product, where an engine is killed
_HUNG_MARGIN = 1.0  # and where it hangs: the campaign waits for it each time
_MAX_PAUSE = 20.0
_GRACE = 2.0  # seconds past the deadline


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """What is killed: *verb* on *version*; a `refresh` has no RAM, and its level is its own."""

    version: str
    verb: str
    ram: RamChoice
    level: Level

    def __str__(self) -> str:
        kind = f" {self.level} --ram {self.ram}" if self.verb == "create" else ""
        return f"{self.verb}{kind} on {self.version}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one strike. *wrong*: the promises that were broken, none if all hold.

    *struck*: it came to that place. *held_s*: how long the guest stood still or frozen after it,
    0 if it did not. *states*: run state and agent's state at that moment. *listed*: a new snapshot
    was there afterwards.
    """

    case: Case
    strike: Strike
    wrong: list[str]
    struck: bool = False
    held_s: float = 0.0
    states: tuple[str, str] = ("", "")
    settled: bool = False
    listed: bool = False


@dataclass(slots=True)
class World:
    """A VM that an engine may be killed over, time and again."""

    case: Case
    bench: Bench
    agent: FakeAgent
    _wires: int
    _writes: int = 0
    known: set[str] = field(default_factory=set)

    def job(self, verb: str, **other: Any) -> Job:
        return Job(
            verb=verb,
            machine=Machine("vm", self.bench.qemu.qmp, self.agent.path),
            local=self.bench.local,
            store=self.bench.store,
            wishes=Wishes(
                level=self.case.level,
                ram=self.case.ram,
                quiesce=Quiesce.AGENT,
                max_pause=_MAX_PAUSE,
            ),
            **other,
        )

    def counted(self) -> tuple[list[tuple[str, int]], int]:
        """The positions of an undisturbed run with how often each was visited, and suspensions."""
        told = run(self.job(self.case.verb))
        if "error" in told:
            raise RuntimeError(f"{self.case}: {told['error']}")
        self.known = set(self.bench.points())
        return [(at, times) for at, times in told["visits"]], told["suspensions"]

    async def struck(self, strike: Strike) -> Verdict:
        """Strike once; then all that must hold."""
        self._writes += 1
        self.bench.guest_writes(1 + self._writes % 60)
        engine = Forked(self.job(self.case.verb, strike=strike))
        try:
            told = engine.ended()
        except TimeoutError as never:
            told = {"error": f"the engine did not end: {never}"}
        verdict = Verdict(
            self.case, strike, [], struck=not told, states=(self.bench.witness.status, self._ice)
        )
        if "error" in told:
            verdict.wrong.append(f"it failed by itself: {told['error']}")
        return await self._judged(verdict)

    async def hung(self, strike: Strike) -> Verdict:
        """As `struck`, where the engine does not end, but stands still; it is killed later."""
        limits = {"margin": _HUNG_MARGIN, "longest": _HUNG_MARGIN}
        job = self.job(self.case.verb, strike=strike, **limits)
        job = replace(job, wishes=replace(job.wishes, max_pause=_HUNG_MARGIN))
        engine = Forked(job)
        pid = engine.process.pid
        assert pid is not None
        try:
            struck = _stopped(pid)
            states = (self.bench.witness.status, self._ice)
            verdict = Verdict(self.case, strike, [], struck=struck, states=states)
            if struck:
                verdict = self._let_go(verdict, 2 * _HUNG_MARGIN + _GRACE)
        finally:
            engine.process.kill()
            engine.ended()
        return await self._judged(verdict)

    @property
    def _ice(self) -> str:
        return self.agent.status

    async def _judged(self, verdict: Verdict) -> Verdict:
        if not verdict.held_s:
            verdict = self._let_go(verdict, _MAX_PAUSE + _MARGIN + _GRACE)
        try:
            return await self._settled(verdict)
        except AssertionError as broken:
            at = traceback.extract_tb(broken.__traceback__)[-1]
            verdict.wrong.append(f"{Path(at.filename).name}:{at.lineno} {at.line}: {broken}"[:800])
            return verdict

    def _let_go(self, verdict: Verdict, within: float) -> Verdict:
        began = time.monotonic()
        while not self._free:
            if time.monotonic() - began > within:
                now = f"the guest is {self.bench.witness.status} and {self._ice}"
                verdict.wrong.append(f"{now}, {within:g} s after {verdict.states}")
                break
            time.sleep(0.005)
        held = verdict.states != ("running", "thawed")
        return replace(verdict, held_s=time.monotonic() - began if held else 0.0)

    @property
    def _free(self) -> bool:
        return self._ice == "thawed" and self.bench.witness.status == "running"

    async def _settled(self, verdict: Verdict) -> Verdict:
        content = self.bench.disks_now()
        first = self._said("recover")["settled"]
        assert self._free, "the guest is not free"
        if first:
            assert (again := self._said("recover")["settled"]) == [], f"a second one did {again}"
        new = set(self.bench.points()) - self.known
        assert len(new) <= 1, new
        if new and self.case.verb == "create":
            states = set(self._said("list")["states"].values())
            assert states <= {"paired", "shipping"}, states
            if "shipping" in states:
                assert self._said("ship")["waiting"] == [], "it could not be shipped"
        self._nothing_runs()
        await self._nothing_is_left()
        for point in new:
            self._comes_back(point, content)
        self.known |= new
        return replace(verdict, settled=bool(first), listed=bool(new))

    def _said(self, verb: str, **other: Any) -> dict[str, Any]:
        told = run(self.job(verb, **other))
        assert "error" not in told, f"{verb}: {told['error']}"
        return told

    async def _nothing_is_left(self) -> None:
        await self.bench.all_is_well()
        pid = self.bench.qemu.pid
        try:
            self.bench.witness.until(lambda: _wires(pid) == self._wires, within=5)
        except TimeoutError:
            raise AssertionError(f"QEMU has {_wires(pid)} sockets and pipes") from None
        left = [str(path) for path in self.bench.store.rglob("*.partial*")]
        assert left == [], f"on the store: {left}"
        sockets = [path.name for path in self.bench.local.parent.glob("qmpsnap-*")]
        assert sockets == [], f"folders of sockets: {sockets}"

    def _nothing_runs(self) -> None:
        """No process of an engine's is left; those that have to end may be on their way yet."""
        end = time.monotonic() + 10
        while left := _about(self.bench.local.parent, but=self.bench.qemu.pid):
            assert time.monotonic() < end, f"still at work: {left}"
            time.sleep(0.02)

    def _comes_back(self, point: str, content: dict[str, bytes]) -> None:
        id = point.partition("/")[0]
        assert self.bench.holds(point) == content, f"{point} has not what the disks had"
        found = self._said("verify", word=id)["findings"]
        assert found == [], f"verify {id}: {found}"
        folder = self.bench.local.parent / "back"
        try:
            self._said("restore", word=id, to=folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def world(case: Case, folder: Path, store: Path) -> AsyncIterator[World]:
    """A world for *case*, its files in *folder* and *store*, with a snapshot to refresh."""
    with fake_agent(folder / "agent") as agent:
        async with bench(binaries()[case.version], folder, store) as it:
            it.guest_writes(1, 2, 3)
            if case.verb == "refresh":
                await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.FULL))
            one = World(case, it, agent, _wires(it.qemu.pid))
            one.known = set(it.points())
            yield one


def strikes(positions: Sequence[tuple[str, int]]) -> Iterator[Strike]:
    """Every place to strike at: each position as its wait begins, then as it ends, then late."""
    for moment in ("suspended", "resumed"):
        for at, _ in positions:
            yield Strike(at, moment)
    for at, times in positions:
        if times > 1:
            yield Strike(at, visit=times // 2 + 1)


def _wires(pid: int) -> int:
    """How many sockets and pipes a process has open: what was handed to it and forgotten counts."""
    found = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(path).startswith(("socket:", "pipe:"))  # noqa: PTH115
    return found


def _stopped(pid: int) -> bool:
    """Wait until it stands still, or has ended."""
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state in "TZX":
            return state == "T"
        time.sleep(0.005)


def _about(folder: Path, *, but: int) -> list[str]:
    """The command lines of all processes that name *folder*."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in words and int(path.parent.name) not in {but, os.getpid()}:
                found.append(words)
    return found
