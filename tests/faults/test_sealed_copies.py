"""A copy that is encrypted is broken off: nothing of it is left, and nothing is lost."""

from __future__ import annotations

import asyncio
import subprocess
import time
from pathlib import Path

import pytest

from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Copying, Encrypt, Level, RamChoice, Wishes
from qmpsnap.errors import Failed
from tests.faults.bench import Bench, bench, wishes

_DATA = range(64, 128)
_SLOW = 1 << 17  # bytes a second: the copy of _DATA takes half a minute a disk


def _wish(level: Level, limit: int | None = None) -> Wishes:
    copying = Copying(limit=limit)
    return wishes(RamChoice.NONE, level=level, encrypt=Encrypt.ALL, copying=copying)


async def _holds(it: Bench, id: str) -> dict[str, bytes]:
    """The disks of a snapshot, as qemu-img reads them off what a restore has built."""
    to, found = it.local.parent / "back", {}
    await it.engine().prepare_restore("vm", Restoration(to, cold=True), id)
    for disk in it.model:
        raw = to.with_suffix(f".{disk}")
        read = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", to / f"{disk}.qcow2", raw]
        await asyncio.to_thread(subprocess.run, read, check=True)
        found[disk] = raw.read_bytes()
        raw.unlink()
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("level", [Level.FULL, Level.INC])
async def test_called_off_in_the_middle(
    level: Level, qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        await it.engine().create(it.clean, _wish(Level.FULL))
        it.guest_writes(*_DATA)
        making = asyncio.create_task(it.engine().create(it.clean, _wish(level, _SLOW)))
        path = await it.copying()
        assert ".sealed" in path.name
        it.guest_writes(10)
        begun = time.monotonic()
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        assert time.monotonic() - begun < 20
        assert it.owes() == []
        it.nothing_of_a_copy_is_left()
        it.guest_is_free()
        made = await it.engine().create(it.clean, _wish(Level.INC))
        state = it.disks_now()
        it.guest_writes(11)
        assert await _holds(it, made.id) == state
        assert [one.findings async for one in it.engine().verify_all("vm")] == [[], []]


@pytest.mark.timeout(240)
async def test_qemu_ends_in_the_middle(qemu72: Path, short: Path, store: Path) -> None:
    async with bench(qemu72, short, store) as it:
        first = await it.engine().create(it.clean, _wish(Level.FULL))
        state = it.disks_now()
        it.guest_writes(*_DATA)
        making = asyncio.create_task(it.engine().create(it.clean, _wish(Level.INC, 1 << 20)))
        await it.copying()
        it.guest_writes(10)
        it.qemu.kill()
        with pytest.raises(Failed):
            await making
        assert list(it.local.rglob("*.partial*")) == []
        assert await _holds(it, first.id) == state
