"""Refreshing: a newer revision of the local half under the same ID; the store half stays."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec

from qmpsnap.engine import allowance, copies, create, layers, spool, survey
from qmpsnap.engine.capture import Captured, Report
from qmpsnap.engine.copy import Copied
from qmpsnap.engine.debt import Debt, given_up, given_up_later, journaled, look_for_qemu
from qmpsnap.engine.identity import identity_of
from qmpsnap.engine.instant import instant
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.phase import Phase
from qmpsnap.engine.plan import Plan, plan
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.sealing import Sealing
from qmpsnap.engine.wishes import Copying, Level, Quiesce, RamChoice, Wishes
from qmpsnap.errors import HalfMissing, SnapshotUnknown
from qmpsnap.host import lock
from qmpsnap.hypervisor.guest.quiesce import MAX_FREEZE
from qmpsnap.ids import SnapshotId
from qmpsnap.shield import finish
from qmpsnap.store import identity, local
from qmpsnap.store.manifest import Storage
from qmpsnap.store.points import Points
from qmpsnap.store.points import read as read_points

_SEAL_WITHIN = 600.0


class Refreshed(msgspec.Struct, frozen=True, kw_only=True):
    """A new revision. *levels*: what each disk became, by its name; *bytes*: written locally.

    *encryption*: the ID of the key that its images are encrypted with, None if they are not.
    """

    id: str
    vm: str
    revision: int
    revision_id: str
    taken_at: str
    level: str
    levels: dict[str, str]
    quiesce: str
    pause_ms: float
    frozen_ms: float | None
    local: str
    bytes: int
    encryption: str | None = None


async def refresh(
    roots: Roots,
    machine: Machine,
    word: str,
    report: Report,
    *,
    copying: Copying | None = None,
    quiesce: Quiesce = Quiesce.AUTO,
    max_pause: float | None = None,
    max_freeze: float = MAX_FREEZE,
    encrypt: bool | None = None,
) -> Refreshed:
    """Make the next revision of the local half of the snapshot that *word* means.

    *encrypt*: whether its images are encrypted; None: if those of its last revision are. The
    store is not touched, nor even looked at. Raises SnapshotUnknown, HalfMissing, and what
    `create` raises; the guest and the snapshot are as before then.
    """
    copying = copying or Copying()
    async with lock.held(roots.local.lock(machine.name), "refresh"):
        async with create.met(roots, machine) as monitor:
            points = await asyncio.to_thread(read_points, roots.local, machine.name)
            of = _meant(points, word)
            facts = await survey.take(monitor, machine, roots.local.layers(machine.name))
            first = points.by_name[of]
            sealed = _last(points, of).keys != [] if encrypt is None else encrypt
            secret = await asyncio.to_thread(roots.secrets.current) if sealed else None
            wishes = Wishes(
                level=Level.AUTO,
                ram=RamChoice.NONE,
                quiesce=quiesce,
                max_pause=max_pause,
                max_freeze=max_freeze,
                include=tuple(disk.device for disk in first.storage.disks),
                copying=copying,
            )
            chosen = await asyncio.to_thread(
                create.chosen_levels,
                facts,
                wishes,
                points,
                under=of,
                sealed=sealed,
                has=roots.secrets.has,
            )
            id = await asyncio.to_thread(create.next_id, roots, machine)
            await asyncio.to_thread(allowance.refuse, facts)
            made = plan(facts, wishes, id, roots.local.layers(machine.name), chosen)
            bound = identity_of(facts)
            await asyncio.to_thread(identity.bind, roots.local, machine.name, bound, rebind=False)
            await asyncio.to_thread(layers.refuse_existing, made.disks)
            debt = await journaled(roots, monitor, made, facts, of=of)
            folder = roots.local.point(machine.name, f"{of}/{id}")
            try:
                captured = await instant(monitor, made, facts, debt, folder, report)
                copied = await copies.taken(
                    monitor, made, debt, folder, points, copying, report, asked=Level.AUTO,
                    sealing=Sealing(machine.name, secret, roots.secrets) if secret else None,
                )  # fmt: skip
            except BaseException as failure:
                await finish(given_up(roots, machine, monitor, debt, str(id)), within=3600)
                await look_for_qemu(facts, debt, failure)
                raise
        half = await _sealed(roots, machine, made, captured, copied, of, points, debt)
        await copies.paid(roots, machine, made, debt)
        await copies.digested(roots, machine.name, report)
    return Refreshed(
        id=of,
        vm=machine.name,
        revision=half.revision,
        revision_id=str(id),
        taken_at=half.taken_at,
        level=half.level,
        levels={disk.device: disk.level for disk in half.disks},
        quiesce="agent" if made.freeze else "none",
        pause_ms=round(captured.pause.milliseconds, 3),
        frozen_ms=captured.frozen_ms,
        local=str(folder),
        bytes=sum(disk.bytes_written for disk in half.disks),
        encryption=next(iter(half.keys), None),
    )


async def _sealed(
    roots: Roots,
    machine: Machine,
    made: Plan,
    captured: Captured,
    copied: Mapping[str, Copied],
    of: str,
    points: Points,
    debt: Debt,
) -> Storage:
    try:
        half = await asyncio.to_thread(
            spool.storage, made, captured, copied, of=of, revision=_next(points, of)
        )
        # a thread goes on after a cancellation: it must not seal what is being undone meanwhile
        sealing = asyncio.to_thread(local.seal, roots.local, machine.name, half)
        await finish(sealing, within=_SEAL_WITHIN)
    except BaseException:
        await finish(given_up_later(roots, machine, debt, str(made.id)), within=3600)
        raise
    await debt.note(Phase.SEALED)
    return half


def _next(points: Points, of: str) -> int:
    return 1 + _last(points, of).revision


def _last(points: Points, of: str) -> Storage:
    """The newest revision of the snapshot *of*."""
    found = (point.storage for point in points if point.storage.id == of)
    return max(found, key=lambda storage: storage.revision)


def _meant(points: Points, word: str) -> str:
    """The snapshot that *word* means, told from the local root alone."""
    ids = [point.storage.id for point in points if not point.kept and not point.storage.revision]
    if word == "latest" and ids:
        return ids[-1]
    matching = [id for id in ids if id.startswith(word)]
    if len(matching) != 1:
        broken = [name for name in points.damaged if name.startswith(word)]
        if broken:
            raise HalfMissing(points.damaged[broken[0]])
        many = ", ".join(matching) or "none"
        raise SnapshotUnknown(f"{word!r} means no single snapshot of {points.vm}: {many}")
    return str(SnapshotId(matching[0]))
