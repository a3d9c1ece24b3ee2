"""Bringing a VM back from a pair: new overlays, a new QEMU, and the state of that instant."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qmpsnap.engine import configuration, dependents
from qmpsnap.engine.capture import Report
from qmpsnap.engine.half import Pair, open_pair
from qmpsnap.engine.listing import find
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.spool import MACHINE
from qmpsnap.errors import (
    BaseChanged,
    Blocked,
    HalfMissing,
    LocalFailed,
    MigrationFailed,
    MonitorLost,
    UsageError,
)
from qmpsnap.host import journal, qemu_img
from qmpsnap.hypervisor.guest import quiesce, runstate
from qmpsnap.hypervisor.machine.launch import Launched, launched
from qmpsnap.hypervisor.machine.relocate import Relocated, relocate
from qmpsnap.hypervisor.monitor import Monitor, connect
from qmpsnap.hypervisor.vmstate.load import load
from qmpsnap.ids import disk_labels
from qmpsnap.shield import finish
from qmpsnap.store import image as frozen
from qmpsnap.store.manifest import Storage
from qmpsnap.store.points import Points
from qmpsnap.store.points import read as read_points

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Restoration:
    """How to restore. *to*: a folder that is empty or not there yet, for all that is new.

    *cold*: boot from the disks, without the RAM. *standalone*: full copies instead of overlays.
    *qmp*: where the new QEMU's monitor listens (default: qmp.sock in *to*). *qemu*: another
    QEMU binary than the captured one. *isolated*: its network cards lead nowhere.
    """

    to: Path
    cold: bool = False
    standalone: bool = False
    revision: int | None = None
    qmp: Path | None = None
    qemu: Path | None = None
    isolated: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """Images are built, nothing runs yet: *argv* would start it."""

    pair: Pair
    wish: Restoration
    relocated: Relocated
    qmp: Path

    @property
    def argv(self) -> list[str]:
        return self.relocated.cmdline.argv()

    @property
    def notices(self) -> list[str]:
        return self.relocated.notices

    @property
    def log(self) -> Path:
        return self.wish.to / "qemu.log"


@dataclass(frozen=True, slots=True)
class Restored:
    """A machine that is back. *process* ends with us, or is on its own, as was asked."""

    ready: Ready
    machine: Machine
    process: Launched

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
            "to": str(self.ready.wish.to),
            "moved": self.ready.relocated.moved,
            "notices": self.ready.notices,
        }


async def prepared(roots: Roots, vm: str, word: str, wish: Restoration, report: Report) -> Ready:
    """Check the pair and build the images. The snapshot is never written to.

    Raises SnapshotUnknown, HalfMissing, BaseChanged and their kin for what is on disk, Blocked
    for a machine that cannot be brought back, UsageError for a *to* that is not empty.
    """
    pair = await open_pair(roots, await find(roots, vm, word))
    points = await asyncio.to_thread(read_points, roots.local, vm)
    pair = replace(pair, storage=_revision(pair, points, wish))
    _refuse(pair, wish)
    await asyncio.to_thread(_unchanged, pair, points)
    text = await pair.read(MACHINE)
    machine = configuration.decode(text, f"{vm}/{pair.id}/{MACHINE}")
    if not wish.cold:
        _refuse_hotplugged(machine)
    await asyncio.to_thread(_make_folder, wish.to)
    try:
        ready = _ready(pair, wish, machine)
        await _images(pair, wish, report)
    except BaseException:
        await finish(asyncio.to_thread(_unmade, pair, wish.to), within=60)
        raise
    return ready


@asynccontextmanager
async def restored(
    ready: Ready, report: Report, *, detach: bool = False
) -> AsyncIterator[Restored]:
    """The machine of *ready*, running (or paused, if it was) for the block; for good if *detach*.

    Raises LaunchFailed, MigrationFailed with QEMU's last words, DamagedData; what was built is
    removed then.
    """
    begun = False
    try:
        async with launched(
            ready.argv,
            directory=ready.wish.to,
            log=ready.log,
            lifetime="detached" if detach else "with-us",
        ) as process:
            try:
                async with connect(ready.qmp) as monitor:
                    await _brought_up(ready, monitor, process, report)
            except BaseException:
                await finish(process.kill(), within=10)
                raise
            begun = True
            machine = Machine(ready.pair.vm, ready.qmp, ready.relocated.agent)
            yield Restored(ready, machine, process)
    except BaseException:
        if not begun:
            await finish(asyncio.to_thread(_unmade, ready.pair, ready.wish.to), within=60)
        raise


async def _brought_up(ready: Ready, monitor: Monitor, process: Launched, report: Report) -> None:
    if ready.wish.cold:
        return

    async def feed(fd: int) -> None:
        await ready.pair.load(fd, report)

    try:
        await load(monitor, feed)
    except MonitorLost as died:
        # before 9.1 a QEMU that cannot load exits; its stderr has the reason
        words = await asyncio.to_thread(_last_line, process.log)
        raise MigrationFailed(f"QEMU did not take the state: {words}") from died
    manifest = ready.pair.manifest
    if manifest.was == "running":
        await runstate.let_run(monitor)
    if manifest.frozen and ready.relocated.agent is not None:
        # frozen in the saved RAM, thawed only in the machine that went on
        await quiesce.Freezer(ready.relocated.agent).thaw()


def _revision(pair: Pair, points: Points, wish: Restoration) -> Storage:
    """The storage that is wanted: without a word the RAM's own, or for a cold boot the newest."""
    there = {one.storage.revision: one.storage for one in points if one.storage.id == pair.id}
    number = wish.revision if wish.revision is not None else max(there) if wish.cold else 0
    if number not in there:
        known = ", ".join(map(str, sorted(there)))
        raise Blocked(f"{pair.vm} {pair.id} has no revision {number}; there are: {known}")
    return there[number]


