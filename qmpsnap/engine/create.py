"""Taking a paired snapshot: the one place where all the rooms come together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from qmpsnap.engine import (
    allowance,
    arrivals,
    bootfiles,
    copies,
    layers,
    ramstore,
    recover,
    revive,
    sample,
    spool,
    survey,
    tpm,
    usage,
)
from qmpsnap.engine.capture import Captured, Report
from qmpsnap.engine.configuration import refuse_unwritable
from qmpsnap.engine.copy import Copied
from qmpsnap.engine.created import Created, created
from qmpsnap.engine.debt import given_up, given_up_later, journaled, look_for_qemu
from qmpsnap.engine.identity import identity_of
from qmpsnap.engine.instant import instant
from qmpsnap.engine.levels import Chosen, choose
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.phase import Phase
from qmpsnap.engine.plan import Plan, plan, wanted
from qmpsnap.engine.roots import Judged, Roots, judge
from qmpsnap.engine.sealing import Sealing
from qmpsnap.engine.ship import ship, ship_waiting
from qmpsnap.engine.unkept import called, kept
from qmpsnap.engine.wishes import Encrypt, Wishes
from qmpsnap.errors import (
    LocalFailed,
    MonitorBusy,
    MonitorLost,
    NotShipped,
    StoreError,
)
from qmpsnap.host import lock
from qmpsnap.hypervisor.monitor import Monitor, connect
from qmpsnap.ids import SnapshotId, disk_labels
from qmpsnap.shield import finish
from qmpsnap.store import identity, local
from qmpsnap.store.manifest import Manifest, Shared, Storage
from qmpsnap.store.points import Points
from qmpsnap.store.points import read as read_points
from qmpsnap.store.secret import Secret

log = logging.getLogger(__name__)
_SEAL_WITHIN = 600.0
_AHEAD = timedelta(days=1)  # of another host's clock


@asynccontextmanager
async def met(roots: Roots, machine: Machine) -> AsyncIterator[Monitor]:
    """A session with the VM; an earlier crash is settled first.

    Raises VmBusy while the VM's RAM is still coming.
    """
    await revive.tried(roots, machine.name)
    await asyncio.to_thread(arrivals.refuse, roots, machine)
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
    judged = await judge(roots, own=machine.name, dry=True)
    await asyncio.to_thread(arrivals.refuse, roots, machine)
    try:
        async with connect(machine.socket) as monitor:
            facts = await survey.take(monitor, machine, roots.local.layers(machine.name))
    except MonitorBusy as busy:
        raise await asyncio.to_thread(survey.explain_busy, busy, machine.socket) from busy
    points = await asyncio.to_thread(read_points, roots.local, machine.name)
    return await _plan(roots, facts, wishes, next_id(roots, machine, judged), points)


async def _plan(
    roots: Roots, facts: survey.Survey, wishes: Wishes, id: SnapshotId, points: Points
) -> Plan:
    for other in wishes.ram_from:
        roots.local.vm(other)  # refuses what is no name
    chosen = await asyncio.to_thread(
        chosen_levels,
        facts,
        wishes,
        points,
        sealed=wishes.encrypt is Encrypt.ALL,
        has=roots.secrets.has,
    )
    await asyncio.to_thread(allowance.refuse, facts)
    return plan(facts, wishes, id, roots.local.layers(facts.machine.name), chosen)


def chosen_levels(
    facts: survey.Survey,
    wishes: Wishes,
    points: Points,
    *,
    under: str = "",
    sealed: bool,
    has: Callable[[str], bool],
) -> dict[str, Chosen]:
    """The level of each disk that *wishes* take, by label, as `choose` decides.

    Raises Blocked, UsageError.
    """
    taken, _ = wanted(facts, wishes)
    labels = disk_labels([site.name for site in taken])
    return {
        label: choose(wishes.level, site, label, points, under=under, sealed=sealed, has=has)
        for label, site in zip(labels, taken, strict=True)
    }


async def create(roots: Roots, machine: Machine, wishes: Wishes, report: Report) -> Created:
    """Take a paired snapshot of the running VM *machine*.

    Raises Refused and its kin before anything is touched; Failed when the guest is as before and
    nothing was lost; NotShipped when the snapshot is whole in the spool; GuestNeedsHelp.
    """
    async with lock.held(roots.local.lock(machine.name), "create"):
        judged = await _judged(roots, machine.name)
        # a key that cannot be used is no reason to find out when all has been taken
        await asyncio.to_thread(roots.keyring.ready)
        secret = await asyncio.to_thread(_secret, roots, wishes)
        async with met(roots, machine) as monitor:
            facts = await survey.take(monitor, machine, roots.local.layers(machine.name))
            id = next_id(roots, machine, judged)
            points = await asyncio.to_thread(read_points, roots.local, machine.name)
            made = await _plan(roots, facts, wishes, id, points)
            facts = await survey.detailed(monitor, facts)
            await asyncio.to_thread(refuse_unwritable, facts)
            await asyncio.to_thread(_warn_of_restart, roots, facts)
            await asyncio.to_thread(
                identity.bind,
                roots.local,
                machine.name,
                identity_of(facts),
                rebind=wishes.rebind,
            )
            await asyncio.to_thread(layers.refuse_existing, made.disks)
            boot = await bootfiles.taken(roots, facts, secret)
            debt = await journaled(roots, monitor, made, facts)
            folder = roots.local.spool(machine.name, id)
            try:
                before = await sample.take(monitor, facts, roots.local.path)
                held = await tpm.looked(facts)
                captured = await instant(monitor, made, facts, debt, folder, report)
                held = await tpm.settled(held)
                after = await _after(monitor, facts, roots)
                home = roots.local.snapshot(machine.name, id)
                copied = await copies.taken(
                    monitor, made, debt, home, points, wishes.copying, report,
                    asked=wishes.level, sealing=_sealing(roots, machine, wishes, secret),
                )  # fmt: skip
            except BaseException as failure:
                await finish(given_up(roots, machine, monitor, debt, str(id)), within=3600)
                await look_for_qemu(facts, debt, failure)
                raise
        try:
            trial = judged.trial if judged else roots.allow_local_store
            earlier = await asyncio.to_thread(usage.last, roots.local, machine.name)
            store = judged.store if judged else None
            used = usage.of(machine.name, str(id), before, after, store=store, earlier=earlier)
            lenders = wishes.ram_from if judged else None
            half, manifest = await _sealed(
                roots, made, facts, captured, copied, used, wishes.note, trial, report, boot, held,
                lenders, secret,
            )  # fmt: skip
        except BaseException:
            await finish(given_up_later(roots, machine, debt, str(id)), within=3600)
            raise
        await debt.note(Phase.SEALED)
        await ramstore.sealed(roots, machine.name, manifest)
        await copies.paid(roots, machine, made, debt)
        await asyncio.to_thread(usage.keep, roots.local, used)
        try:
            delivered = await ship(roots, machine.name, str(id), report)
        except NotShipped as waiting:
            waiting.created = created(roots, half, manifest, shipped=None)
            await copies.digested(roots, machine.name, report)
            raise
        _, waiting_still = await ship_waiting(roots, machine.name, report)
        for trouble in waiting_still:
            log.warning("%s", trouble)
        await copies.digested(roots, machine.name, report)
    return created(roots, half, manifest, shipped=delivered.bytes)


def _secret(roots: Roots, wishes: Wishes) -> Secret | None:
    """The key that is to encrypt. Raises as `SecretRing.current`."""
    return None if wishes.encrypt is Encrypt.NONE else roots.secrets.current()


def _sealing(
    roots: Roots, machine: Machine, wishes: Wishes, secret: Secret | None
) -> Sealing | None:
    if secret is None or wishes.encrypt is not Encrypt.ALL:
        return None
    return Sealing(machine.name, secret, roots.secrets)


async def _after(monitor: Monitor, facts: survey.Survey, roots: Roots) -> sample.Sample | None:
    """What is used now that the guest runs again; not the reason for which a snapshot is lost."""
    try:
        return await sample.take(monitor, facts, roots.local.path, walk=False)
    except (LocalFailed, MonitorLost) as failed:
        log.warning("no figures after the point in time: %s", failed)
        return None


def next_id(roots: Roots, machine: Machine, judged: Judged | None = None) -> SnapshotId:
    """Never one that was given before, also if that snapshot is deleted and the clock jumps.

    Nor one from before the newest on the store (*judged*): a host whose clock is ahead may have
    taken that, before the VM came here. What is more than a day ahead is not gone by.
    """
    given = [*roots.local.ids(machine.name), *local.last_id(roots.local, machine.name)]
    now = datetime.now(UTC)
    if judged is not None and (newest := judged.newest) is not None:
        if newest <= SnapshotId.of(now + _AHEAD):
            given.append(newest)
        else:
            log.warning(
                "the store has a snapshot of %s from the future, %s: it stays the `latest` there",
                machine.name,
                newest,
            )
    return SnapshotId.after(max(given, default=None), now)


async def _judged(roots: Roots, vm: str) -> Judged | None:
    """None when the store does not answer: the snapshot then waits for it in the spool.

    Raises LeaseHeld when the store does, and says that *vm* is another host's.
    """
    try:
        return await judge(roots, own=vm)
    except StoreError as dead:
        log.warning("the store does not answer: %s", dead)
        return None


def _warn_of_restart(roots: Roots, facts: survey.Survey) -> None:
    frozen = kept(roots, facts.machine.name) or set()
    for site in facts.sites:
        if site.disk.chain and not site.disk.read_only and called(site.paths[0]) & frozen:
            log.warning(
                "disk %s writes to %s, which a snapshot froze: QEMU was started again without "
                "its newest overlay; `verify` tells which snapshots that damaged",
                site.name,
                site.paths[0],
            )


async def _sealed(
    roots: Roots,
    made: Plan,
    facts: survey.Survey,
    captured: Captured,
    copied: Mapping[str, Copied],
    used: usage.Usage,
    note: str,
    trial: bool,
    report: Report,
    boot: Sequence[Shared],
    held: tpm.Held | None,
    lenders: Sequence[str] | None,
    secret: Secret | None,
) -> tuple[Storage, Manifest]:
    folder = roots.local.spool(made.vm, made.id)
    half = await asyncio.to_thread(spool.storage, made, captured, copied)
    manifest = await spool.build(
        roots,
        folder,
        made,
        facts,
        captured,
        half,
        used,
        raw=folder / "stream",
        note=note,
        trial=trial,
        report=report,
        lenders=lenders,
        shared=boot,
        held=held,
        secret=secret,
    )
    # the store half is whole by now: with this file the snapshot exists
    # a thread goes on after a cancellation: it must not seal what is being undone meanwhile
    await finish(asyncio.to_thread(local.seal, roots.local, made.vm, half), within=_SEAL_WITHIN)
    return half, manifest
