"""A test guest with most of its RAM touched: running, or captured, as a stream and as a pair."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from qmpsnap import Engine, Machine
from qmpsnap.engine.wishes import Level, Wishes
from scripts.bare import Qmp
from scripts.bare_restore import Whole, go_on, piped
from tests.rig.guest import Guest, blockdev, booted, disk
from tests.rig.qemu import binaries

VM = "bench"
WISHES = Wishes(level=Level.OVERLAY, max_pause=60)
_LEFT = 40  # MiB of the guest's three quarters that stay free


@dataclass(frozen=True, slots=True)
class Scene:
    """A guest that runs, and an engine."""

    guest: Guest
    engine: Engine
    folder: Path
    version: str
    mib: int

    @property
    def machine(self) -> Machine:
        return Machine(VM, self.guest.qmp, self.guest.agent)


@dataclass(frozen=True, slots=True)
class Captured:
    """A guest that is gone, and its two captures."""

    whole: Whole
    engine: Engine
    id: str
    folder: Path
    version: str


@contextlib.asynccontextmanager
async def running(version: str, mib: int, root: Path, *, free: int = 0) -> AsyncIterator[Scene]:
    """A guest of *mib* MiB on one disk; an eighth of its RAM is noise, most of it compresses.

    *free*: MiB that are left for a load. The files are in a folder in *root* that goes with it.
    """
    with tempfile.TemporaryDirectory(prefix="qb", dir=root) as name:
        async with _booted(version, mib, Path(name), free) as it:
            yield it


@contextlib.asynccontextmanager
async def captured(version: str, mib: int, root: Path) -> AsyncIterator[Captured]:
    """The captures of such a guest, for the block; the guest's own memory is free again."""
    with tempfile.TemporaryDirectory(prefix="qb", dir=root) as name:
        folder = Path(name)
        image, stream = folder / "then.qcow2", folder / "whole"
        async with _booted(version, mib, folder, 0) as it:
            # what it does a thousand times a second would keep twenty of them from running
            await it.guest.console.run("killall heartbeat", within=10)
            await asyncio.to_thread(_keep, it, image, stream)
            made = await it.engine.create(it.machine, WISHES)
        whole = Whole(binaries()[version], mib, image, stream)
        yield Captured(whole, it.engine, made.id, folder, version)


@contextlib.asynccontextmanager
async def _booted(version: str, mib: int, folder: Path, free: int) -> AsyncIterator[Scene]:
    engine = Engine(folder / "local", folder / "store", allow_local_store=True)
    for path in (engine.roots.local.path, engine.roots.store.root.path):
        path.mkdir()
    disks = blockdev(disk(folder / "d0.qcow2"), "d0", "qcow2", device="vd0")
    noise = mib // 8
    async with booted(binaries()[version], folder, disks=disks, memory=mib) as guest:
        command = f"dd if=/dev/urandom of=/noise bs=1M count={noise}"
        await guest.console.run(command, within=60 + noise)
        await guest.console.run(f"fill {mib * 3 // 4 - noise - _LEFT - free}", within=300)
        yield Scene(guest, engine, folder, version, mib)


def _keep(it: Scene, image: Path, stream: Path) -> None:
    qmp = Qmp(it.guest.qemu.witness)
    try:
        qmp("stop")
        piped(qmp, ["cat"], stream)
        shutil.copyfile(it.folder / "d0.qcow2", image)
        go_on(qmp)
    finally:
        qmp.close()
