"""The store is dead, or the local root is full: the guest runs on, and nothing is lost."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpsnap.engine.engine import Engine
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.wishes import RamChoice
from qmpsnap.errors import Failed, NotShipped
from qmpsnap.store.layout import LocalRoot, StoreRoot
from qmpsnap.store.remote import Store
from tests.faults.bench import Bench, bench, wishes
from tests.rig.qemu import binary
from tests.rig.room import room
from tests.rig.wire import Fault

_HANGS = (sys.executable, "-c", "import time; time.sleep(600)")
_DIES = (sys.executable, "-c", "raise SystemExit('no such mount')")


def _with_dead_store(it: Bench, command: tuple[str, ...]) -> Engine:
    engine = it.engine()
    dead = Store(StoreRoot(it.store), 0.5, command=command)
    engine.roots = Roots(LocalRoot(it.local), dead, allow_local_store=True)
    return engine


def _moved(store: Path, away: Path) -> None:
    store.rename(away)


async def _states(it: Bench) -> set[str]:
    return {entry.state for entry in await it.engine().list("vm")}


@pytest.mark.parametrize("command", [_HANGS, _DIES], ids=["hangs", "dies"])
async def test_a_store_that_is_dead_all_the_while_leaves_the_snapshot_in_the_spool(
    command: tuple[str, ...], qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        with pytest.raises(NotShipped) as waiting:
            await _with_dead_store(it, command).create(it.clean, wishes(RamChoice.LIVE))
        assert waiting.value.exit_code == 5
        it.guest_is_free()
        assert it.owes() == []
        assert it.halves() == set()
        assert await _states(it) == {"shipping"}
        delivered, failed = await it.engine().ship("vm")
        assert (len(delivered), failed) == (1, [])
        assert await it.all_is_well() == {delivered[0].id}
        assert (await it.engine().verify("vm")).findings == []


async def test_a_store_that_goes_away_after_the_instant_gets_its_half_later(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        away = store.with_name(f"{store.name}.away")
        it.wire.arm(Fault("transaction", held=True, then=lambda: _moved(store, away)))
        it.wire.release()
        try:
            with pytest.raises(NotShipped):
                await it.engine().create(it.wired, wishes(RamChoice.PAUSED))
        finally:
            away.rename(store)
        assert it.wire.happened.is_set()
        assert await _states(it) == {"shipping"}
        made = await it.engine().create(it.clean, wishes(RamChoice.NONE))  # delivers both
        assert len(await it.all_is_well()) == 2
        assert made.state == "paired"


@pytest.fixture
def small(short: Path) -> Iterator[Path]:
    """A local root on a file system of its own that holds 4 MiB."""
    with room(short / "local", "4M") as root:
        yield root


@pytest.mark.parametrize(
    ("version", "ram", "room"),
    [
        ("7.2", RamChoice.NONE, 4 << 10),
        ("7.2", RamChoice.NONE, 100 << 10),
        ("7.2", RamChoice.PAUSED, 500 << 10),
        ("7.2", RamChoice.LIVE, 500 << 10),
        ("11.1", RamChoice.LIVE, 500 << 10),
        ("10.0", RamChoice.BACKGROUND, 500 << 10),
    ],
)
async def test_a_full_local_root_is_named_and_nothing_is_left(
    version: str, ram: RamChoice, room: int, short: Path, small: Path, store: Path
) -> None:
    async with bench(binary(version), short, store) as it:
        before = it.chains()
        filler = small / "filler"
        filler.write_bytes(bytes((4 << 20) - room))
        with pytest.raises(Failed, match=str(small)) as failed:
            await it.engine().create(it.clean, wishes(ram))
        assert failed.value.exit_code == 4
        filler.unlink()
        it.guest_is_free()
        if it.owes():  # a debt that no byte was left for
            await it.engine().recover(it.clean)
        assert await it.all_is_well() == set()
        assert it.chains() == before
        made = await it.engine().create(it.clean, wishes(RamChoice.NONE))  # the control
        assert await it.all_is_well() == {made.id}
