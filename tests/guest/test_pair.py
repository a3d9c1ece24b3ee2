"""The main job on a real guest: RAM and two disks of one instant, in every way, on every QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import RamChoice, Wishes
from tests.rig.console import Console
from tests.rig.guest import booted

pytestmark = pytest.mark.guest


@pytest.mark.parametrize("ram", [RamChoice.BACKGROUND, RamChoice.LIVE, RamChoice.PAUSED])
async def test_a_restored_guest_finds_ram_and_disks_of_one_instant(
    qemu: Path, short: Path, store: Path, ram: RamChoice
) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(qemu, short) as guest:
        machine = Machine("web", guest.qmp, guest.agent)
        await guest.console.run("busy ram=32 rate=20 disk=1024", within=10)
        before = await guest.console.witness(within=20)
        made = await engine.create(machine, Wishes(ram=ram, max_pause=30))
        after = await guest.console.witness(within=20)
        assert (made.ram, made.state) == (ram, "paired")
        ready = await engine.prepare_restore("web", Restoration(short / "back"))
        async with engine.restored(ready), Console.open(short / "back/console.sock") as console:
            found = await console.witness(within=30)
    assert before.ok
    assert after.ok
    assert found.ok
    assert (found.nonce, before.nonce) == (before.nonce, after.nonce)
    assert found.ram >= before.ram
