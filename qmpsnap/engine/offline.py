"""Settling what a crash left behind when QEMU is gone too: its overlays go back by qemu-img."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from qmpsnap.engine import layers, recover
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.phase import Phase
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import LocalFailed
from qmpsnap.host import journal, qemu_img
from qmpsnap.store import pages

log = logging.getLogger(__name__)


async def settle_offline(roots: Roots, machine: Machine) -> list[recover.Recovered]:
    """Give the disks of *machine* what the guest had written into overlays of an unsealed point.

    Only what nobody has open: qemu-img takes QEMU's own locks. A disk that was written to past its
    overlay (QEMU was started again without it) is left as it is, the overlay is kept, and so is
    the debt. Raises LocalFailed.
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
                did += await _given_back(one, never_written=empty)
            await asyncio.to_thread(recover.remove, roots.local.point(machine.name, point))
            await asyncio.to_thread(pages.forget, roots.local, machine.name, record.id)
        await asyncio.to_thread(recover.remove_sockets, owed)
        await asyncio.to_thread(entry.close)
        settled.append(recover.Recovered(record.id, tuple(did) or ("nothing was left to do",)))
    return settled


async def _given_back(one: layers.Laid, *, never_written: bool) -> list[str]:
    overlay = Path(one.path)
    if not await asyncio.to_thread(overlay.exists):
        return []
    if never_written or not await qemu_img.allocated(overlay, "qcow2", 1):
        await asyncio.to_thread(overlay.unlink)
        return []
    await asyncio.to_thread(_refuse_newer, Path(one.beneath), overlay)
    await qemu_img.commit(overlay, "qcow2")
    await asyncio.to_thread(overlay.unlink)
    return [f"{overlay} was committed into {one.beneath}"]


def _refuse_newer(beneath: Path, overlay: Path) -> None:
    # it was frozen before the overlay took its first write
    if beneath.stat().st_mtime_ns > overlay.stat().st_mtime_ns:
        raise LocalFailed(
            f"{beneath} was written to after {overlay} had taken its place: QEMU was started again "
            "without it",
            hint="what the guest wrote in between is only in the overlay: look at both, keep one",
        )
