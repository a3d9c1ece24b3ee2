"""`auto` on a guest that dirties its RAM faster than a short pause allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Wishes
from tests.rig.console import Console
from tests.rig.guest import booted

pytestmark = pytest.mark.guest
# a millisecond holds a MiB or two: the guest dirties many times that during each pass
HARD = Wishes(pause=0.001, budget=0.5, max_pause=30)


async def test_a_guest_that_does_not_converge_is_taken_in_the_background(
    qemu: Path, short: Path, store: Path
) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(qemu, short, memory=256) as guest:
        machine = Machine("web", guest.qmp, guest.agent)
        idle = await engine.create(machine, Wishes(max_pause=30))
        assert idle.ram == "live"
        await guest.console.run("busy ram=128 rate=2000", within=20)
        made = await engine.create(machine, HARD)
        before = await guest.console.witness(within=60)
        if "7.2" in idle.ram_reason:
            assert made.ram == "live"  # a longer pause, since background is not safe there
        else:
            assert made.ram == "background"
            assert "did not converge" in made.ram_reason
        ready = await engine.prepare_restore("web", Restoration(short / "back"))
        async with engine.restored(ready), Console.open(short / "back/console.sock") as console:
            found = await console.witness(within=120)
    assert before.ok
    assert found.ok
    assert found.nonce == before.nonce
