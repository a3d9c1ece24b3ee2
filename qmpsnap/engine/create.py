"""Taking a paired snapshot: the one place where all the rooms come together."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from qmpsnap.engine import layers, recover, spool, survey
from qmpsnap.engine.capture import Captured, Report, Shot
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.phase import Phase, move
from qmpsnap.engine.plan import Plan, plan
from qmpsnap.engine.roots import Judged, Roots, judge
from qmpsnap.engine.ship import ship, ship_waiting
from qmpsnap.engine.wishes import Wishes
from qmpsnap.errors import (
    GuestLeftStopped,
    GuestStillFrozen,
    LocalFailed,
    MonitorBusy,
    NotShipped,
    QemuGone,
    SnapError,
    StoreError,
)
from qmpsnap.host import lock
from qmpsnap.host import process as host_process
from qmpsnap.host.journal import Entry, Journal
from qmpsnap.hypervisor.block import transaction
from qmpsnap.hypervisor.guest.watchdog import watching
from qmpsnap.hypervisor.monitor import Monitor, connect, settle
from qmpsnap.ids import SnapshotId
from qmpsnap.shield import finish
from qmpsnap.store import identity, local
from qmpsnap.store.manifest import Manifest, Storage

log = logging.getLogger(__name__)
_SEAL_WITHIN = 600.0
_DYING = 20  # tenths of a second that a killed QEMU may take to be gone


class Bytes(msgspec.Struct, frozen=True):
    """Bytes written: *disks* on the local root, *vmstate* as QEMU sent it, *shipped* in all."""

    disks: int
    vmstate: int
    shipped: int


class Created(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot as `create --json` tells it. *ram_reason* says why it came to be that mode."""

    id: str
    vm: str
    level: str
    ram: str
    ram_reason: str
    quiesce: str
    pause_ms: float
    frozen_ms: float | None
    local: str
    store: str
    bytes: Bytes
    revision: int
    state: str


@dataclass(slots=True)
class _Debt:
    """The journal's entry of this snapshot, and how far it has come."""

    entry: Entry
    owed: recover.Owed
    phase: Phase = Phase.PLANNED

    async def note(self, phase: Phase) -> None:
        self.phase = move(self.phase, phase)
        await asyncio.to_thread(self.entry.note, phase.value)


@asynccontextmanager
async def _met(roots: Roots, machine: Machine) -> AsyncIterator[Monitor]:
    """A session with the VM; an earlier crash is settled first."""
    try:
        async with connect(machine.socket) as monitor:
            await recover.recover(roots, machine, monitor)
            yield monitor
    except MonitorBusy as busy:
        raise await asyncio.to_thread(survey.explain_busy, busy, machine.socket) from busy


async def planned(roots: Roots, machine: Machine, wishes: Wishes) -> Plan:
    """What `create` would do now; nothing is changed in QEMU or on disk.

    Raises as `create` does before it touches anything.
    """
    await judge(roots)
    try:
        async with connect(machine.socket) as monitor:
            facts = await survey.take(monitor, machine, roots.local.layers(machine.name))
    except MonitorBusy as busy:
        raise await asyncio.to_thread(survey.explain_busy, busy, machine.socket) from busy
    return plan(facts, wishes, _next_id(roots, machine), roots.local.layers(machine.name))


