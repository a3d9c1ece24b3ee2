"""Another host has the VM on the store: the guest is not touched, and nothing of it is lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qmpsnap import Engine
from qmpsnap.engine import owning
from qmpsnap.engine.wishes import RamChoice
from qmpsnap.errors import LeaseHeld, NotShipped
from qmpsnap.store import lease
from qmpsnap.store.layout import StoreRoot
from qmpsnap.store.lease import Claimant
from tests.faults.badfs import badfs
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


async def test_info_names_another_host(
    qemu72: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owning, "_WITHIN", 60.0)  # a busy host is no silent store
    with badfs(short / "store", short / "aside", images=False) as bad:
        root = StoreRoot(bad.path)
        other = Claimant(holder="b" * 32, host="elsewhere", term_s=600, seen=str(short / "seen"))
        async with bench(qemu72, short, bad.path) as it:
            fresh = await it.engine().info(it.clean)
            assert (fresh.lease, fresh.blockers) == (None, [])
            assert not (it.local / "host.json").exists()  # it only looks
            await it.engine().create(it.clean, wishes(RamChoice.LIVE))
            bad.fails("readonly")
            assert (await it.engine().info(it.clean)).lease is None
            assert bad.happened == 0  # one's own costs no write
            bad.fails()
            lease.take(root, "vm", other, by_force=True)
            found = await it.engine().info(it.clean)
            assert found.lease is not None
            assert (found.lease.host, found.lease.ours) == ("elsewhere", False)
            assert ("snapshot", True) in {
                (one.of, "the host elsewhere (bbbbbbbb)" in one.why) for one in found.blockers
            }
            rival = await it.engine().rival("vm")
            assert rival is not None
            assert rival.host == "elsewhere"
            monkeypatch.setattr(owning, "_WITHIN", 3.0)
            for how in ("hang", "full"):
                bad.fails(how)
                began = time.monotonic()
                assert (await it.engine().info(it.clean)).lease is None
                assert await it.engine().rival("vm") is None
                assert time.monotonic() - began < 20  # 2 x 3 s, on a busy host
                assert bad.happened > 0
            bad.fails()
            nowhere = Engine(it.local, short / "none", allow_local_store=True)
            assert (await nowhere.info(it.clean)).lease is None
            it.guest_is_free()
