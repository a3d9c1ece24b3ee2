"""Deleting a snapshot: both halves go, and overlays that nobody needs are folded back."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import msgspec

from qmpsnap.engine import dependents, survey
from qmpsnap.engine.listing import find
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.protect import refuse_protected
from qmpsnap.engine.roots import Roots, claimant, judge
from qmpsnap.engine.unkept import fold_unkept
from qmpsnap.errors import (
    LocalFailed,
    MonitorAbsent,
    MonitorBusy,
    Refused,
    StoreError,
    StoreRefused,
    VmBusy,
    VmUnknown,
)
from qmpsnap.host import journal, lock
from qmpsnap.hypervisor.block import job
from qmpsnap.hypervisor.guest import runstate
from qmpsnap.hypervisor.monitor import Monitor, connect
from qmpsnap.store import hurt, pages, shared
from qmpsnap.store.files import sync_folder
from qmpsnap.store.layout import KEPT, STORAGE
from qmpsnap.store.points import read as read_points

log = logging.getLogger(__name__)


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    """*folded*: overlay files that went back into what lay beneath. *why*: why none did."""

    id: str
    vm: str
    folded: list[str]
    why: str


async def delete(roots: Roots, machine: Machine, word: str) -> Deleted:
    """Remove both halves of one snapshot, the store half first.

    A running VM's overlays go back into the files beneath that no other snapshot keeps. Without
    a VM they stay where they are: its disks are read through them.

    Raises Refused when it is protected or restored machines stand on it, VmBusy and MonitorBusy;
    StoreRefused and StoreError when the store half cannot be removed: the local half is whole then.
    """
    vm = machine.name
    async with lock.held(roots.local.lock(vm), "delete"):
        entry = await find(roots, vm, word)
        await asyncio.to_thread(refuse_protected, roots.local, vm, entry.id)
        await asyncio.to_thread(_refuse_standing, roots, vm, entry.id)
        async with met(machine) as (monitor, why):
            if monitor is not None and (busy := await job.at_work(monitor)):
                raise VmBusy(f"QEMU is busy with {', '.join(one.id for one in busy)}")
            debt = await asyncio.to_thread(owed, roots.local.journal(vm), vm, entry.id)
            try:
                await asyncio.to_thread(_refuse_standing, roots, vm, entry.id)
                await removed(roots, vm, entry.id)
            except (Refused, StoreError):
                # the local half is whole: a debt would only stand in the way of the next `create`
                await asyncio.to_thread(debt.close)
                raise
            folded = (
                await fold_unkept(roots, machine, monitor, [debt]) if monitor is not None else []
            )
            await asyncio.to_thread(debt.close)
        return Deleted(id=entry.id, vm=vm, folded=folded, why=why)


def _refuse_standing(roots: Roots, vm: str, id: str) -> None:
    if standing := dependents.standing(roots.local, vm, id):
        raise Refused(
            f"{vm} {id}: {dependents.in_words(standing)}",
            hint="end or remove them first; `restore --standalone` stands on nothing",
        )


def owed(folder: Path, vm: str, id: str) -> journal.Entry:
    """The debt of this deletion, also when an earlier run of it died half-way."""
    for record in journal.pending(folder):
        if record.id == id:
            if not record.lines or record.lines[0].get("verb") != "delete":
                raise Refused(
                    f"{vm} {id} was cut off while it was taken",
                    hint=f"`qmpsnap recover {vm}` settles that",
                )
            return journal.Journal(folder).reopen(id)
    return journal.Journal(folder).open_entry(id, {"verb": "delete", "phase": "deleting"})


@asynccontextmanager
async def met(machine: Machine) -> AsyncIterator[tuple[Monitor | None, str]]:
    """A session with the VM, held before anything goes; or why there is none."""
    async with AsyncExitStack() as stack:
        try:
            met = await stack.enter_async_context(connect(machine.socket))
        except (MonitorAbsent, VmUnknown) as absent:
            yield None, f"the VM is not running ({absent}): its overlays stay"
            return
        except MonitorBusy as busy:
            raise await asyncio.to_thread(survey.explain_busy, busy, machine.socket) from busy
        await stack.enter_async_context(runstate.io_retried(met))
        yield met, ""


async def removed(roots: Roots, vm: str, id: str, *, sweeping: bool = True) -> None:
    """Both halves are gone afterwards; done twice, it does nothing.

    Without *sweeping*, what they shared stays on the store until it is asked for.

    Raises StoreRefused or StoreError, with the local half whole, when the store is not there: on a
    store that is not mounted there is nothing to remove, and the store half would stay for good.
    """
    await judge(roots)
    # what it waits for in a spool of its own is needed until that is gone
    late = await asyncio.to_thread(roots.local.spool(vm, id).is_dir)
    waiting = await asyncio.to_thread(shared.awaited, roots.local, vm)
    now = sweeping and not late and waiting is not None
    ours = await claimant(roots, vm)
    await roots.store.remove(vm, id, sweep=now, waiting=waiting or (), lease=ours)
    await asyncio.to_thread(_removed_local, roots, vm, id)
    if sweeping and not now:
        try:
            await swept(roots, vm)
        except (StoreError, StoreRefused) as dead:
            log.warning("%s: what snapshots shared stays until the next removal: %s", vm, dead)


async def swept(roots: Roots, vm: str) -> None:
    """What snapshots of *vm* shared, and neither they nor a spool here needs, leaves the store.

    Raises StoreError.
    """
    waiting = await asyncio.to_thread(shared.awaited, roots.local, vm)
    if waiting is None:
        log.warning("%s: what snapshots shared stays: a damaged one here may need it", vm)
    else:
        await roots.store.sweep(vm, waiting=waiting, lease=await claimant(roots, vm))


def _removed_local(roots: Roots, vm: str, id: str) -> None:
    folder = roots.local.snapshot(vm, id)
    pages.forget(roots.local, vm, id)
    try:
        if folder.exists():
            leave(folder)
            for revision in roots.local.revisions(vm, id):
                leave(folder / str(revision))
            if not (folder / KEPT).exists():
                shutil.rmtree(folder)  # it was never sealed
        sweep(roots, vm)
        if roots.local.ids(vm):
            shared.sweep_local(roots.local, vm)
        else:
            shared.forget(roots.local, vm)
            hurt.forget(roots.local, vm)
    except OSError as failed:
        raise LocalFailed(f"{failed.filename}: {failed.strerror}") from failed


def leave(folder: Path) -> None:
    """The point in *folder* is no snapshot any more; its images stay until `sweep`. OSError."""
    if (sealed := folder / STORAGE).exists():
        sealed.rename(folder / KEPT)
        sync_folder(folder)


def sweep(roots: Roots, vm: str) -> list[str]:
    """Remove what was deleted and nobody stands on any more; the points that others stand on.

    With a damaged one that is a snapshot, or that others stand on, nothing goes: it may stand on
    any of them. Raises OSError, LocalFailed.
    """
    _remove_empty(roots, vm)
    points = read_points(roots.local, vm)
    listed = {point.name for point in points if not point.kept}
    needed = points.needed(listed)
    beneath = {disk.parent for name in needed for disk in points.by_name[name].storage.disks}
    for name, why in points.damaged.items():
        if name in beneath or (roots.local.point(vm, name) / STORAGE).exists():
            log.warning("%s: no image is removed, since %s", vm, why)
            return sorted(needed - listed)
    gone = [name for name in (*points.by_name, *points.damaged) if name not in needed]
    for name in sorted(gone, key=len, reverse=True):  # revisions before their snapshots
        id, _, revision = name.partition("/")
        holds = {one for one in needed if one.partition("/")[0] == id}
        folder = roots.local.point(vm, name)
        if revision or not holds:
            _remove(folder)
    return sorted(needed - listed)


def _remove_empty(roots: Roots, vm: str) -> None:
    """The folders that a removal has left which was cut off before its last step."""
    for id in roots.local.ids(vm):
        folder = roots.local.snapshot(vm, id)
        for one in (
            *(folder / str(revision) for revision in roots.local.revisions(vm, id)),
            folder,
        ):
            with suppress(OSError):  # it is not empty
                one.rmdir()


def _remove(folder: Path) -> None:
    # while `kept.json` is there, what a crash leaves is known for what it is
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != KEPT:
            path.unlink()
    shutil.rmtree(folder)
