"""The guest agent is absent, deaf, mad, or serves somebody else."""

from __future__ import annotations

import os
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.engine.machine import Machine
from qmpsnap.engine.wishes import Level, Quiesce, RamChoice
from qmpsnap.errors import AgentError, Blocked, FreezeTooLong, QemuGone
from qmpsnap.hypervisor import agent as door
from tests.faults import child
from tests.faults.bench import Bench, bench, wishes
from tests.faults.fake_agent import fake_agent
from tests.rig.guest import booted
from tests.rig.wire import Fault, wired, witness

_FREEZE = wishes(RamChoice.NONE, quiesce=Quiesce.AGENT)


def _machine(it: Bench, agent: Path) -> Machine:
    return Machine("vm", it.wire.path, agent)


async def test_a_sound_agent_freezes_and_thaws(qemu72: Path, short: Path, store: Path) -> None:
    """The control of all below."""
    async with bench(qemu72, short, store) as it:
        with fake_agent(short / "ga") as agent:
            made = await it.engine().create(_machine(it, agent.path), _FREEZE)
        assert made.frozen_ms is not None
        assert await it.all_is_well() == {made.id}
        fsfreeze = [name for name in agent.heard if name.startswith("guest-fsfreeze")]
        assert fsfreeze == [
            "guest-fsfreeze-status",
            "guest-fsfreeze-freeze",
            "guest-fsfreeze-thaw",
            "guest-fsfreeze-status",
        ]


async def test_who_may_have_to_cut_a_session_knows_it_before_it_is_one(short: Path) -> None:
    """And its end is one for whoever holds its descriptor too."""
    held: list[socket.socket] = []

    def told(connection: int) -> None:
        held.append(socket.socket(fileno=os.dup(connection)))
        with pytest.raises(OSError, match="not connected"):
            held[0].getpeername()

    with fake_agent(short / "ga") as agent:
        async with door.connect(agent.path, told=told) as one:
            assert await one.execute("guest-fsfreeze-status") == "thawed"
        with held[0]:
            assert held[0].recv(1) == b""


_NOISES: dict[str, Any] = {
    "deaf": {"guest_sync_delimited": lambda: None},
    "garbage": {"guest_sync_delimited": lambda: b"\xff%&/ no JSON\n"},
    "endless": {"guest_sync_delimited": lambda: b"x" * (5 << 20)},
    "deep": {"guest_sync_delimited": lambda: b"\xff" + b"[" * 100_000 + b"\n"},
    "latin": {"guest_sync_delimited": lambda: b"\xff\xe4\xf6\n"},
}


