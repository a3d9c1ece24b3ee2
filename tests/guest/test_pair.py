"""The main job on a real guest: RAM and two disks of one instant, in every way, on every QEMU."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Level, Quiesce, RamChoice, Wishes
from qmpsnap.errors import Blocked, DamagedData
from tests.rig.graph import ask, chains, status, untouched
from tests.rig.guest import Console, Guest, Witness, agrees, back, booted
from tests.rig.qemu import binary

pytestmark = pytest.mark.guest

BUSY = "busy ram=32 rate=20 disk=1024"
ROUNDS = 20
PATIENT = Wishes(max_pause=30)  # no test of the pause


def an_engine(short: Path, store: Path) -> Engine:
    return Engine(short / "local", store, allow_local_store=True)


@pytest.mark.timeout(600)
async def test_every_mode_brings_ram_and_disks_of_one_instant_back(
    qemu: Path, short: Path, store: Path
) -> None:
    engine = an_engine(short, store)
    seen: dict[str, Witness] = {}
    async with booted(qemu, short) as guest:
        machine = Machine("web", guest.qmp, guest.agent)
        await guest.console.run(BUSY, within=20)
        for ram in (RamChoice.BACKGROUND, RamChoice.LIVE, RamChoice.PAUSED, RamChoice.AUTO):
            before = await guest.console.witness(within=30)
            made = await engine.create(machine, Wishes(ram=ram, max_pause=30))
            after = await guest.console.witness(within=30)
            assert made.state == "paired"
            assert made.ram == ram or (ram is RamChoice.AUTO and made.ram in {"live", "background"})
            assert made.pause_ms > 0
            assert before.ok
            assert after.ok
            assert await status(guest.qemu.witness) == "running"
            found = await agrees(engine, "web", Restoration(short / f"b-{ram}"), before)
            assert found.ram < after.ram + 1000
            seen[made.id] = before
        # each of a series stands for itself, in whatever order
        oldest, *_ = seen
        await agrees(engine, "web", Restoration(short / "again"), seen[oldest], oldest)
        assert (await guest.console.witness(within=30)).ok
        await untouched(guest.qemu.witness)
        # a state that is cut short is not loaded, and QEMU does not wait for the rest of it
        os.truncate(store / "web" / oldest / "vmstate/stream.zst", 5000)
        with pytest.raises(DamagedData, match=r"stream\.zst"):
            await agrees(engine, "web", Restoration(short / "cut"), seen[oldest], oldest)
        await _of_a_paused_guest(engine, machine, guest, short)


async def _of_a_paused_guest(engine: Engine, machine: Machine, guest: Guest, short: Path) -> None:
    before = await guest.console.witness(within=30)
    await ask(guest.qemu.witness, "stop")
    files = await chains(guest.qemu.witness)
    version = (await ask(guest.qemu.witness, "query-version"))["qemu"]
    if version["major"] < 9:
        with pytest.raises(Blocked, match="the guest is paused"):
            await engine.create(machine, PATIENT)
        assert await chains(guest.qemu.witness) == files
        assert await status(guest.qemu.witness) == "paused"
        return
    made = await engine.create(machine, replace(PATIENT, level=Level.OVERLAY))
    assert made.ram == "background"
    assert await status(guest.qemu.witness) == "paused"
    assert await chains(guest.qemu.witness) != files
    to = short / "paused"
    async with back(engine, "web", Restoration(to)) as (restored, console):
        assert restored.machine.qmp is not None
        assert await status(restored.machine.qmp) == "paused"
        await ask(restored.machine.qmp, "cont")
        found = await console.witness(within=60)
    assert found.ok
    assert found.ram >= before.ram
    await ask(guest.qemu.witness, "cont")
    assert (await guest.console.witness(within=30)).ok


@pytest.mark.timeout(1800)
async def test_twenty_snapshots_in_the_background_without_one_disagreement(
    short: Path, store: Path
) -> None:
    engine = an_engine(short, store)
    seen: dict[str, Witness] = {}
    async with booted(binary("10.0"), short) as guest:
        machine = Machine("web", guest.qmp, guest.agent)
        await guest.console.run(BUSY, within=20)
        for _ in range(ROUNDS):
            before = await guest.console.witness(within=30)
            made = await engine.create(machine, Wishes(ram=RamChoice.BACKGROUND, max_pause=30))
            seen[made.id] = before
        assert (await guest.console.witness(within=30)).ok
    assert len(seen) == ROUNDS
    for id, before in seen.items():
        await agrees(engine, "web", Restoration(short / "back" / id), before, id)
        shutil.rmtree(short / "back" / id)


async def test_a_restored_machine_is_a_machine_like_any_other(
    qemu72: Path, short: Path, store: Path
) -> None:
    """Restored twice while the original runs, snapshotted again, alone without the original."""
    engine = an_engine(short, store)
    async with booted(qemu72, short) as guest:
        machine = Machine("web", guest.qmp, guest.agent)
        await guest.console.run(BUSY, within=20)
        first = await guest.console.witness(within=30)
        await engine.create(machine, PATIENT)
        async with (
            back(engine, "web", Restoration(short / "one")) as (one, console_one),
            back(engine, "web", Restoration(short / "two")) as (_, console_two),
        ):
            there = [
                await console.witness(within=60)
                for console in (console_one, console_two, guest.console)
            ]
            assert [found.ok for found in there] == [True, True, True]
            assert {found.nonce for found in there} == {first.nonce}
            second = Machine("web-two", one.machine.qmp, one.machine.agent)
            made = await engine.create(second, PATIENT)
            assert made.state == "paired"
            assert (await console_one.witness(within=60)).ok
            await agrees(engine, "web-two", Restoration(short / "three"), there[0])
        alone = await engine.prepare_restore("web", Restoration(short / "four", standalone=True))
    for path in [*guest.disks, *(short / "local/web").rglob("*.qcow2")]:
        path.rename(path.with_name(f"{path.name}.moved"))
    async with (
        engine.restored(alone),
        Console.open(short / "four/console.sock") as console,
    ):
        found = await console.witness(within=60)
        assert found.ok
        assert found.nonce == first.nonce


async def test_a_cold_restore_boots_from_the_frozen_disks(
    qemu72: Path, short: Path, store: Path
) -> None:
    engine = an_engine(short, store)
    async with booted(qemu72, short) as guest:
        machine = Machine("web", guest.qmp, guest.agent)
        await guest.console.run(BUSY, within=20)
        before = await guest.console.witness(within=30)
        made = await engine.create(
            machine, Wishes(ram=RamChoice.NONE, quiesce=Quiesce.AGENT, max_pause=30)
        )
        after = await guest.console.witness(within=30)
        assert (made.ram, made.quiesce) == ("none", "agent")
        assert made.frozen_ms is not None
        assert after.ok
        # frozen file systems would hold its writes back
        assert (await guest.console.witness(within=30)).ram >= after.ram
        with pytest.raises(Blocked, match="without RAM"):
            await engine.prepare_restore("web", Restoration(short / "warm"))
        assert not (short / "warm").exists()
    async with back(engine, "web", Restoration(short / "cold", cold=True)) as (_, console):
        said = await console.until(r"PREV disk0=(\w+) (\d+) disk1=(\w+) (\d+)\s", within=120)
        await console.until("READY", within=120)
        booted_anew = await console.witness(within=30)
    nonces, counts = {said[1], said[3]}, (int(said[2]), int(said[4]))
    assert nonces == {before.nonce}
    assert counts[0] - counts[1] in {0, 1}
    assert before.ram - 1 <= counts[1] <= after.ram
    assert booted_anew.ok
    assert booted_anew.nonce != before.nonce


async def test_a_newer_qemu_takes_up_what_an_older_one_saved(short: Path, store: Path) -> None:
    engine = an_engine(short, store)
    newer, newest = binary("10.0"), binary("11.1")
    async with booted(binary("7.2"), short) as guest:
        before = await guest.console.witness(within=30)
        await engine.create(Machine("old", guest.qmp, guest.agent), PATIENT)
    async with back(engine, "old", Restoration(short / "newer", qemu=newer)) as (one, console):
        found = await console.witness(within=60)
        assert found.ok
        assert found.nonce == before.nonce
        qmp = one.machine.qmp
        assert qmp is not None
        assert (await ask(qmp, "query-version"))["qemu"]["major"] == 10
        made = await engine.create(Machine("new", qmp, one.machine.agent), PATIENT)
        assert made.state == "paired"
    await agrees(engine, "new", Restoration(short / "newest", qemu=newest), found)
