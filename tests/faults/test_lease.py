"""Another host has the VM on the store: the guest is not touched, and nothing of it is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpsnap import Engine
from qmpsnap.engine.wishes import RamChoice
from qmpsnap.errors import LeaseHeld, NotShipped
from qmpsnap.store import lease
from qmpsnap.store.layout import StoreRoot
from qmpsnap.store.lease import Claimant
from tests.faults.bench import bench, wishes


async def test_a_vm_of_another_host(qemu72: Path, short: Path, store: Path) -> None:
    root = StoreRoot(store)
    seen = str(short / "rival.json")
    other = Claimant(holder="other", host="elsewhere", term_s=600, seen=seen)

    def seized(what: str, done: int, total: int) -> None:
        if what.startswith("saving RAM"):
            lease.take(root, "vm", other, by_force=True)

    async with bench(qemu72, short, store) as it:
        wish = wishes(RamChoice.LIVE)
        held = lease.take(root, "vm", other)
        for act in (it.engine().plan, it.engine().create):
            with pytest.raises(LeaseHeld, match="the host elsewhere") as refused:
                await act(it.clean, wish)
            assert refused.value.exit_code == 3
        assert await it.all_is_well() == set()
        assert not (it.local / "vm/journal").exists()
        held.give_up()
        first = await it.engine().create(it.clean, wish)
        assert await it.all_is_well() == {first.id}
        # captured while the lease was lost: it waits
        engine = Engine(it.local, store, allow_local_store=True, report=seized)
        with pytest.raises(NotShipped, match="the host elsewhere"):
            await engine.create(it.clean, wish)
        assert it.owes() == []
        it.guest_is_free()
        (standing,) = [await it.engine().lease("vm")]
        assert (standing.host, standing.ours) == ("elsewhere", False)
        with pytest.raises(LeaseHeld):
            await it.engine().delete(it.clean, first.id)
        assert (await it.engine().lease("vm", "seize")).ours
        delivered, waiting = await it.engine().ship("vm")
        assert [len(delivered), waiting] == [1, []]
        assert await it.all_is_well() == {first.id, delivered[0].id}