@pytest.mark.parametrize("noise", [*_NOISES, "absent"])
async def test_an_agent_that_cannot_be_spoken_with_is_refused_before_anything_is_touched(
    noise: str, qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        with fake_agent(short / "ga", **_NOISES.get(noise, {})) as agent:
            machine = _machine(it, short / "none" if noise == "absent" else agent.path)
            with pytest.raises(Blocked, match="no freeze"):
                await it.engine().create(machine, _FREEZE)
            assert "blockdev-add" not in it.wire.names
            made = await it.engine().create(machine, wishes(RamChoice.NONE))
        assert made.quiesce == "none"
        assert not any(name.startswith("guest-fsfreeze") for name in agent.heard)
        assert await it.all_is_well() == {made.id}


_ANSWERS: dict[str, Any] = {
    "error": lambda: b'{"error": "no"}\n',
    "text": lambda: b'{"return": "two"}\n',
    "list": lambda: b"[1]\n",
    "garbage": lambda: b"%&/\n",
    "endless": lambda: b"x" * (5 << 20) + b"\n",
    "none": lambda: 0,
}


@pytest.mark.parametrize("answer", _ANSWERS)
async def test_an_agent_that_answers_a_freeze_with_nonsense_is_thawed_again(
    answer: str, qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        with (
            fake_agent(short / "ga", guest_fsfreeze_freeze=_ANSWERS[answer]) as agent,
            pytest.raises(AgentError),
        ):
            await it.engine().create(_machine(it, agent.path), _FREEZE)
        assert "guest-fsfreeze-freeze" in agent.heard
        assert "guest-fsfreeze-thaw" in agent.heard
        assert "transaction" not in it.wire.names
        assert await it.all_is_well() == set()


async def test_a_guest_that_somebody_else_froze_is_refused_and_left_frozen(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        with fake_agent(short / "ga") as agent:
            agent.status = "frozen"
            with pytest.raises(Blocked, match="frozen already, by somebody else"):
                await it.engine().create(_machine(it, agent.path), _FREEZE)
            assert agent.status == "frozen"
        assert "guest-fsfreeze-thaw" not in agent.heard
        assert "transaction" not in it.wire.names
        assert await it.all_is_well() == set()


async def test_a_guest_that_somebody_else_thawed_meanwhile_gives_no_snapshot(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        before = it.chains()
        with fake_agent(short / "ga") as agent:

            def somebody_thaws() -> None:
                agent.status = "thawed"

            it.wire.arm(Fault("transaction", held=True, then=somebody_thaws))
            it.wire.release()
            with pytest.raises(AgentError, match="somebody thawed the guest meanwhile"):
                await it.engine().create(_machine(it, agent.path), _FREEZE)
        assert it.wire.happened.is_set()
        assert it.chains() == before
        assert await it.all_is_well() == set()


def _passed(never: threading.Event, seconds: float) -> None:
    never.wait(seconds)


async def test_a_freeze_that_would_last_too_long_is_given_up(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        before = it.chains()
        with fake_agent(short / "ga") as agent:
            machine = _machine(it, agent.path)
            never = threading.Event()
            # a transaction whose answer takes three seconds
            it.wire.arm(Fault("transaction", held=True, then=lambda: _passed(never, 3)))
            it.wire.release()
            with pytest.raises(FreezeTooLong, match="longer than 2 s") as told:
                await it.engine().create(machine, replace(_FREEZE, max_freeze=2))
            assert told.value.exit_code == 4
            assert it.wire.happened.is_set()
            assert agent.status == "thawed"
            assert "guest-fsfreeze-thaw" in agent.heard
            assert await it.all_is_well() == set()
            assert it.chains() == before
            made = await it.engine().create(machine, replace(_FREEZE, max_freeze=20))
        assert await it.all_is_well() == {made.id}


@pytest.mark.parametrize("verb", ["create", "refresh"])
async def test_a_guest_that_ended_while_it_was_frozen_needs_no_help(
    verb: str, qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        with fake_agent(short / "ga") as agent:
            machine = _machine(it, agent.path)
            made = await it.engine().create(machine, wishes(RamChoice.NONE, level=Level.FULL))

            def power_fails() -> None:
                it.qemu.kill()
                agent.path.unlink()
                agent.hang_up()

            it.wire.arm(Fault("transaction", then=power_fails))
            engine = it.engine()
            again = {
                "create": lambda: engine.create(machine, _FREEZE),
                "refresh": lambda: engine.refresh(machine, made.id, quiesce=Quiesce.AGENT),
            }
            with pytest.raises(QemuGone, match="has ended while the guest was frozen"):
                await again[verb]()
        assert it.wire.happened.is_set()
        assert agent.status == "frozen"
        assert it.owes() == []


@pytest.mark.guest
@pytest.mark.parametrize("at", ["stop", "transaction", "cont"])
async def test_a_real_guest_frozen_by_a_dead_engine_is_thawed(
    at: str, qemu72: Path, short: Path, store: Path
) -> None:
    async with booted(qemu72, short) as guest:
        with (
            wired(short / "wire", guest.qmp) as wire,
            witness(guest.qemu.witness) as eye,
            child.engine(
                qmp=wire.path,
                local=short / "local",
                store=store,
                ram=RamChoice.NONE,
                agent=guest.agent,
            ) as process,
        ):
            wire.arm(Fault(at, delivered=at != "cont", then=process.kill))
            assert await child.outcome(process) == {}
            assert process.returncode == -signal.SIGKILL
            assert wire.happened.is_set()
            eye.until_running(within=5)
            # only a thawed guest lets this end
            await guest.console.run("touch /data/0/thawed && sync", within=30)
            async with door.connect(guest.agent) as agent:
                assert await agent.execute("guest-fsfreeze-status") == "thawed"
        log = (short / "local/vm/journal/watchdog.log").read_text()
        assert "'thaw'" in log
        assert (await guest.console.witness(within=30)).ok