async def create(roots: Roots, machine: Machine, wishes: Wishes, report: Report) -> Created:
    """Take a paired snapshot of the running VM *machine*.

    Raises Refused and its kin before anything is touched; Failed when the guest is as before and
    nothing was lost; NotShipped when the snapshot is whole in the spool; GuestNeedsHelp.
    """
    async with lock.held(roots.local.lock(machine.name), "create"):
        judged = await _judged(roots)
        async with _met(roots, machine) as monitor:
            facts = await survey.take(monitor, machine, roots.local.layers(machine.name))
            id = _next_id(roots, machine)
            made = plan(facts, wishes, id, roots.local.layers(machine.name))
            await asyncio.to_thread(
                identity.bind,
                roots.local,
                machine.name,
                spool.identity(facts),
                rebind=wishes.rebind,
            )
            await asyncio.to_thread(layers.refuse_existing, made.disks)
            debt = await _journaled(roots, monitor, made, facts)
            folder = roots.local.spool(machine.name, id)
            try:
                sampled = await asyncio.to_thread(spool.usage, facts, roots.local.path)
                captured = await _captured(monitor, made, facts, debt, folder, report)
            except BaseException as failure:
                frozen = isinstance(failure, GuestStillFrozen)
                undone = _given_up(roots, machine, monitor, debt, str(id), frozen=frozen)
                await finish(undone, within=3600)
                if isinstance(failure, QemuGone) and debt.phase is Phase.HOLDING:
                    await _really_gone(facts, failure)
                raise
        try:
            trial = judged.trial if judged else roots.allow_local_store
            half, manifest = await _sealed(
                roots, made, facts, captured, sampled, wishes.note, trial, report
            )
        except BaseException:
            await finish(_given_up_later(roots, machine, debt, str(id)), within=3600)
            raise
        await debt.note(Phase.SEALED)
        await asyncio.to_thread(debt.entry.close)
        try:
            delivered = await ship(roots, machine.name, str(id), report)
        except NotShipped as waiting:
            waiting.created = _created(roots, made, half, manifest, shipped=None)
            raise
        _, waiting_still = await ship_waiting(roots, machine.name, report)
        for trouble in waiting_still:
            log.warning("%s", trouble)
    return _created(roots, made, half, manifest, shipped=delivered.bytes)


def _next_id(roots: Roots, machine: Machine) -> SnapshotId:
    """Never one that was given before, also if that snapshot is deleted and the clock jumps."""
    given = [*roots.local.ids(machine.name), *local.last_id(roots.local, machine.name)]
    return SnapshotId.after(max(given, default=None), datetime.now(UTC))


async def _judged(roots: Roots) -> Judged | None:
    """None when the store does not answer: the snapshot then waits for it in the spool."""
    try:
        return await judge(roots)
    except StoreError as dead:
        log.warning("the store does not answer: %s", dead)
        return None


async def _journaled(roots: Roots, monitor: Monitor, made: Plan, facts: survey.Survey) -> _Debt:
    capabilities = await monitor.execute("query-migrate-capabilities")
    parameters: dict[str, Any] = await monitor.execute("query-migrate-parameters")
    owed = recover.Owed(
        phase=Phase.PLANNED.value,
        running=made.running,
        agent=str(facts.agent) if facts.agent else None,
        freeze=made.freeze,
        failure_safe=facts.abilities.background_safe,
        laid=layers.remembered(made.disks),
        capabilities={one["capability"]: one["state"] for one in capabilities},
        parameters={name: parameters[name] for name in ("max-bandwidth", "downtime-limit")},
        uuid=spool.identity(facts).uuid,
    )
    await asyncio.to_thread(local.give_id, roots.local, made.vm, made.id)
    journal = Journal(roots.local.journal(made.vm))
    entry = await asyncio.to_thread(journal.open_entry, str(made.id), msgspec.to_builtins(owed))
    return _Debt(entry, owed)


async def _captured(
    monitor: Monitor, made: Plan, facts: survey.Survey, debt: _Debt, folder: Path, report: Report
) -> Captured:
    await asyncio.to_thread(_make, folder)
    watch = watching(
        facts.machine.socket,
        facts.agent if made.freeze else None,
        connection=monitor.fileno(),
        log=debt.entry.path.parent / "watchdog.log",
    )
    async with watch as watchdog:
        await layers.lay(monitor, made.disks)
        await asyncio.to_thread(_flush, made)
        await debt.note(Phase.HOLDING)

        async def fix() -> None:
            await transaction.commit(monitor, [disk.action for disk in made.disks])

        shot = Shot(
            plan=made,
            monitor=monitor,
            watchdog=watchdog,
            abilities=facts.abilities,
            agent=facts.agent,
            raw=folder / "stream",
            fix=fix,
            report=report,
        )
        captured = await shot.take()
    await debt.note(Phase.CAPTURED)
    return captured


