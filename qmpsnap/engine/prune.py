"""Retention at work: what a policy no longer keeps goes, and what others stand on is merged."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime

import msgspec

from qmpsnap.engine import delete, dependents, listing, merge, runs
from qmpsnap.engine.capture import Report
from qmpsnap.engine.fates import Fate, decided, outcome, with_earlier
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.protect import is_protected
from qmpsnap.engine.retention import Policy
from qmpsnap.engine.roots import Roots, judge
from qmpsnap.engine.unkept import fold_unkept
from qmpsnap.errors import LocalFailed, SnapError, StoreError, StoreRefused, VmBusy
from qmpsnap.host import journal, lock
from qmpsnap.hypervisor.block import job
from qmpsnap.store import files, points
from qmpsnap.store.points import Point, Points

log = logging.getLogger(__name__)
_UNSETTLED = "a run that was cut off has yet to be settled: `qmpsnap recover`"


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """*fates*, oldest first. *folded*: overlay files that went back into what lay beneath, *why*:
    why none did. *failed*: what was to be merged, and could not be."""

    vm: str
    fates: list[Fate]
    folded: list[str] = []
    why: str = ""
    failed: list[str] = []


async def prune(
    roots: Roots,
    machine: Machine,
    policy: Policy,
    *,
    dry_run: bool = False,
    merging: bool = True,
    report: Report,
) -> Pruned:
    """Remove the snapshots that *policy* does not keep, and merge images that only they needed.

    Only whole pairs are removed: everything else is kept, and told. So are protected snapshots,
    and those that restored machines stand on. A crash at any step is made good by the next call,
    or by `recover`. With *dry_run* the decisions are the same, and nothing is touched.

    Raises UsageError for an empty policy, VmBusy and MonitorBusy; StoreError and StoreRefused when
    the store cannot be reached: what was removed by then is removed whole.
    """
    policy.refuse_empty()
    vm = machine.name
    if dry_run:
        return Pruned(vm=vm, fates=await _foreseen(roots, vm, policy, merging=merging))
    async with (
        lock.held(roots.local.lock(vm), "prune"),
        delete.met(machine) as (monitor, why),
    ):
        if monitor is not None and (busy := await job.at_work(monitor)):
            raise VmBusy(f"QEMU is busy with {', '.join(one.id for one in busy)}")
        await judge(roots)
        there = await asyncio.to_thread(points.read, roots.local, vm)
        await asyncio.to_thread(merge.finish, there, report)
        fates = await _decided(roots, vm, policy)
        fates, debts, unreachable = await _removed(roots, vm, fates)
        fates = with_earlier(there, fates)
        fates, failed = await _merged(roots, vm, fates, report, merging=merging)
        folded = await fold_unkept(roots, machine, monitor, debts) if monitor is not None else []
        for debt in debts:
            await asyncio.to_thread(debt.close)
        if unreachable is not None:
            raise unreachable
    return Pruned(vm=vm, fates=fates, folded=folded, why=why, failed=failed)


async def _foreseen(roots: Roots, vm: str, policy: Policy, *, merging: bool) -> list[Fate]:
    fates = await _decided(roots, vm, policy)
    there = await asyncio.to_thread(points.read, roots.local, vm)
    going = {fate.id for fate in fates if fate.decision == "remove"}
    expired = {one.name for one in there if one.kept or one.storage.id in going}
    plan = runs.plan(there, expired, await asyncio.to_thread(_standing, roots, there))
    return outcome(there, with_earlier(there, fates), expired, plan, {}, merging=merging)


async def _decided(roots: Roots, vm: str, policy: Policy) -> list[Fate]:
    entries = await listing.entries(roots, vm)
    here = [entry.id for entry in entries if entry.local]
    cut, hindered = await asyncio.to_thread(_debts, roots, vm)
    protected = {id for id in here if await asyncio.to_thread(is_protected, roots.local, vm, id)}
    for id in here:
        if who := await asyncio.to_thread(_who, roots, vm, id):
            hindered[id] = who
    return decided(entries, policy, datetime.now(UTC), protected, hindered, cut)


def _debts(roots: Roots, vm: str) -> tuple[set[str], dict[str, str]]:
    """The snapshots whose deletion was cut off; those that the journal owes something else for."""
    cut: set[str] = set()
    others: dict[str, str] = {}
    for record in journal.pending(roots.local.journal(vm)):
        first = record.lines[0] if record.lines else {}
        if first.get("verb") == "delete":
            cut.add(record.id)
        else:
            others[str(first.get("of") or record.id)] = _UNSETTLED
    return cut, others


def _who(roots: Roots, vm: str, id: str) -> str:
    """The restored machines and exports that stand on the snapshot; empty if none does."""
    return dependents.in_words(dependents.standing(roots.local, vm, id))


def _standing(roots: Roots, there: Points) -> dict[str, str]:
    """The points that have to stay as they are, and why."""
    who = {id: _who(roots, there.vm, id) for id in {one.storage.id for one in there}}
    why = {one.name: who[one.storage.id] or _sealed(roots, one) for one in there}
    return {name: words for name, words in why.items() if words}


def _sealed(roots: Roots, point: Point) -> str:
    """Why nobody here can read its own images; empty if that can be done."""
    missing = [key for key in point.storage.keys if not roots.secrets.has(key)]
    return f"it is encrypted with the key {missing[0]}, which is not here" if missing else ""


async def _removed(
    roots: Roots, vm: str, fates: list[Fate]
) -> tuple[list[Fate], list[journal.Entry], SnapError | None]:
    """Do what *fates* say, oldest first; they come back as it came to be.

    With the debts that stand until overlays are folded, and the reason when the store went away on
    the way: then no more are removed.
    """
    going = {fate.id for fate in fates if fate.decision == "remove"}
    cut, _ = await asyncio.to_thread(_debts, roots, vm)
    debts: list[journal.Entry] = []
    for id in sorted(going | cut):
        debt = await asyncio.to_thread(delete.owed, roots.local.journal(vm), vm, id)
        # a restore looks for our debt after it has made its note: one of the two sees the other
        if who := await asyncio.to_thread(_who, roots, vm, id):
            log.warning("%s %s stays: %s", vm, id, who)
            await asyncio.to_thread(debt.close)
            stays = {"decision": "keep", "reasons": [who]}
            fates = [
                msgspec.structs.replace(one, **stays) if one.id == id else one for one in fates
            ]
            continue
        try:
            await delete.removed(roots, vm, id, sweeping=False)
        except (StoreError, StoreRefused) as unreachable:
            # the local half is whole: a debt would only stand in the way of the next `create`
            await asyncio.to_thread(debt.close)
            return fates, debts, unreachable
        debts.append(debt)
    if debts:
        try:
            # each look reads the manifests of all that are left: one is enough
            await delete.swept(roots, vm)
        except (StoreError, StoreRefused) as unreachable:
            return fates, debts, unreachable
    return fates, debts, None


async def _merged(
    roots: Roots, vm: str, fates: list[Fate], report: Report, *, merging: bool
) -> tuple[list[Fate], list[str]]:
    """Merge what can be; *fates* as they came to be, and what could not be merged."""
    there = await asyncio.to_thread(points.read, roots.local, vm)
    expired = {one.name for one in there if one.kept}
    plan = runs.plan(there, expired, await asyncio.to_thread(_standing, roots, there))
    failed: dict[str, str] = {}
    for top in dict.fromkeys(run.top for run in plan.runs) if merging else []:
        several = [run for run in plan.runs if run.top == top]
        try:
            await merge.merge(there, there.by_name[top], several, report, roots.secrets)
        except SnapError as trouble:
            log.warning("%s: nothing is merged into %s: %s", vm, top, trouble)
            failed[top] = str(trouble)
    await asyncio.to_thread(_swept, roots, vm)
    fates = outcome(there, fates, expired, plan, failed, merging=merging)
    return fates, [f"{top}: {why}" for top, why in failed.items()]


def _swept(roots: Roots, vm: str) -> None:
    with files.told(roots.local.vm(vm), LocalFailed):
        delete.sweep(roots, vm)
