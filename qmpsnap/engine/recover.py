"""Bringing a crash to a known state: what the journal still owes is paid or undone."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from qmpsnap.engine import arrivals, delete, dependents, folds, layers
from qmpsnap.engine.levels import newest_bitmaps
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.phase import Phase
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.unkept import fold_unkept
from qmpsnap.errors import (
    UNREADABLE,
    LocalFailed,
    ManifestError,
    Refused,
    SnapError,
    StoreError,
    StoreRefused,
)
from qmpsnap.host import journal
from qmpsnap.host import process as host_process
from qmpsnap.host.process import ProcessFacts
from qmpsnap.hypervisor import abilities
from qmpsnap.hypervisor.block import bitmap, fold
from qmpsnap.hypervisor.guest import quiesce, runstate
from qmpsnap.hypervisor.machine.inventory import Cpu
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.hypervisor.nbd import dirty
from qmpsnap.hypervisor.vmstate import migration, target
from qmpsnap.store import pages, shared
from qmpsnap.store.layout import SPOOL, STORAGE
from qmpsnap.store.points import read as read_points

log = logging.getLogger(__name__)
CHANGES = "changes"
"""QEMU's socket in the folder for the sockets of a copy."""
_RETRIED = "the guest was continued after an I/O error"


class Owed(msgspec.Struct, frozen=True):
    """The first line of a `create` or `refresh` in the journal: what it is about to change.

    *process* is the QEMU that it is about to change; *sockets* the folder for those of a copy.
    """

    phase: str
    running: bool
    agent: str | None
    freeze: bool
    failure_safe: bool
    laid: list[layers.Laid]
    capabilities: dict[str, bool]
    parameters: dict[str, Any]
    uuid: str | None = None
    verb: str = "create"
    of: str | None = None
    bitmaps: list[str] = []
    process: ProcessFacts | None = None
    sockets: str | None = None

    def point(self, id: str) -> str:
        """The point that is being made: a snapshot, or a revision of the snapshot *of*."""
        return id if self.of is None else f"{self.of}/{id}"


def understood(record: journal.Record) -> tuple[Owed, Phase]:
    """The debt of a `create` or `refresh`, and how far it came. Raises ManifestError."""
    phases = [one for one in record.lines if not folds.is_note(one)]
    try:
        return msgspec.convert(record.lines[0], Owed), Phase(str(phases[-1].get("phase")))
    except UNREADABLE as odd:
        raise ManifestError(f"the journal's entry {record.id}: {odd}") from odd


@dataclass(frozen=True, slots=True)
class Recovered:
    """One debt that is settled; *did* says what was done, in words."""

    id: str
    did: tuple[str, ...]


def owes(roots: Roots, vm: str) -> bool:
    """Whether a crash left anything to settle."""
    return bool(journal.pending(roots.local.journal(vm)) or arrivals.forsaken(roots.local, vm))


async def recover(roots: Roots, machine: Machine, monitor: Monitor) -> list[Recovered]:
    """Settle everything that the journal of *machine* owes. Done twice, it does nothing.

    Raises what QEMU and the disk say; what is not settled stays in the journal.
    """
    settled = []
    debts = await asyncio.to_thread(journal.pending, roots.local.journal(machine.name))
    if debts:
        await dirty.broken_off(monitor)
        await fold.broken_off(monitor)
    for record in debts:
        entry = journal.Journal(roots.local.journal(machine.name)).reopen(record.id)
        did: list[str] = []
        if record.lines and record.lines[0].get("verb") == "delete":
            if standing := dependents.standing(roots.local, machine.name, record.id):
                who = dependents.in_words(standing)
                log.warning("%s %s stays: %s", machine.name, record.id, who)
                entry.close()
                continue
            try:
                await delete.removed(roots, machine.name, record.id)
            except (StoreError, StoreRefused) as dead:
                # the guest is owed nothing here: the next run goes on with it
                log.warning("%s %s is still to be deleted: %s", machine.name, record.id, dead)
                continue
            folded = await fold_unkept(roots, machine, monitor, [entry])
            did = [f"folded {path}" for path in folded]
        elif record.lines:
            owed, phase = understood(record)
            await _refuse_other(monitor, machine, owed)
            await server_ended(monitor, owed)
            if not is_sealed(roots, machine, owed.point(record.id)):
                crashed = phase is Phase.HOLDING
                did = await undo(
                    roots, machine, monitor, entry, owed, phase, thaw=owed.freeze and crashed
                )
            else:
                await sweep(roots, machine, monitor)
                await asyncio.to_thread(shared.sweep_local, roots.local, machine.name)
                if owed.running and await runstate.retry_io(monitor):
                    did = [_RETRIED]
        entry.close()
        settled.append(Recovered(record.id, tuple(did) or ("nothing was left to do",)))
        log.info("recovered %s %s: %s", machine.name, record.id, "; ".join(did))
    if await abilities.broken_off(monitor):
        log.info("recovered %s: an ability was still being probed", machine.name)
    return settled


async def sweep(roots: Roots, machine: Machine, monitor: Monitor) -> None:
    """Remove the bitmaps of ours that no increment needs any more.

    The old ones have recorded on until the new point was sealed. Raises MonitorError.
    """
    points = await asyncio.to_thread(read_points, roots.local, machine.name)
    needed = newest_bitmaps(points)

    def keep(name: str) -> bool:
        parsed = bitmap.parse(name)
        return parsed is None or parsed.vm != machine.name or name in needed

    await bitmap.remove_all(monitor, keep)


