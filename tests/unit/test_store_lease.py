"""Two hosts, which are two local roots, and one store: a VM is never both's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import msgspec
import psutil
import pytest

from qmpsnap.engine.roots import Roots, claimant
from qmpsnap.engine.ship import ship_all
from qmpsnap.errors import LeaseHeld, LeaseLost, StoreError
from qmpsnap.store import files, lease, removal, rival, shipping, wire, worker
from qmpsnap.store.holder import holder
from qmpsnap.store.layout import LocalRoot, StoreRoot
from qmpsnap.store.lease import Claimant, Held, Standing
from qmpsnap.store.remote import Store
from tests.rig.halves import ID, LATER, names, spooled

TERM = 60.0


@pytest.fixture
def root(tmp_path: Path) -> StoreRoot:
    (tmp_path / "store").mkdir()
    return StoreRoot(tmp_path / "store")


def host(tmp_path: Path, name: str, term: float = TERM) -> Claimant:
    local = LocalRoot(tmp_path / name)
    return Claimant(
        holder=holder(local, name), host=name, term_s=term, seen=str(local.rival("web"))
    )


def numbers(root: StoreRoot) -> list[str]:
    return names(root.lease("web"))


def aged(root: StoreRoot, seconds: float) -> None:
    """The lease is older by that, as the store's clock says."""
    path = max(root.lease("web").iterdir())
    at = path.stat().st_mtime - seconds
    os.utime(path, (at, at))


def test_who_a_host_is(tmp_path: Path) -> None:
    local = LocalRoot(tmp_path / "a")
    mine = holder(local, "machine")
    assert mine == holder(local, "machine")
    assert mine != holder(LocalRoot(tmp_path / "b"), "machine")
    assert mine != holder(local, "another machine, with a copy of the root")
    assert names(local.path) == ["host.json"]
    assert local.host.stat().st_mode & 0o777 == 0o600


def test_a_lease_keeps_others_out_and_lasts(tmp_path: Path, root: StoreRoot) -> None:
    one, two = host(tmp_path, "one"), host(tmp_path, "two")
    assert lease.look(root, "web", two) == Standing(vm="web")
    held = lease.take(root, "web", one)
    with pytest.raises(LeaseHeld, match=r"the host one \(\w{8}\) for \d+ s more") as refused:
        lease.take(root, "web", two)
    assert refused.value.exit_code == 3
    for _ in range(3):
        held.check()
    assert numbers(root) == ["00000004.json"]
    # the same host in another process, after the first one has gone without a word
    again = lease.take(root, "web", one)
    assert lease.look(root, "web", one).ours
    with pytest.raises(LeaseLost, match="it belongs to this host"):
        held.check()
    again.check()
    assert len(numbers(root)) == 1
    again.give_up()
    assert lease.look(root, "web", one).holder is None
    lease.take(root, "web", two)
    with pytest.raises(LeaseLost, match="the host two"):
        again.check()