def _make(folder: Path) -> None:
    try:
        folder.mkdir(0o700, parents=True)
    except OSError as failed:
        raise LocalFailed(f"{folder}: {failed.strerror}") from failed


def _flush(made: Plan) -> None:
    """Write back what the host still caches of the disks: else `stop` would wait for it."""
    for disk in made.disks:
        path = disk.site.paths[0]
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
        except OSError as failed:
            raise LocalFailed(f"{path}: {failed.strerror}") from failed


async def _sealed(
    roots: Roots,
    made: Plan,
    facts: survey.Survey,
    captured: Captured,
    sampled: spool.Usage,
    note: str,
    trial: bool,
    report: Report,
) -> tuple[Storage, Manifest]:
    folder = roots.local.spool(made.vm, made.id)
    half = await asyncio.to_thread(spool.storage, made, captured)
    manifest = await spool.build(
        folder,
        made,
        facts,
        captured,
        half,
        sampled,
        raw=folder / "stream",
        note=note,
        trial=trial,
        report=report,
    )
    # the store half is whole by now: with this file the snapshot exists
    # a thread goes on after a cancellation: it must not seal what is being undone meanwhile
    await finish(asyncio.to_thread(local.seal, roots.local, made.vm, half), within=_SEAL_WITHIN)
    return half, manifest


async def _given_up(
    roots: Roots, machine: Machine, monitor: Monitor, debt: _Debt, id: str, *, frozen: bool
) -> None:
    """Undo; what cannot be undone now stays in the journal for `recover`.

    A guest that is not *frozen* by us is not thawed: somebody else may hold it.
    """

    async def undone(current: Monitor) -> None:
        await recover.undo(roots, machine, current, id, debt.owed, debt.phase, thaw=frozen)

    try:
        await settle(monitor, undone)
        if not frozen:
            await asyncio.to_thread(debt.entry.close)
    except (SnapError, TimeoutError) as trouble:
        log.warning("%s: not all could be undone: %s; `recover` goes on", machine.name, trouble)


async def _given_up_later(roots: Roots, machine: Machine, debt: _Debt, id: str) -> None:
    try:
        async with connect(machine.socket) as monitor:
            await _given_up(roots, machine, monitor, debt, id, frozen=False)
    except (SnapError, TimeoutError) as trouble:
        log.warning("%s: not all could be undone: %s; `recover` goes on", machine.name, trouble)


async def _really_gone(facts: survey.Survey, gone: QemuGone) -> None:
    """Raises GuestLeftStopped when only the socket has gone: nobody can continue the guest."""
    known = facts.process
    if known is None:
        return
    for _ in range(_DYING):
        if not await asyncio.to_thread(host_process.still_runs, known):
            return
        await asyncio.sleep(0.1)
    raise GuestLeftStopped(
        f"QEMU, process {known.pid}, lives, but its monitor has gone: the guest may be stopped",
        hint="send `cont` over another monitor, then `qmpsnap recover`",
    ) from gone


def _created(
    roots: Roots, made: Plan, half: Storage, manifest: Manifest, *, shipped: int | None
) -> Created:
    """*shipped* is None while the store half waits in the spool."""
    overlays = sum(Path(disk.overlay).stat().st_size for disk in half.disks if disk.overlay)
    return Created(
        id=half.id,
        vm=half.vm,
        level=half.level,
        ram=manifest.ram.mode,
        ram_reason=manifest.ram.reason,
        quiesce=manifest.quiesce,
        pause_ms=manifest.pause_ms,
        frozen_ms=manifest.frozen_ms,
        local=str(roots.local.snapshot(half.vm, half.id)),
        store=str(roots.store.root.snapshot(half.vm, half.id)),
        bytes=Bytes(disks=overlays, vmstate=manifest.ram.raw_bytes, shipped=shipped or 0),
        revision=half.revision,
        state="shipping" if shipped is None else "paired",
    )