def _refuse(pair: Pair, wish: Restoration) -> None:
    if pair.manifest.ram.mode == "none" and not wish.cold:
        raise Blocked(f"{pair.vm} {pair.id} was taken without RAM", hint="`--cold` boots its disks")
    if pair.storage.revision and not wish.cold:
        raise Blocked(
            f"the RAM of {pair.vm} {pair.id} is of the instant of revision 0: with the disks of "
            f"revision {pair.storage.revision} its file systems would be destroyed",
            hint="`--cold` boots that revision; without --revision the RAM comes back",
        )


def _refuse_hotplugged(machine: configuration.Configuration) -> None:
    if strange := [*machine.hotplugged, *machine.unplugged]:
        raise Blocked(
            f"devices were plugged or unplugged at run time: {', '.join(strange)}; "
            "their state cannot be loaded into a machine of the command line",
            hint="`--cold` boots the disks",
        )


def _unchanged(pair: Pair, points: Points) -> None:
    point = points.by_name.get(pair.storage.point)
    for disk in pair.storage.disks:
        for one in points.images(point, disk.label) if point else disk.chain:
            if difference := frozen.changed(one):
                raise BaseChanged(f"disk {disk.device} of {pair.vm} {pair.id}: {difference}")


def _ready(pair: Pair, wish: Restoration, machine: configuration.Configuration) -> Ready:
    line, cwd = machine.command_line()
    qmp = wish.qmp or wish.to / "qmp.sock"
    relocated = relocate(
        line,
        cwd=cwd,
        into=wish.to,
        machine_type=machine.machine_type,
        disks=_places(pair, wish.to),
        incoming=not wish.cold,
        paused=False,
        qmp=qmp,
        isolated=wish.isolated,
    )
    binary = wish.qemu or Path(relocated.cmdline.binary)
    if not binary.exists():
        found = shutil.which(binary.name)
        if found is None:
            raise Blocked(f"the QEMU of the snapshot, {binary}, is not on this host")
        binary = Path(found)
    cmdline = type(relocated.cmdline)(str(binary), relocated.cmdline.options)
    return Ready(
        pair,
        wish,
        Relocated(cmdline, relocated.notices, relocated.moved, relocated.agent),
        qmp,
    )


def _places(pair: Pair, to: Path) -> Mapping[str, Path]:
    """Each disk's new image by its name on the command line."""
    places = {disk.origin: to / f"{disk.label}.qcow2" for disk in pair.storage.disks}
    empty = [left for left in pair.storage.left_out if left.virtual_size_bytes is not None]
    for left, label in zip(empty, disk_labels([left.device for left in empty]), strict=True):
        places[left.origin] = to / f"{label}.empty.qcow2"
    return places


async def _images(pair: Pair, wish: Restoration, report: Report) -> None:
    places = _places(pair, wish.to)
    if not wish.standalone:
        images = [str(places[disk.origin]) for disk in pair.storage.disks]
        note = dependents.Dependent(folder=str(wish.to), images=images)
        await asyncio.to_thread(dependents.note, pair.roots.local, pair.vm, pair.id, note)
        # `delete` writes down what it will do before it looks for dependents, as we do before we
        # look for it: one of the two sees the other
        owed = await asyncio.to_thread(journal.pending, pair.roots.local.journal(pair.vm))
        if any(one.id == pair.id for one in owed):
            raise HalfMissing(f"{pair.vm} {pair.id} is being deleted")
    for disk in pair.storage.disks:
        top, place = disk.chain[0], places[disk.origin]
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
            await qemu_img.create(places[left.origin], left.virtual_size_bytes)
            log.warning("disk %s was left out (%s): it is empty", left.device, left.reason)


def _make_folder(to: Path) -> None:
    try:
        to.mkdir(0o700, parents=True, exist_ok=True)
        if any(to.iterdir()):
            raise UsageError(f"{to} is not empty")
    except OSError as failed:
        raise LocalFailed(f"{to}: {failed.strerror}") from failed


def _unmade(pair: Pair, to: Path) -> None:
    for path in to.iterdir():
        path.unlink(missing_ok=True)
    dependents.forget(pair.roots.local, pair.vm, pair.id, to)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return lines[-1] if lines else "it said nothing"
