"""`--max-pause` is kept, or the snapshot is given up and the guest is as before."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from qmpsnap.engine.wishes import RamChoice
from qmpsnap.errors import PauseTooLong
from tests.faults.bench import bench, wishes
from tests.rig.qemu import binary
from tests.rig.wire import Fault

_TINY = 0.0005  # seconds: less than one transaction takes


@pytest.mark.parametrize(
    ("version", "ram"),
    [
        ("7.2", RamChoice.NONE),
        ("7.2", RamChoice.PAUSED),
        ("7.2", RamChoice.LIVE),
        ("10.0", RamChoice.BACKGROUND),
        ("11.1", RamChoice.PAUSED),
    ],
)
async def test_a_pause_that_would_be_too_long_is_called_off(
    version: str, ram: RamChoice, short: Path, store: Path
) -> None:
    async with bench(binary(version), short, store) as it:
        before = it.chains()
        with pytest.raises(PauseTooLong):
            await it.engine().create(it.clean, wishes(ram, max_pause=_TINY))
        assert await it.all_is_well() == set()
        assert it.chains() == before
        made = await it.engine().create(it.clean, wishes(ram))  # the control
        assert await it.all_is_well() == {made.id}
        assert made.pause_ms > _TINY * 1000


def _wait(never: threading.Event) -> None:
    never.wait(1)


async def test_the_bound_is_kept_while_the_guest_is_held_not_judged_afterwards(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        never = threading.Event()
        # a transaction whose answer takes a second
        it.wire.arm(Fault("transaction", held=True, then=lambda: _wait(never)))
        it.wire.release()
        with pytest.raises(PauseTooLong):
            await it.engine().create(it.wired, wishes(RamChoice.PAUSED, max_pause=0.5))
        assert it.wire.happened.is_set()
        assert "migrate" not in it.wire.names
        assert await it.all_is_well() == set()
