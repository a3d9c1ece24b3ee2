"""Stores that are well and odd: they fold case, have short names, or a clock of their own."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.retention import Policy
from qmpsnap.engine.wishes import Level, RamChoice
from qmpsnap.errors import LeaseHeld, LeaseLost, StoreRefused
from qmpsnap.ids import SnapshotId
from qmpsnap.store import lease, naming
from qmpsnap.store.layout import LocalRoot, StoreRoot
from qmpsnap.store.lease import Claimant
from qmpsnap.store.remote import Store
from tests.faults.badfs import Manners, badfs
from tests.faults.bench import bench, wishes
from tests.rig.halves import ID, LATER, names, spooled
from tests.rig.packed import IDS, Series, sparse, taken

HOURS = [-11, 5]


@contextlib.contextmanager
def odd(folder: Path, **manners: bool | int) -> Iterator[Path]:
    """A store that is like that; not the local root's file system."""
    with badfs(folder / "store", folder / "aside", images=False, manners=Manners(**manners)) as it:
        yield it.path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def who(folder: Path, host: str) -> Claimant:
    seen = str(folder / f"rival-{host}.json")
    return Claimant(holder=host, host=host, term_s=60, seen=seen)


async def test_two_vms_that_a_store_takes_for_one(short: Path) -> None:
    with odd(short, folds=True) as path:
        store, local = Store(StoreRoot(path), within=20), LocalRoot(short / "local")
        one, two = (spooled(local, vm, id) for vm, id in (("Web", ID), ("web", LATER)))
        await store.ship(one, "Web", ID, lease=who(short, "a"))
        before = content(path)
        mine = {"lease": who(short, "b")}
        for verb in (
            store.own("web", who(short, "a"), "look"),
            store.own("web", who(short, "b"), "seize"),
            store.ship(two, "web", LATER, **mine),
            store.ship(two, "web", LATER),
            store.remove("web", ID, **mine),
            store.sweep("web", **mine),
            store.lost("web", []),
            store.verify("web", ID),
            store.glance("web", ID, []),
            store.read("web", ID, "machine.json"),
            store.fetch("web", ID, "machine.json", short / "fetched"),
        ):
            with pytest.raises(StoreRefused, match="the names web and Web for one") as refused:
                await verb
            assert refused.value.exit_code == 3
            assert "upper and lower case" in refused.value.hint
        assert content(path) == before
        assert (await store.catalogue("web")).found == []
        assert [(one.vm, one.id) for one in (await store.catalogue()).found] == [("Web", ID)]
        # the first one has all of it for itself
        assert await store.verify("Web", ID) == []
        await store.ship(spooled(local, "Web", LATER), "Web", LATER, lease=who(short, "a"))
        await store.remove("Web", ID, lease=who(short, "a"))
        assert [one.id for one in (await store.catalogue("Web")).found] == [LATER]
        # other names are not concerned
        await store.ship(spooled(local, "web2", ID), "web2", ID, lease=who(short, "b"))
        assert await store.verify("web2", ID) == []


def test_a_folder_that_came_after_the_look(short: Path) -> None:
    with odd(short, folds=True) as path:
        root = StoreRoot(path)
        held = lease.take(root, "Web", who(short, "a"))
        with pytest.raises(StoreRefused, match="that of the VM Web"):
            lease.take(root, "web", who(short, "b"))
        held.check()
        assert len(names(root.lease("Web"))) == 1


async def test_the_guest_of_the_second_name_is_not_touched(qemu72: Path, short: Path) -> None:
    with odd(short, folds=True) as path:
        async with bench(qemu72, short, path) as it:
            wish = wishes(RamChoice.LIVE, level=Level.FULL)
            first = await it.engine().create(Machine("Vm", it.qemu.qmp), wish)
            # on another host, and where that is told before anything else
            other = Engine(short / "elsewhere", path, allow_local_store=True)
            for act in (other.plan, other.create, it.engine().create):
                with pytest.raises(StoreRefused, match="the names vm and Vm for one"):
                    await act(it.clean, wish)
            it.guest_is_free()
            assert it.chains() == [["d0.qcow2"], ["d1.raw"]]
            (entry,) = await it.engine().list()
            assert (entry.vm, entry.id, entry.state) == ("Vm", first.id, "paired")
            verified = await it.engine().verify("Vm")
            assert [one for one in verified.findings if not one.fine] == []
            pruned = await it.engine().prune(Machine("Vm", it.qemu.qmp), Policy(last=1))
            assert [one.decision for one in pruned.fates] == ["keep"]
            await it.engine().delete(Machine("Vm", it.qemu.qmp), first.id)
            assert await it.engine().list() == []


async def test_a_local_root_that_folds(qemu72: Path, short: Path, store: Path) -> None:
    with badfs(short / "local", short / "aside", manners=Manners(folds=True)):
        async with bench(qemu72, short, store) as it:
            wish = wishes(RamChoice.LIVE, level=Level.FULL)
            first = await it.engine().create(it.clean, wish)
            with pytest.raises(StoreRefused, match="the names VM and vm for one"):
                await it.engine().create(Machine("VM", it.qemu.qmp), wish)
            assert await it.all_is_well() == {first.id}


