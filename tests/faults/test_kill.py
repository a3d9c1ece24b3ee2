"""The engine is killed, or stops answering: the watchdog pays, and the next engine cleans up."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.engine.wishes import RamChoice
from tests.faults import child
from tests.faults.bench import Bench, bench, wishes
from tests.rig.qemu import binary
from tests.rig.wire import Fault

_MODES = [
    ("7.2", RamChoice.NONE),
    ("7.2", RamChoice.LIVE),
    ("7.2", RamChoice.PAUSED),
    ("10.0", RamChoice.BACKGROUND),
]
# of each mode: what it sends from its first change of QEMU to its last
_COMMANDS = {
    RamChoice.NONE: ["blockdev-add", "stop", "transaction", "cont"],
    RamChoice.LIVE: ["getfd", "migrate", "transaction", "migrate-continue", "cont", "closefd"],
    RamChoice.PAUSED: ["migrate-set-parameters", "stop", "transaction", "migrate", "cont"],
    RamChoice.BACKGROUND: ["getfd", "stop", "transaction", "migrate", "cont"],
}
_PHASES = [
    f"{when} {phase}"
    for phase in ("planned", "holding", "captured", "sealed", "closed")
    for when in ("before", "after")
]


def _engine(it: Bench, ram: RamChoice, **other: Any) -> Any:
    return child.engine(qmp=it.wire.path, local=it.local, store=it.store, ram=ram, **other)


async def _cleaned_up(it: Bench) -> set[str]:
    """The guest runs by itself; then the next engine leaves all well. The new snapshots' IDs."""
    it.witness.until_running(within=5)
    before = it.halves()
    made = await it.engine().create(it.clean, wishes(RamChoice.NONE))
    found = await it.all_is_well()
    assert made.id in found
    return found - before - {made.id}


@pytest.mark.parametrize("delivered", [False, True], ids=["unseen", "delivered"])
@pytest.mark.parametrize(("version", "ram"), _MODES)
async def test_a_kill_at_a_command_leaves_the_guest_running(
    version: str, ram: RamChoice, delivered: bool, short: Path, store: Path
) -> None:
    async with bench(binary(version), short, store) as it:
        for command in _COMMANDS[ram]:
            with _engine(it, ram) as process:
                it.wire.arm(Fault(command, delivered=delivered, then=process.kill))
                assert await child.outcome(process) == {}, command
            assert process.returncode == -signal.SIGKILL
            assert it.wire.happened.is_set()
            assert await _cleaned_up(it) == set(), command
        with _engine(it, ram) as process:  # the control
            it.wire.arm(None)
            assert (await child.outcome(process))["id"] in await it.all_is_well()
        assert set(_COMMANDS[ram]) <= set(it.wire.names)


@pytest.mark.parametrize(("version", "ram"), [_MODES[0], _MODES[3]])
async def test_a_kill_at_a_note_of_the_journal_leaves_a_whole_snapshot_or_none(
    version: str, ram: RamChoice, short: Path, store: Path
) -> None:
    async with bench(binary(version), short, store) as it:
        for die in _PHASES:
            with _engine(it, ram, die=die) as process:
                assert await child.outcome(process) == {}, die
            assert process.returncode == -signal.SIGKILL
            shared = it.local / "vm/shared"
            shared.mkdir(exist_ok=True)
            (shared / "0123456789abcdef.partial").touch()  # a pack that was being written
            it.witness.until_running(within=5)
            await it.engine().recover(it.clean)
            assert list(shared.glob("*.partial")) == [], die
            waiting = {entry.id: entry.state for entry in await it.engine().list("vm")}
            assert set(waiting.values()) <= {"paired", "shipping", "damaged"}, die
            # from `before sealed` on the local half is sealed: the snapshot may not be lost
            whole = die in {"before sealed", "after sealed", "before closed", "after closed"}
            assert ("shipping" in waiting.values()) == whole, die
            assert len(await _cleaned_up(it)) == whole, die
            assert (
                await it.engine().verify("vm", sorted(it.halves())[-2 if whole else -1])
            ).findings == []
        with _engine(it, ram) as process:  # the control
            assert "id" in await child.outcome(process)


