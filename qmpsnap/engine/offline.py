"""Settling what a crash left behind when QEMU is gone too: its overlays go back by qemu-img."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from qmpsnap.engine import folds, layers, recover
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.phase import Phase
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import LocalFailed
from qmpsnap.host import journal, qemu_img
from qmpsnap.hypervisor.block.fold import Stage
from qmpsnap.shield import finish
from qmpsnap.store import pages

log = logging.getLogger(__name__)


async def settle_offline(
    roots: Roots, machine: Machine, *, not_restarted: bool = False
) -> list[recover.Recovered]:
    """Give the disks of *machine* what the guest had written into overlays of an unsealed point.

    Only what nobody has open: qemu-img takes QEMU's own locks. A disk that was written to past its
    overlay (QEMU was started again without it) is left as it is, the overlay is kept, and so is
    the debt. *not_restarted*: the caller knows that it was not, where a fold was under way and
    nobody of ours saw QEMU end. Raises LocalFailed, ManifestError.
    """
    settled = []
    for record in await asyncio.to_thread(journal.pending, roots.local.journal(machine.name)):
        if not record.lines or record.lines[0].get("verb") == "delete":
            continue  # owes nothing to the guest
        owed, phase = recover.understood(record)
        entry = journal.Journal(roots.local.journal(machine.name)).reopen(record.id)
        point = owed.point(record.id)
        did = []
        if not recover.is_sealed(roots, machine, point):
            empty = phase in {Phase.PLANNED, Phase.COPIED}
            for one in owed.laid:
                if not await asyncio.to_thread(os.path.exists, one.path):
                    continue
                if not empty:
                    did += await _given_back(one, record, entry, not_restarted=not_restarted)
                await asyncio.to_thread(layers.unlink, Path(one.path))
            await asyncio.to_thread(recover.remove, roots.local.point(machine.name, point))
            await asyncio.to_thread(pages.forget, roots.local, machine.name, record.id)
        await asyncio.to_thread(recover.remove_sockets, owed)
        await asyncio.to_thread(entry.close)
        settled.append(recover.Recovered(record.id, tuple(did) or ("nothing was left to do",)))
    return settled


async def _given_back(
    one: layers.Laid, record: journal.Record, entry: journal.Entry, *, not_restarted: bool
) -> list[str]:
    """Bring into the disk what only its overlay has; nobody needs that one then."""
    overlay, beneath = Path(one.path), Path(one.beneath)
    stage = folds.stage(record, overlay)
    if stage is Stage.FOLDED or not await qemu_img.allocated(overlay, "qcow2", 1):
        return []
    newer = await asyncio.to_thread(_newer, beneath, overlay)
    if stage is Stage.PIVOTING and newer:
        await _refuse_other(overlay, beneath)
        return [f"{beneath} had all that was in {overlay}"]
    if newer and not (stage is Stage.FOLDING and (not_restarted or _untouched(record, beneath))):
        raise _another_wrote(overlay, beneath, stage)
    await folds.noting(entry, one.path)(Stage.FOLDING)
    # cut short, it would leave a disk that is newer than its overlay
    await finish(qemu_img.commit(overlay, "qcow2"), within=3600)
    return [f"{overlay} was committed into {beneath}"]


def _newer(beneath: Path, overlay: Path) -> bool:
    # it was frozen before the overlay took its first write
    return beneath.stat().st_mtime_ns > overlay.stat().st_mtime_ns


def _untouched(record: journal.Record, beneath: Path) -> bool:
    """Whether nobody has written to *beneath* since QEMU was seen to have ended."""
    ended = folds.seen_ended(record)
    return ended is not None and beneath.stat().st_mtime_ns <= ended


async def _refuse_other(overlay: Path, beneath: Path) -> None:
    """At the pivot the disk has all if it reads the same as its overlay."""
    header = await qemu_img.info(overlay, "qcow2")
    if not await qemu_img.same(overlay, beneath, "qcow2", header.backing_format):
        raise LocalFailed(
            f"{beneath} and {overlay} differ, and QEMU ended just as the guest's writes went over "
            f"to {beneath.name}: which of the two has them all cannot be told",
            hint="look at both, and keep one: `qemu-img commit` of the overlay, or its removal",
        )


def _another_wrote(overlay: Path, beneath: Path, stage: Stage | None) -> LocalFailed:
    if stage is Stage.FOLDING:
        return LocalFailed(
            f"{overlay} was being folded into {beneath} when QEMU and the engine ended: "
            "the overlay has all, unless QEMU was started again without it since",
            hint="if it was not: `recover --not-restarted`",
        )
    return LocalFailed(
        f"{beneath} was written to after {overlay} had taken its place: QEMU was started again "
        "without it",
        hint="what the guest wrote in between is only in the overlay: look at both, keep one",
    )
