"""The watchdog's process pays whatever an engine left behind, and whatever befalls it meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmpsnap.errors import AgentError
from qmpsnap.hypervisor import agent as door
from qmpsnap.hypervisor.abilities import set_capabilities
from qmpsnap.hypervisor.guest import quiesce
from qmpsnap.hypervisor.guest.watchdog import Watchdog, watching
from qmpsnap.hypervisor.monitor import Monitor, connect
from qmpsnap.hypervisor.vmstate import migration
from tests.faults.bench import options
from tests.faults.fake_agent import FakeAgent, fake_agent
from tests.rig.qemu import Running, binary, running
from tests.rig.wire import Witness, witness

_IPC_LOCK, _RESOURCE = 14, 24  # linux/capability.h


class _GoneError(Exception):
    """The engine is no more."""


@asynccontextmanager
async def _dying(
    machine: Running, log: Path, *kinds: str, agent: Path | None = None, within: float = 60
) -> AsyncIterator[tuple[Monitor, Watchdog]]:
    """An engine that owes *kinds*, and is gone at the end of the block."""
    with contextlib.suppress(_GoneError):
        async with (
            connect(machine.qmp) as monitor,
            watching(machine.qmp, agent, connection=monitor.fileno(), log=log) as dog,
            dog.owing(*kinds, within=within),
        ):
            yield monitor, dog
            raise _GoneError


@pytest.fixture
async def machine(qemu72: Path, short: Path) -> AsyncIterator[Running]:
    line, _ = options(short)
    async with running(qemu72, *line, directory=short) as process:
        yield process


def _status(pid: int, key: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{key}:"))


def _oom_score_adj(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def _may(capability: int) -> bool:
    return bool(int(_status(os.getpid(), "CapEff"), 16) >> capability & 1)


async def test_it_is_out_of_the_reach_of_what_ends_its_engine(
    machine: Running, short: Path
) -> None:
    with witness(machine.witness) as eye:
        async with _dying(machine, short / "log", "cont") as (monitor, dog):
            assert os.getsid(dog.pid) not in {os.getsid(0), os.getpid()}
            assert os.getpgid(dog.pid) != os.getpgid(0)
            assert _status(dog.pid, "PPid") != str(os.getpid())
            assert os.readlink(f"/proc/{dog.pid}/cwd") == "/"  # noqa: PTH115
            if _may(_IPC_LOCK):
                assert int(_status(dog.pid, "VmLck")) > 4096
            if _may(_RESOURCE):
                assert _oom_score_adj(dog.pid) == -1000
            await monitor.execute("stop")
            # as a service's end sends them to all of its processes
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
                os.kill(dog.pid, number)
            assert eye.status == "paused"
        eye.until_running(within=5)


@pytest.mark.parametrize("lack", ["disk", "files", "memory"])
async def test_it_needs_nothing_more_once_something_is_owed(
    lack: str, machine: Running, short: Path
) -> None:
    log = Path("/dev/full") if lack == "disk" else short / "log"
    with witness(machine.witness) as eye, fake_agent(short / "ga") as agent:
        async with _dying(machine, log, "cont", "thaw", agent=agent.path) as (monitor, dog):
            agent.status = "frozen"
            await monitor.execute("stop")
            if lack == "files":
                resource.prlimit(dog.pid, resource.RLIMIT_FSIZE, (0, 0))
            if lack == "memory":
                size = int(_status(dog.pid, "VmSize")) << 10
                resource.prlimit(dog.pid, resource.RLIMIT_AS, (size, size))
                resource.prlimit(dog.pid, resource.RLIMIT_DATA, (0, 0))
        eye.until(lambda: agent.status == "thawed" and eye.status == "running", within=10)
        if lack == "memory":
            eye.until(lambda: "engine gone" in log.read_text(), within=5)


async def _paused(monitor: Monitor) -> None:
    await monitor.execute("stop")


async def _before_the_switchover(monitor: Monitor) -> None:
    await set_capabilities(monitor, {"events": True, "pause-before-switchover": True})
    with monitor.listen("MIGRATION") as events:
        await monitor.execute("migrate", {"uri": "exec:cat >/dev/null"})
        await migration.reach(monitor, events, "pre-switchover")


async def _migrated(monitor: Monitor) -> None:
    await monitor.execute("stop")
    await set_capabilities(monitor, {"events": True})
    with monitor.listen("MIGRATION") as events:
        await monitor.execute("migrate", {"uri": "exec:cat >/dev/null"})
        await migration.reach(monitor, events, "completed")


async def _arming(monitor: Monitor) -> None:
    await set_capabilities(monitor, {"background-snapshot": True})
    await monitor.execute("stop")
    await monitor.execute("migrate", {"uri": "exec:cat >/dev/null"})


async def _armed(monitor: Monitor) -> None:
    await _arming(monitor)
    while not ((ram := (await migration.query(monitor)).ram).normal + ram.duplicate):
        pass


_LEFT: dict[str, tuple[Callable[[Monitor], Awaitable[None]], set[str]]] = {
    "paused": (_paused, {"cont"}),
    "pre-switchover": (_before_the_switchover, {"cont", "cancel"}),
    "postmigrate": (_migrated, {"cont", "cancel"}),
    "arming": (_arming, {"cont"}),
    "armed": (_armed, {"cont"}),
}


@pytest.mark.parametrize("version", ["7.2", "10.0"])
async def test_a_guest_runs_on_whatever_state_it_was_left_in(version: str, short: Path) -> None:
    line, _ = options(short)
    log = short / "log"
    async with running(binary(version), *line, directory=short) as machine:
        with witness(machine.witness) as eye:
            for name, (leave, owed) in _LEFT.items():
                log.unlink(missing_ok=True)
                async with _dying(machine, log, *owed) as (monitor, _):
                    await leave(monitor)
                # it has written down what it did when it has done all
                eye.until(lambda: log.exists() and log.read_text() != "", within=10)
                assert eye.status == "running", name
                eye.until(lambda: _over(eye), within=20)
                assert eye.status == "running", name
                off = [one["capability"] for one in eye.ask("query-migrate-capabilities")]
                states = [{"capability": one, "state": False} for one in off]
                eye.ask("migrate-set-capabilities", capabilities=states)


def _over(eye: Witness) -> bool:
    return eye.ask("query-migrate").get("status") not in migration._ON_THE_WAY


@pytest.mark.parametrize("when", ["synchronised", "before"])
async def test_a_hung_engine_that_holds_the_agents_socket_is_cut_off_there(
    when: str, machine: Running, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiesce, "_MARGIN", 0.5)
    with fake_agent(short / "ga") as agent, witness(machine.witness) as eye:
        async with _dying(machine, short / "log", agent=agent.path) as (_, dog):
            await quiesce.Freezer(agent.path, dog, longest=0.5).freeze()
            agent.deaf = when == "before"
            hanging = asyncio.create_task(_hang(agent.path, dog))
            # the agent's socket serves one client, and that is us
            await asyncio.to_thread(eye.until, lambda: agent.status == "thawed", within=10)
            hanging.cancel()
            with contextlib.suppress(asyncio.CancelledError, AgentError):
                await hanging


async def _hang(agent: Path, dog: Watchdog) -> None:
    async with door.connect(agent, within=60, told=dog.may_cut):
        await asyncio.Event().wait()


async def test_an_agent_that_is_still_busy_with_the_freeze_is_waited_for(
    machine: Running, short: Path
) -> None:
    busy, asked = threading.Event(), threading.Event()
    agents: list[FakeAgent] = []

    def freezes() -> int:
        asked.set()
        busy.wait(30)
        agents[0].status = "frozen"
        return 2

    with (
        fake_agent(short / "ga", guest_fsfreeze_freeze=freezes) as agent,
        witness(machine.witness) as eye,
    ):
        agents.append(agent)
        async with _dying(machine, short / "log", agent=agent.path) as (_, dog):
            freezing = asyncio.create_task(quiesce.Freezer(agent.path, dog).freeze())
            await asyncio.to_thread(asked.wait, 10)
            freezing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await freezing
        assert agent.status == "thawed"  # as yet
        busy.set()
        eye.until(lambda: "guest-fsfreeze-thaw" in agent.heard, within=20)
        eye.until(lambda: agent.status == "thawed", within=10)
