"""The guest's own writes lack the room that its RAM, or somebody else, has taken.

QEMU stops a guest whose write finds no room, and lets nobody know but its monitor.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.wishes import Quiesce, RamChoice
from qmpsnap.errors import LocalFailed
from qmpsnap.host import journal
from tests.faults import child
from tests.faults.bench import wishes
from tests.rig.graph import chains, status
from tests.rig.guest import Guest, blockdev, booted, disk
from tests.rig.qemu import binary
from tests.rig.room import filled, room
from tests.rig.wire import Fault, Wire, wired

_WRITE = "dd if=/dev/zero of=/data/0/big bs=1M count=24 conv=fsync"
_DISKS = wishes(RamChoice.NONE, quiesce=Quiesce.NONE)
_LEFT = 16 << 20  # bytes: neither the guest's RAM nor what it writes has room there


@dataclass(frozen=True, slots=True)
class Scene:
    """A guest that writes, behind *wire*, and a local root of its own file system."""

    guest: Guest
    wire: Wire
    local: Path
    store: Path

    @property
    def engine(self) -> Engine:
        return Engine(self.local, self.store, allow_local_store=True)

    @property
    def clean(self) -> Machine:
        return Machine("vm", self.guest.qmp)

    async def stopped_by_a_write(self) -> asyncio.Task[str]:
        """The guest was let run, and its write has found no room; the write."""
        assert await asyncio.to_thread(self.wire.happened.wait, 60)
        writing = asyncio.create_task(self.guest.console.run(_WRITE, within=120))
        async with asyncio.timeout(60):
            while await self.status() != "io-error":  # noqa: ASYNC110 - a monitor tells when asked
                await asyncio.sleep(0.01)
        assert os.statvfs(self.local).f_bavail * 4096 < _LEFT
        return writing

    async def is_well(self, writing: asyncio.Task[str]) -> None:
        """It goes on, and nothing that it wrote was lost."""
        assert await self.status() == "running"
        await writing
        assert (await self.guest.console.witness(within=60)).ok
        assert self.guest.console.alarms == []
        assert journal.pending(self.local / "vm/journal") == []
        assert await self.status() == "running"

    async def status(self) -> str:
        return await status(self.guest.qemu.witness)

    async def top(self) -> Path:
        return Path((await chains(self.guest.qemu.witness))["vd0"][0])


@asynccontextmanager
async def scene(version: str, short: Path, store: Path) -> AsyncIterator[Scene]:
    image = disk(short / "d0.qcow2")
    drive = blockdev(image, "d0", "qcow2", device="vd0")
    with room(short / "local", 400 << 20) as local:
        async with booted(binary(version), short, disks=drive) as guest:
            with wired(short / "wire", guest.qmp) as wire:
                yield Scene(guest, wire, local, store)


@pytest.mark.parametrize("version", ["7.2", "10.0"])
async def test_it_goes_on_when_its_ram_could_not_be_saved(
    version: str, short: Path, store: Path
) -> None:
    async with scene(version, short, store) as it:
        own = await it.top()
        filler = filled(it.local, leave=_LEFT)
        it.wire.arm(Fault("cont", held=True))
        making = asyncio.create_task(
            it.engine.create(Machine("vm", it.wire.path), wishes(RamChoice.PAUSED))
        )
        writing = await it.stopped_by_a_write()
        it.wire.release()
        with pytest.raises(LocalFailed, match="No space left") as failed:
            await making
        assert failed.value.exit_code == 4
        await it.is_well(writing)
        assert await it.top() == own
        filler.unlink()
        made = await it.engine.create(it.clean, wishes(RamChoice.PAUSED))  # the control
        assert made.id in str(await it.top())
        assert await it.status() == "running"


async def test_it_goes_on_when_what_took_its_room_is_gone_in_time(short: Path, store: Path) -> None:
    async with scene("7.2", short, store) as it:
        filler = filled(it.local, leave=4 << 20)
        it.wire.arm(Fault("cont", held=True))
        making = asyncio.create_task(it.engine.create(Machine("vm", it.wire.path), _DISKS))
        writing = await it.stopped_by_a_write()
        filler.unlink()
        it.wire.release()
        made = await making
        assert made.id in str(await it.top())
        await it.is_well(writing)


async def test_it_goes_on_after_a_deletion(short: Path, store: Path) -> None:
    async with scene("7.2", short, store) as it:
        own = await it.top()
        made = await it.engine.create(it.clean, _DISKS)
        # not before: what is deleted makes room
        fill = partial(filled, it.local, leave=4 << 20)
        it.wire.arm(Fault("block-commit", held=True, then=fill))
        deleting = asyncio.create_task(it.engine.delete(Machine("vm", it.wire.path), made.id))
        writing = await it.stopped_by_a_write()
        (it.local / "filler").unlink()
        it.wire.release()
        await deleting
        assert await it.top() == own
        await it.is_well(writing)


async def test_recover_lets_it_go_on_when_the_engine_was_killed(short: Path, store: Path) -> None:
    async with scene("7.2", short, store) as it:
        own = await it.top()
        filled(it.local, leave=_LEFT)
        with child.engine(
            qmp=it.wire.path, local=it.local, store=it.store, ram=RamChoice.PAUSED
        ) as process:
            it.wire.arm(Fault("cont", then=process.kill))
            assert await child.outcome(process) == {}
        assert process.returncode == -signal.SIGKILL
        writing = await it.stopped_by_a_write()
        (settled,) = await it.engine.recover(it.clean)
        assert "the guest was continued after an I/O error" in settled.did
        await it.is_well(writing)
        assert await it.top() == own