async def test_a_probe_that_was_broken_off_is_taken_back(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        with _engine(it, RamChoice.NONE) as process:
            it.wire.arm(Fault("migrate-set-capabilities", then=process.kill))
            assert await child.outcome(process) == {}
        capabilities = it.witness.ask("query-migrate-capabilities")
        on = [one["capability"] for one in capabilities if one["state"]]
        assert on == ["background-snapshot"]
        assert it.owes() == []
        assert await it.engine().recover(it.clean) == []
        assert await it.all_is_well() == set()


async def test_what_has_arrived_leaves_nothing_here_when_its_engine_dies_then(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        made = await it.engine().create(it.clean, wishes(RamChoice.NONE))
        # as it is left between the note of the pair and the end of the spool, or after that
        spool, shared = it.local / "vm" / made.id / "spool", it.local / "vm/shared"
        spool.mkdir()
        shared.mkdir(exist_ok=True)
        (spool / "half").touch()
        (shared / ("0" * 64)).touch()
        assert await it.engine().recover(it.clean) == []
        assert not spool.exists()
        assert await it.all_is_well() == {made.id}


async def test_a_guest_held_by_a_dead_engine_is_continued_by_the_watchdog(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        with _engine(it, RamChoice.PAUSED) as process:
            states: list[str] = []

            def kill() -> None:
                states.append(it.witness.status)
                process.kill()

            it.wire.arm(Fault("transaction", then=kill))
            assert await child.outcome(process) == {}
        assert states == ["paused"]
        it.witness.until_running(within=5)
        it.witness.until(lambda: "engine gone, owed: " in _log(it), within=5)
        assert await _cleaned_up(it) == set()


async def test_a_guest_held_by_a_hanging_engine_is_continued_at_the_deadline(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        with _engine(it, RamChoice.PAUSED, max_pause=1, margin=0.5) as process:
            it.wire.arm(
                Fault("transaction", held=True, then=lambda: process.send_signal(signal.SIGSTOP))
            )
            await asyncio.to_thread(it.wire.happened.wait, 30)
            assert it.witness.status == "paused"
            it.witness.until_running(within=10)
            assert _state(process) == "T"
            it.witness.until(lambda: "deadline passed" in _log(it), within=5)
            process.send_signal(signal.SIGCONT)
            told = await child.outcome(process)
        assert told["exit_code"] == 4, told
        assert it.owes() == []
        assert await it.all_is_well() == set()
        with _engine(it, RamChoice.PAUSED, margin=0.5) as process:  # the control
            assert "id" in await child.outcome(process)


async def test_a_guest_is_continued_when_the_engine_hangs_in_a_second_session(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        with _engine(it, RamChoice.PAUSED, max_pause=1, margin=0.5) as process:
            hanging = threading.Event()

            def hang() -> None:
                process.send_signal(signal.SIGSTOP)
                hanging.set()

            # the first session is cut; the second stands still with QEMU's only place
            again = Fault(2, delivered=False, held=True, then=hang)
            it.wire.arm(Fault("transaction", then=lambda: it.wire.arm(again)))
            await asyncio.to_thread(hanging.wait, 30)
            assert it.witness.status == "paused"
            it.witness.until_running(within=10)
            assert _state(process) == "T"
            it.witness.until(lambda: "deadline passed" in _log(it), within=5)
            process.send_signal(signal.SIGCONT)
            await child.outcome(process)
        assert await _cleaned_up(it) == set()


def _log(it: Bench) -> str:
    """What the watchdog has written down, which it does when it has paid."""
    return (it.local / "vm/journal/watchdog.log").read_text()


def _state(process: subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