@pytest.mark.parametrize(
    ("manners", "why"),
    [
        ({"longest": 64}, "no names of 95 bytes such as ours .its own limit: 64;"),
        ({"folds": True, "lowers": True}, "writes down other names than it is given"),
    ],
)
async def test_a_store_that_has_not_our_names(
    qemu72: Path, short: Path, manners: dict[str, int], why: str
) -> None:
    with odd(short, **manners) as path:
        async with bench(qemu72, short, path) as it:
            for act in (it.engine().plan, it.engine().create):
                with pytest.raises(StoreRefused, match=why) as refused:
                    await act(it.clean, wishes(RamChoice.LIVE))
                assert refused.value.exit_code == 3
            it.guest_is_free()
            assert it.chains() == [["d0.qcow2"], ["d1.raw"]]
            assert names(path) == []
        # what was captured before the store became so, or while it was away
        spool = spooled(LocalRoot(short / "local"), "vm")
        before = content(spool)
        delivered, (waiting,) = await it.engine().ship()
        assert (delivered, waiting.exit_code) == ([], 5)
        assert re.search(why, str(waiting))
        after = content(spool)
        assert {path: after.get(path) for path in before} == before
    good = short / "good"
    good.mkdir()
    delivered, waiting_still = await Engine(it.local, good, allow_local_store=True).ship()
    assert ([one.id for one in delivered], waiting_still) == ([ID], [])


def test_no_name_of_ours_is_longer_than_the_probe(short: Path) -> None:
    with odd(short, longest=naming.LONGEST) as path:
        naming.probe(path)
        (short / "one").mkdir()
        series = Series(short / "one", store=StoreRoot(path))
        taken(series, 4)
        # a copy of a host that died; with a name that is one byte longer it could not be put aside
        left = path / "web/shared" / f"{'0' * 64}.0123456789abcdef.partial"
        left.touch()
        series.remove(IDS[1])
        assert not left.exists()
        series.whole(IDS[0], IDS[2])
        # packs are moved, with their notes
        (short / "two").mkdir()
        other = Series(short / "two", "other", StoreRoot(path))
        kept = sparse(other)
        other.remove(IDS[0])
        assert any(name.endswith(".moved") for name in names(path / "other/shared"))
        other.whole(*kept)
        assert not [name for name in names(path) if name.startswith(".")]


@pytest.mark.parametrize("hours", HOURS)
async def test_a_store_with_another_clock(qemu72: Path, short: Path, hours: int) -> None:
    with odd(short, ahead=hours * 3600) as path:
        async with bench(qemu72, short, path) as it:
            made = []
            for _ in range(3):
                wish = wishes(RamChoice.LIVE, level=Level.FULL)
                made.append((await it.engine().create(it.clean, wish)).id)
                it.guest_writes(3)
            standing = await it.engine().lease("vm")
            assert standing.ours
            assert standing.newest == made[-1]
            assert 0 < (standing.ends_in_s or 0) <= 600
            other = Engine(short / "elsewhere", path, allow_local_store=True)
            with pytest.raises(LeaseHeld):
                await other.create(it.clean, wishes(RamChoice.LIVE))
            for verified in [await it.engine().verify("vm", id) for id in made]:
                assert [one for one in verified.findings if not one.fine] == []
            pruned = await it.engine().prune(it.clean, Policy(last=1))
            assert [one.decision for one in pruned.fates] == ["remove", "remove", "keep"]
            assert await it.all_is_well() == {made[-1]}
            await it.engine().delete(it.clean, made[-1])
            assert (await it.engine().list(), it.owes()) == ([], [])


@pytest.mark.parametrize("hours", HOURS)
def test_a_lease_lives_by_the_stores_clock_alone(short: Path, hours: int) -> None:
    with odd(short, ahead=hours * 3600) as path:
        root, one, two = StoreRoot(path), who(short, "a"), who(short, "b")
        held = lease.take(root, "web", one)
        file = next(root.lease("web").iterdir())

        def aged(by: float) -> None:
            at = file.stat().st_mtime - by
            os.utime(file, (at, at))

        aged(50)
        left = lease.look(root, "web", two).ends_in_s
        assert left is not None
        assert 0 < left <= 10
        with pytest.raises(LeaseHeld):
            lease.take(root, "web", two)
        aged(20)
        # left over from a process that died: by the store's clock too young to go, and old enough
        young, old = (root.lease("web") / f"{word * 32}.new" for word in "ab")
        for left_over, age in ((young, 80_000), (old, 90_000)):
            left_over.touch()
            at = left_over.stat().st_mtime - age
            os.utime(left_over, (at, at))
        lease.take(root, "web", two)
        assert young.exists()
        assert not old.exists()
        with pytest.raises(LeaseLost):
            held.check()


def test_a_lease_that_is_renewed_has_the_stores_time(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with odd(short, ahead=-5 * 3600) as path:
        root = StoreRoot(path)
        held = lease.take(root, "web", who(short, "a"))
        file = next(root.lease("web").iterdir())
        at = file.stat().st_mtime - 50
        os.utime(file, (at, at))
        clock = lease._clock()
        monkeypatch.setattr(lease, "_clock", lambda: clock + 30)
        held.beat()
        left = lease.look(root, "web", who(short, "b")).ends_in_s
        assert left is not None
        assert 55 < left <= 60


async def test_a_vm_that_comes_from_a_host_whose_clock_is_ahead(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        wish = wishes(RamChoice.LIVE, level=Level.FULL)
        first = await it.engine().create(it.clean, wish)
        await it.engine().lease("vm", "leave")
        ahead = _later(first.id, hours=5)
        (store / "vm" / ahead).mkdir()
        other = Engine(short / "elsewhere", store, allow_local_store=True)
        made = await other.create(it.clean, wish)
        assert made.id > ahead
        # one that lies: nobody follows it to the end of time
        (store / "vm" / "99981231T235959998Z").mkdir()
        again = await other.create(it.clean, wish)
        assert made.id < again.id < _later(first.id, hours=24)


def _later(id: str, *, hours: int) -> str:
    return str(SnapshotId.of(SnapshotId(id).taken() + timedelta(hours=hours)))