@pytest.mark.parametrize("clock", [0, 86400, -86400])  # of the store, to that of the hosts
def test_the_stores_clock_says_when_a_lease_ends(
    tmp_path: Path, root: StoreRoot, clock: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Path.stat

    def stat(path: Path, **words: bool) -> os.stat_result:
        """A file that was just written is as old as the server says."""
        found = list(written(path, **words))
        if path.suffix == ".new":
            return os.stat_result([*found[:8], found[8] + clock, found[9]])
        return os.stat_result(found)

    one, two = host(tmp_path, "one"), host(tmp_path, "two")
    held = lease.take(root, "web", one)
    monkeypatch.setattr(Path, "stat", stat)
    aged(root, -clock)
    with pytest.raises(LeaseHeld):
        lease.take(root, "web", two)
    aged(root, TERM - 5)
    with pytest.raises(LeaseHeld):
        lease.take(root, "web", two)
    aged(root, 10)
    taken = lease.take(root, "web", two)
    with pytest.raises(LeaseLost):
        held.check()
    taken.check()


def test_a_lease_is_renewed_by_the_servers_time(
    tmp_path: Path, root: StoreRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = lease.take(root, "web", host(tmp_path, "one"))
    aged(root, TERM + 10)
    monkeypatch.setattr(lease, "_clock", lambda: time.clock_gettime(time.CLOCK_BOOTTIME) + TERM)
    held.beat()
    with pytest.raises(LeaseHeld):
        lease.take(root, "web", host(tmp_path, "two"))


def test_a_store_whose_clock_was_put_back(
    tmp_path: Path, root: StoreRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = host(tmp_path, "two")
    held = lease.take(root, "web", host(tmp_path, "one"))
    aged(root, -86400)  # it is to last until tomorrow
    with pytest.raises(LeaseHeld):
        lease.take(root, "web", two)
    ahead = [TERM - 1.0]
    clock = time.clock_gettime
    monkeypatch.setattr(rival.time, "clock_gettime", lambda which: clock(which) + ahead[0])
    with pytest.raises(LeaseHeld):
        lease.take(root, "web", two)
    held.check()  # it lives: what was seen of it begins anew
    ahead[0] = TERM + 1
    with pytest.raises(LeaseHeld):
        lease.take(root, "web", two)
    ahead[0] = 2 * TERM + 5
    lease.take(root, "web", two)


def test_an_operator_takes_a_vm_over(tmp_path: Path, root: StoreRoot) -> None:
    held = lease.take(root, "web", host(tmp_path, "one"))
    taken = lease.take(root, "web", host(tmp_path, "two"), by_force=True)
    with pytest.raises(LeaseLost, match="the host two"):
        held.check()
    with pytest.raises(LeaseLost):
        held.beat() or held.check()
    taken.check()


def test_what_a_crash_leaves(tmp_path: Path, root: StoreRoot) -> None:
    one, two = host(tmp_path, "one"), host(tmp_path, "two")
    lease.take(root, "web", one)
    (root.lease("web") / "00000001.json").write_bytes(b'{"format": "qm')  # damaged: a stranger's
    with pytest.raises(LeaseHeld, match="the host \\?"):
        lease.take(root, "web", one)
    aged(root, 3601)
    (root.lease("web") / "dead.new").touch()
    os.utime(root.lease("web") / "dead.new", (1, 1))
    (root.lease("web") / "notes.txt").touch()
    lease.take(root, "web", two)
    assert numbers(root) == ["00000002.json", "notes.txt"]


def test_a_lost_answer_is_no_lost_lease(
    tmp_path: Path, root: StoreRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS: the server has made the link, its answer was lost, and the client asks again."""
    link = os.link

    def twice(*words: object, **more: object) -> None:
        link(*words, **more)  # type: ignore[arg-type]
        link(*words, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", twice)
    held = lease.take(root, "web", host(tmp_path, "one"))
    held.check()
    held.give_up()


def test_a_store_without_links(
    tmp_path: Path, root: StoreRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **_more: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    held = lease.take(root, "web", host(tmp_path, "one"))
    held.check()
    with pytest.raises(LeaseHeld):
        lease.take(root, "web", host(tmp_path, "two"))
    lease.take(root, "web", host(tmp_path, "two"), by_force=True)
    with pytest.raises(LeaseLost):
        held.check()


ROUNDS, RACERS = 40, 4


def _race(store: str, folder: str, number: int, gate: Barrier, said: object) -> None:
    root = StoreRoot(Path(store))
    won = []
    for turn in range(ROUNDS):
        who = Claimant(
            holder=f"h{number}", host=f"h{number}", term_s=TERM, seen=f"{folder}/{number}.json"
        )
        gate.wait(60)
        try:
            held = lease.take(root, f"vm{turn}", who)
            for _ in range(turn % 4):  # numbers that are gone when a slow one wants to use them
                held.check()
            won.append(turn)
        except LeaseHeld:
            pass
        gate.wait(60)
        if won[-1:] == [turn]:
            held.check()  # and has it still
    said.put(won)  # type: ignore[attr-defined]


def test_of_many_that_want_a_lease_that_ran_out_one_gets_it(
    tmp_path: Path, root: StoreRoot
) -> None:
    for turn in range(ROUNDS):
        dead = Claimant(holder="dead", host="dead", term_s=TERM, seen=str(tmp_path / "dead"))
        lease.take(root, f"vm{turn}", dead)
        path = root.lease(f"vm{turn}") / "00000001.json"
        os.utime(path, (1, 1))
    context = multiprocessing.get_context("spawn")
    gate, said = context.Barrier(RACERS), context.Queue()
    racers = [
        context.Process(target=_race, args=(str(root.path), str(tmp_path), one, gate, said))
        for one in range(RACERS)
    ]
    for racer in racers:
        racer.start()
    won = [turn for _ in racers for turn in said.get(timeout=100)]
    for racer in racers:
        racer.join(10)
        assert racer.exitcode == 0
    said.close()
    assert sorted(won) == list(range(ROUNDS))


def roots(tmp_path: Path, root: StoreRoot, name: str, term: float = TERM) -> Roots:
    return Roots(
        LocalRoot(tmp_path / name), Store(root, within=20), allow_local_store=True, lease=term
    )


def quiet(*_: object) -> None:
    pass


async def test_a_host_that_has_not_the_lease_ships_nothing_and_keeps_its_spool(
    tmp_path: Path, root: StoreRoot
) -> None:
    one, two = roots(tmp_path, root, "one"), roots(tmp_path, root, "two")
    spooled(one.local)
    spool = spooled(two.local, id=LATER)
    delivered, waiting = await ship_all(one, "web", quiet)
    assert [len(delivered), waiting] == [1, []]
    before = sorted(root.path.rglob("*"))
    delivered, waiting = await ship_all(two, "web", quiet)
    assert delivered == []
    assert "web is not this host's on the store: it belongs to the host" in str(waiting[0])
    assert waiting[0].exit_code == 5
    with pytest.raises(LeaseHeld):
        await two.store.remove("web", ID, lease=await claimant(two, "web"))
    with pytest.raises(LeaseHeld):
        await two.store.sweep("web", lease=await claimant(two, "web"))
    assert sorted(root.path.rglob("*")) == before
    assert (spool / "manifest.json").exists()
    await one.store.own("web", await claimant(one, "web"), "leave")
    delivered, _ = await ship_all(two, "web", quiet)
    assert [one.id for one in delivered] == [LATER]


async def test_a_holder_that_was_killed_blocks_until_its_lease_ends(
    tmp_path: Path, root: StoreRoot, children: Callable[[], list[psutil.Process]]
) -> None:
    one, two = roots(tmp_path, root, "one"), roots(tmp_path, root, "two")
    first, _ = spooled(one.local), spooled(two.local, id=LATER)

    def kill(*_: object) -> None:
        for child in children():
            child.send_signal(signal.SIGKILL)

    # it never comes to its end, however late the signal is
    script = "import time; from qmpsnap.store import shipping, worker"
    endless = f"{script}; shipping.publish = lambda *_, **__: time.sleep(60); worker.main()"
    store = Store(root, within=20, command=[sys.executable, "-P", "-c", endless])
    with pytest.raises(StoreError):
        await store.ship(first, "web", ID, lease=await claimant(one, "web"), on_progress=kill)
    assert (await ship_all(two, "web", quiet))[0] == []
    aged(root, TERM + 1)
    assert len((await ship_all(two, "web", quiet))[0]) == 1
    (waiting,) = (await ship_all(one, "web", quiet))[1]
    assert "the host" in str(waiting)


def seized(tmp_path: Path, root: StoreRoot) -> Held:
    return lease.take(root, "web", host(tmp_path, "two"), by_force=True)


@pytest.mark.parametrize("at", range(1, 8))  # one past the end: the manifest is there by then
def test_a_lease_that_is_lost_stops_the_writer(tmp_path: Path, root: StoreRoot, at: int) -> None:
    spool = spooled(LocalRoot(tmp_path / "one"))
    held = lease.take(root, "web", host(tmp_path, "one"))
    told = 0

    def progress(*_: object) -> None:
        nonlocal told
        told += 1
        if told == at:
            seized(tmp_path, root)

    request = wire.Ship(root=str(root.path), vm="web", id=ID, spool=str(spool), device=None)
    if at == 7:
        shipping.ship(root, request, progress, held.check)
        assert told == 6
        return
    with pytest.raises(LeaseLost, match="the host two"):
        shipping.ship(root, request, progress, held.check)
    assert not root.manifest("web", ID).exists()
    assert (spool / "manifest.json").exists()


async def test_a_long_shipment_looks_now_and_then(
    tmp_path: Path, root: StoreRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each progress that is told would do; the worker's own is used here."""
    now = [0.0]
    monkeypatch.setattr(lease, "_clock", lambda: now[0])
    who = host(tmp_path, "one")
    with worker._owned(root, "web", who) as (progress, guard):
        guard()
        seized(tmp_path, root)
        progress(1, 2, "copying")  # it was looked at just now
        now[0] += 6
        with pytest.raises(LeaseLost, match="the host two"):
            progress(1, 2, "copying")
    worker._leases.clear()


@pytest.mark.parametrize("calls", range(1, 4))
def test_nothing_is_removed_without_the_lease(tmp_path: Path, root: StoreRoot, calls: int) -> None:
    local = LocalRoot(tmp_path / "one")
    request = wire.Ship(
        root=str(root.path), vm="web", id=ID, spool=str(spooled(local)), device=None
    )
    shipping.ship(root, request, quiet)
    root.shared("web").mkdir()
    (root.shared("web") / files.digest_bytes(b"none's")).write_bytes(b"none's")
    held = lease.take(root, "web", host(tmp_path, "one"))
    left = calls

    def guard() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            seized(tmp_path, root)
        held.check()

    remove: Callable[[], None] = lambda: removal.remove(  # noqa: E731
        root, wire.Remove(root=str(root.path), vm="web", id=ID), quiet, guard
    )
    with pytest.raises(LeaseLost):
        remove()
    assert root.manifest("web", ID).exists() == (calls == 1)
    assert names(root.shared("web")) == [files.digest_bytes(b"none's")]


async def test_a_lease_that_is_looked_at_costs_no_lease(tmp_path: Path, root: StoreRoot) -> None:
    one = roots(tmp_path, root, "one")
    who = await claimant(one, "web")
    assert (await one.store.own("web", who, "look")).holder is None
    assert names(root.path) == []
    taken = await one.store.own("web", who)
    assert (taken.ours, taken.holder) == (True, who.holder)
    seen = await one.store.own("web", msgspec.structs.replace(who, holder="other"), "look")
    assert not seen.ours
    assert 0 < (seen.ends_in_s or 0) <= TERM


def test_one_who_was_slow_takes_no_number_that_is_over(
    tmp_path: Path, root: StoreRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He read a number, and when he makes the next one, that has been used and removed."""
    lease.take(root, "web", host(tmp_path, "one"))
    aged(root, TERM + 1)
    made = lease._made
    quick: list[Held] = []

    def slow(path: Path, to: Path, mine: lease.Lease) -> bool:
        if mine.host == "two" and not quick:
            quick.append(lease.take(root, "web", host(tmp_path, "three")))
            quick[0].check()
            quick[0].check()
            assert numbers(root)[0] == "00000004.json"
            assert to.name == "00000002.json"
        return made(path, to, mine)

    monkeypatch.setattr(lease, "_made", slow)
    with pytest.raises(LeaseHeld, match="the host three"):
        lease.take(root, "web", host(tmp_path, "two"))
    quick[0].check()
    assert numbers(root) == ["00000005.json"]
