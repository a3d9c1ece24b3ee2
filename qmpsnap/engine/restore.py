"""Bringing a VM back from a pair: new overlays, a new QEMU, and the state of that instant."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from qmpsnap.child import Lifetime
from qmpsnap.engine import (
    arrivals,
    companion,
    dependents,
    feeding,
    fitness,
    ramback,
    restoration,
)
from qmpsnap.engine.capture import Report
from qmpsnap.engine.half import Pair
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.restoration import Ready as Ready
from qmpsnap.engine.restoration import Restoration as Restoration
from qmpsnap.engine.restoration import places, refuse_folder
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.unsealing import is_sealed, unsealed
from qmpsnap.errors import HalfMissing, LocalFailed, MigrationFailed, MonitorLost
from qmpsnap.host import cage, journal, qemu_img, swtpm
from qmpsnap.hypervisor.guest import quiesce, runstate
from qmpsnap.hypervisor.machine.launch import Launched, launched
from qmpsnap.hypervisor.monitor import Monitor, connect
from qmpsnap.shield import finish
from qmpsnap.store.points import read as read_points

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Restored:
    """A machine that is back. *process* ends with us, or is on its own, as was asked.

    *groups*: the folders of the control groups that were made for it. *ram*: the way that its RAM
    came back, None after a cold boot. *arriving*: the file that tells how much of it is there,
    which goes when all is.
    """

    ready: Ready
    machine: Machine
    process: Launched
    groups: tuple[Path, ...] = ()
    ram: ramback.Way | None = None
    arriving: Path | None = None

    def shown(self) -> dict[str, Any]:
        """What `restore --json` prints."""
        pair = self.ready.pair
        return {
            "id": pair.id,
            "vm": pair.vm,
            "pid": self.process.pid,
            "qmp": str(self.machine.qmp),
            "agent": str(self.machine.agent) if self.machine.agent else None,
            "cold": self.ready.wish.cold,
            "ram": self.ram.value if self.ram is not None else None,
            "arriving": str(self.arriving) if self.arriving is not None else None,
            "to": str(self.ready.wish.to),
            "moved": self.ready.relocated.moved,
            "notices": self.ready.notices,
            "signature": pair.signed.verdict if pair.signed is not None else None,
            "limits": [msgspec.structs.asdict(one) for one in self.ready.limits],
            "groups": list(map(str, self.groups)),
        }


async def prepared(roots: Roots, vm: str, word: str, wish: Restoration, report: Report) -> Ready:
    """Check the pair and this host, and build the images. The snapshot is never written to.

    Raises SnapshotUnknown, HalfMissing, BaseChanged and their kin for what is on disk, Blocked
    for a machine that cannot be brought back here, UsageError for a *to* that is not empty.
    """
    return await built((await fitness.assess(roots, vm, word, wish)).ready(), report)


async def built(ready: Ready, report: Report) -> Ready:
    """*ready*, its images in its folder. Raises what is wrong; nothing is left behind then."""
    wish = ready.wish
    await asyncio.to_thread(_make_folder, wish.to)
    try:
        await _images(ready.pair, wish, ready.memory, report)
        for one in ready.fetched:
            await ready.pair.fetch(one.entry, Path(ready.relocated.moved[one.path]))
        await companion.placed(ready)
        memory = await ramback.filled(ready.pair, ready.memory, wish.to, report)
    except BaseException:
        await finish(asyncio.to_thread(unmade, ready), within=60)
        raise
    return replace(ready, memory=memory)


@asynccontextmanager
async def restored(
    ready: Ready, report: Report, *, detach: bool = False
) -> AsyncIterator[Restored]:
    """The machine of *ready*, running (or paused, if it was) for the block; for good if *detach*.

    Raises LaunchFailed, MigrationFailed with QEMU's last words, DamagedData, and Blocked for a
    control group that the kernel refuses; what was built is removed then.
    """
    begun = False
    lifetime: Lifetime = "detached" if detach else "with-us"
    try:
        async with (
            _caged(ready) as group,
            _accompanied(ready, lifetime),
            _fed(ready) as feeder,
            launched(
                ready.argv,
                directory=ready.wish.to,
                log=ready.log,
                lifetime=lifetime,
                inside=group.words if group else (),
                hold=group.hold if group else (),
                spared=feeder is not None,
            ) as process,
        ):
            try:
                if feeder is not None:
                    feeder.remaining = detach
                async with connect(ready.qmp) as monitor:
                    way = await _brought_up(ready, monitor, process, report, feeder)
            except BaseException:
                if feeder is not None:
                    feeder.remaining = False
                await finish(process.kill(), within=10)
                raise
            begun = True
            if group and detach:
                group.leave()
            machine = Machine(ready.pair.vm, ready.qmp, ready.relocated.agent)
            arriving = None
            if feeder is not None and feeder.remaining and way is ramback.Way.DEMAND:
                arriving = ready.wish.to / arrivals.STATUS
            groups = group.folders if group else ()
            yield Restored(ready, machine, process, groups, way, arriving)
    except BaseException:
        if not begun:
            await finish(asyncio.to_thread(unmade, ready), within=60)
        raise


@asynccontextmanager
async def _caged(ready: Ready) -> AsyncIterator[cage.Cage | None]:
    """The control group of the machine, if it gets one."""
    if ready.site is None:
        yield None
        return
    async with cage.made(ready.site, ready.pair.vm) as group:
        yield group


@asynccontextmanager
async def _accompanied(ready: Ready, lifetime: Lifetime) -> AsyncIterator[None]:
    """What has to be there before QEMU starts is there for the block."""
    if ready.tpm is None:
        yield
        return
    async with swtpm.serving(ready.tpm, log=ready.tpm_log, lifetime=lifetime):
        yield


@asynccontextmanager
async def _fed(ready: Ready) -> AsyncIterator[feeding.Feeder | None]:
    """Who brings the RAM while the guest runs, if that is to be."""
    if ready.wish.cold or ready.memory.way is not ramback.Way.DEMAND:
        yield None
        return
    async with feeding.begun(ready.pair, ready.wish.to) as feeder:
        yield feeder


async def _brought_up(
    ready: Ready,
    monitor: Monitor,
    process: Launched,
    report: Report,
    feeder: feeding.Feeder | None,
) -> ramback.Way | None:
    if ready.wish.cold:
        return None

    manifest = ready.pair.manifest

    async def on_running() -> None:
        if manifest.was == "running":
            await runstate.let_run(monitor)
        if manifest.frozen and ready.relocated.agent is not None:
            # frozen in the saved RAM, thawed only in the machine that went on
            await quiesce.Freezer(ready.relocated.agent).thaw()

    try:
        return await ramback.loaded(
            ready.pair, ready.memory, monitor, ready.wish.to, on_running, report,
            feeder=feeder, process=process,
        )  # fmt: skip
    except MonitorLost as died:
        # before 9.1 a QEMU that cannot load exits; its stderr has the reason
        words = await asyncio.to_thread(_last_words, process.log)
        raise MigrationFailed(f"QEMU did not take the state: {words}") from died


async def _images(pair: Pair, wish: Restoration, memory: ramback.Memory, report: Report) -> None:
    where = places(pair, wish.to)
    points = await asyncio.to_thread(read_points, pair.roots.local, pair.vm)
    chains = {disk.label: restoration.images(pair, points, disk) for disk in pair.storage.disks}
    apart = {label for label, one in chains.items() if wish.standalone or is_sealed(one)}
    images = [str(where[disk.origin]) for disk in pair.storage.disks if disk.label not in apart]
    if not images and memory.way is ramback.Way.DEMAND:
        images = [str(memory.folder)]  # it needs the snapshot for as long as its RAM comes
    if images:
        note = dependents.Dependent(folder=str(wish.to), images=images)
        await asyncio.to_thread(dependents.note, pair.roots.local, pair.vm, pair.id, note)
        # `delete` writes down what it will do before it looks for dependents, as we do before we
        # look for it: one of the two sees the other
        owed = await asyncio.to_thread(journal.pending, pair.roots.local.journal(pair.vm))
        if any(one.id == pair.id for one in owed):
            raise HalfMissing(f"{pair.vm} {pair.id} is being deleted")
    for disk in pair.storage.disks:
        top, place, chain = disk.chain[0], where[disk.origin], chains[disk.label]
        if is_sealed(chain):
            told = f"decrypting {disk.device}"
            await unsealed(pair.vm, chain, pair.roots.secrets, place, told, report)
            continue
        if not wish.standalone:
            await qemu_img.create_overlay(
                place, Path(top.path), top.format, disk.virtual_size_bytes
            )
            continue

        def tell(part: float, size: int = disk.virtual_size_bytes, name: str = disk.device) -> None:
            report(f"copying {name}", int(part * size), size)

        await qemu_img.convert(Path(top.path), top.format, place, "qcow2", tell)
    for left in pair.storage.left_out:
        if left.virtual_size_bytes is not None:
            await qemu_img.create(where[left.origin], left.virtual_size_bytes)
            log.warning("disk %s was left out (%s): it is empty", left.device, left.reason)


def _make_folder(to: Path) -> None:
    try:
        to.mkdir(0o700, parents=True, exist_ok=True)
    except OSError as failed:
        raise LocalFailed(f"{to}: {failed.strerror}") from failed
    refuse_folder(to)


def unmade(ready: Ready) -> None:
    """Its folders are empty, and the snapshot has no machine in them any more."""
    pair, wish = ready.pair, ready.wish
    for folder in (wish.to, wish.ram_in):
        if folder is not None and folder.is_dir():
            _emptied(folder)
    dependents.forget(pair.roots.local, pair.vm, pair.id, wish.to)


def _emptied(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _last_words(log: Path) -> str:
    """QEMU's last line; the one before it too where the last only says that it failed."""
    lines = log.read_text(errors="replace").splitlines()[-2:]
    if len(lines) == 2 and "load of migration failed" not in lines[1]:
        del lines[0]
    return "; ".join(lines) or "it said nothing"
