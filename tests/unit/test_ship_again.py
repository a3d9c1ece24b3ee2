"""A delivery that the store breaks off is tried again, as long as that gets it anywhere."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from qmpsnap.engine import ship
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import NotShipped, StoreAway, StoreError, StoreStalled
from qmpsnap.store import files, wire
from qmpsnap.store.layout import StoreRoot
from qmpsnap.store.wire import Shipped
from tests.rig.halves import ID, names
from tests.unit.test_store_lease import quiet, roots, spooled

DONE = Shipped(manifest_blake3="", bytes=1)


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses, none of which is waited for; the loop's clock goes on by each."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(ship, "_sleep", sleep)
    monkeypatch.setattr(ship, "_now", lambda: time.monotonic() + sum(pauses))
    return pauses


async def test_pauses_grow_until_it_is_given_up(paused: list[float]) -> None:
    async def tried() -> Shipped:
        raise StoreStalled("no progress")

    with pytest.raises(StoreStalled):
        await ship._persistently(tried, [], 60)
    assert paused == [1, 2, 4, 8, 16]
    paused.clear()
    with pytest.raises(StoreStalled):
        await ship._persistently(tried, [], 0)
    assert paused == []


async def test_who_gets_further_goes_on(paused: list[float]) -> None:
    arrived: list[int] = []

    async def tried() -> Shipped:
        if len(paused) % 4 == 3:
            arrived.append(1)
        if len(arrived) == 5:
            return DONE
        raise StoreAway("EIO")

    assert await ship._persistently(tried, arrived, 20) == DONE
    assert paused == [1, 2, 4, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
async def test_a_store_that_says_no_is_not_asked_twice(
    paused: list[float], tmp_path: Path, number: int
) -> None:
    async def tried() -> Shipped:
        with files.told(tmp_path, StoreError):
            raise OSError(number, "no")
        return DONE

    with pytest.raises(StoreError):
        await ship._persistently(tried, [], 60)
    assert paused == []


def test_what_may_pass_is_told_from_what_stays() -> None:
    for number, kind in ((errno.ESTALE, StoreAway), (errno.EIO, StoreAway), (28, StoreError)):
        with pytest.raises(StoreError) as failed, files.told(Path("x"), StoreError):
            raise OSError(number, "odd")
        assert type(failed.value) is kind
        assert type(wire.error(wire.trouble(failed.value))) is kind


async def test_a_worker_that_hangs_is_left_and_the_next_one_goes_on(
    tmp_path: Path, paused: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    one: Roots = roots(tmp_path, StoreRoot(tmp_path / "store"), "one")
    spooled(one.local)
    sent, tries = one.store.ship, 0

    async def ship_(*words: object, **more: object) -> Shipped:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise StoreStalled("no progress for 30 s")
        return await sent(*words, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(one.store, "ship", ship_)
    delivered = await ship.ship(one, "web", ID, quiet)
    assert (delivered.id, paused) == (ID, [1, 2])
    assert not one.local.spool("web", ID).exists()


async def test_given_up_with_the_spool_whole(tmp_path: Path, paused: list[float]) -> None:
    root = StoreRoot(tmp_path / "store")
    root.path.mkdir()
    one = roots(tmp_path, root, "one")
    spool = spooled(one.local)
    one.store.within, one.store.command = 0.2, ("sleep", "60")
    before = sorted(spool.rglob("*"))
    with pytest.raises(NotShipped, match=r"no progress for 0\.2 s") as waiting:
        await ship.ship(one, "web", ID, quiet)
    assert waiting.value.exit_code == 5
    assert len(paused) > 3
    assert sorted(spool.rglob("*")) == before
    assert names(root.path) == []