async def server_ended(monitor: Monitor, owed: Owed) -> None:
    """End the NBD server that a copy may have left in QEMU, and remove its sockets."""
    if (folder := await asyncio.to_thread(_sockets, owed)) is not None:
        await dirty.broken_off(monitor, folder / CHANGES)
        await asyncio.to_thread(remove_sockets, owed)


def remove_sockets(owed: Owed) -> None:
    """Remove the folder for the sockets of a copy, if it is there and ours."""
    if (folder := _sockets(owed)) is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _sockets(owed: Owed) -> Path | None:
    # it lies where everybody can make folders
    with suppress(OSError):
        if owed.sockets is not None and Path(owed.sockets).lstat().st_uid == os.geteuid():
            return Path(owed.sockets)
    return None


async def _refuse_other(monitor: Monitor, machine: Machine, owed: Owed) -> None:
    uuid = (await monitor.query("query-uuid", dict[str, str])).get("UUID")
    if owed.uuid is not None and uuid != owed.uuid:
        raise Refused(
            f"the journal of {machine.name} owes something to the VM {owed.uuid}; "
            f"at {machine.qmp} there is the VM {uuid}",
            hint="use the socket of that VM, or another name for this one",
        )


async def undo(
    roots: Roots,
    machine: Machine,
    monitor: Monitor,
    entry: journal.Entry,
    owed: Owed,
    phase: Phase,
    *,
    thaw: bool,
) -> list[str]:
    """Give the guest back as it was before the snapshot of *entry*; what was done, in words.

    A sealed snapshot exists, whatever was noted last: it is left alone. Done twice, it does
    nothing. Raises GuestLeftStopped, LocalFailed, JobFailed, MonitorError.
    """
    id = entry.id
    if is_sealed(roots, machine, owed.point(id)):
        return []
    did: list[str] = []
    touched = phase is not Phase.PLANNED
    frozen: SnapError | None = None
    if phase is Phase.HOLDING:  # later the guest runs, and who stops it then means it
        did += await _migration_ended(monitor, owed)
        if owed.running and await runstate.is_held(monitor):
            await runstate.given_back(monitor)
            did.append("the guest was continued")
        if thaw and owed.agent:
            try:
                did += await _thawed(Path(owed.agent))
            except SnapError as failed:
                frozen = failed
    await _set_back(monitor, owed)
    await target.forget_all(monitor)
    point = roots.local.point(machine.name, owed.point(id))
    # the guest may lack the room that its RAM has taken, and its own writes have to be folded
    await asyncio.to_thread(remove, point / SPOOL)
    continued = touched and owed.running and await runstate.retry_io(monitor)
    # what that very QEMU does not know of any more was folded, or never used
    live = touched and phase is not Phase.COPIED and not await _is_the_same(monitor, owed)
    kept = await layers.take_back(monitor, owed.laid, entry, may_be_live=live)
    did.append("overlays were taken back")
    for path in kept:
        log.warning("%s is kept: QEMU runs without it, and the guest had written to it", path)
    did += [f"kept {path}: the guest had written to it" for path in kept]
    # the ones before them have recorded all the while
    await bitmap.remove_all(monitor, lambda name: name not in owed.bitmaps)
    await asyncio.to_thread(remove, point)
    if touched and owed.running:
        continued = await runstate.retry_io(monitor) or continued
    if continued:
        did.append(_RETRIED)
    await asyncio.to_thread(pages.forget, roots.local, machine.name, id)
    await asyncio.to_thread(shared.sweep_local, roots.local, machine.name)
    if frozen is not None:
        raise frozen  # all else is done: the debt stands until somebody has thawed the guest
    return did


async def _is_the_same(monitor: Monitor, owed: Owed) -> bool:
    """Whether this is the QEMU process that was changed, and not a later one of the same VM."""
    known = owed.process
    if known is None or not await asyncio.to_thread(host_process.still_runs, known):
        return False
    threads = [one.thread_id for one in await monitor.query("query-cpus-fast", list[Cpu])]
    return bool(threads) and host_process.of_thread(threads[0]) == known.pid


async def _set_back(monitor: Monitor, owed: Owed) -> None:
    # QEMU may be another by now, and know some of them no more
    known = await abilities.capabilities(monitor)
    before = {name: on for name, on in owed.capabilities.items() if name in known}
    await migration.set_back(monitor, before, owed.parameters)


async def _migration_ended(monitor: Monitor, owed: Owed) -> list[str]:
    now = await migration.query(monitor)
    if now.over:
        return []
    if (await abilities.capabilities(monitor)).get("background-snapshot") and not owed.failure_safe:
        with monitor.listen("MIGRATION") as events:
            await migration.reach(monitor, events, "completed", "failed", "cancelled")
        return ["a background save was let run to its end"]
    await migration.call_off(monitor)
    return ["a migration was cancelled"]


async def _thawed(agent: Path) -> list[str]:
    freezer = quiesce.Freezer(agent)
    await freezer.thaw()
    return ["the guest was thawed"] if freezer.state.thawed else []


def is_sealed(roots: Roots, machine: Machine, point: str) -> bool:
    """Whether *point* exists, whatever was noted last."""
    return (roots.local.point(machine.name, point) / STORAGE).exists()


def remove(folder: Path) -> None:
    """Remove what was begun in *folder*. Raises LocalFailed."""
    try:
        if folder.is_dir():
            shutil.rmtree(folder)
    except OSError as failed:
        raise LocalFailed(f"{folder}: {failed.strerror}") from failed
