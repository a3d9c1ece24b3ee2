"""Copies of frozen disks: fulls, and increments of what changed, while the guest runs on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from qmpsnap.engine.capture import Report
from qmpsnap.engine.copy import Copied, copied
from qmpsnap.engine.debt import Debt
from qmpsnap.engine.levels import newest_bitmaps
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.phase import Phase
from qmpsnap.engine.plan import Plan
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.wishes import Copying
from qmpsnap.errors import LocalFailed, SnapError
from qmpsnap.host.priority import in_background
from qmpsnap.hypervisor.block import bitmap, fold
from qmpsnap.hypervisor.monitor import Monitor, connect
from qmpsnap.store import digests
from qmpsnap.store.manifest import Storage
from qmpsnap.store.points import Points
from qmpsnap.store.points import read as read_points

log = logging.getLogger(__name__)


async def taken(
    monitor: Monitor,
    made: Plan,
    debt: Debt,
    folder: Path,
    points: Points,
    how: Copying,
    report: Report,
) -> dict[str, Copied]:
    """Copy what *made* says into *folder*, then give the guest its own disks back.

    Raises as `take`, and JobFailed; the debt then tells how far it came.
    """
    if not any(disk.copied for disk in made.disks):
        return {}
    found = await take(monitor, made, folder, points, how, report)
    await fold_back(monitor, made)
    await debt.note(Phase.COPIED)
    await asyncio.to_thread(forget_overlays, made)
    return found


async def sweep_bitmaps(roots: Roots, machine: Machine, made: Plan) -> None:
    """Remove the bitmaps of ours that no increment needs any more.

    The old ones have recorded on until the new point was sealed. One that cannot be removed now
    goes another time.
    """
    if not any(disk.copied for disk in made.disks):
        return
    try:
        points = await asyncio.to_thread(read_points, roots.local, machine.name)
        needed = newest_bitmaps(points)
        async with connect(machine.socket) as monitor:
            await bitmap.remove_all(monitor, lambda name: _wanted(name, machine.name, needed))
    except SnapError as trouble:
        log.warning("%s: old bitmaps stay for now: %s", machine.name, trouble)


def _wanted(name: str, vm: str, needed: set[str]) -> bool:
    parsed = bitmap.parse(name)
    return parsed is None or parsed.vm != vm or name in needed


async def digested(roots: Roots, half: Storage, report: Report) -> None:
    """Write down the digests of the images that *half* has written; raises LocalFailed."""
    names = [Path(disk.chain[0].path).name for disk in half.disks if disk.means != "frozen"]
    if names:
        folder = roots.local.point(half.vm, half.point)
        await in_background(digests.take, folder, half.point, names, _telling(report))


def _telling(report: Report) -> Callable[[int, int, str], None]:
    return lambda done, total, what: report("reading the copies back", done, total)


async def take(
    monitor: Monitor, made: Plan, folder: Path, points: Points, how: Copying, report: Report
) -> dict[str, Copied]:
    """Copy every disk of *made* that is to be copied into *folder*; by label.

    The guest is on its overlays, so what is read stands still. Raises LocalFailed, VmBusy,
    CommandRefused, MonitorLost; what was written by then stays for the caller to remove.
    """
    found: dict[str, Copied] = {}
    for disk in made.disks:
        if disk.copied:
            found[disk.label] = await copied(monitor, disk, folder, points, how, report)
    return found


async def fold_back(monitor: Monitor, made: Plan) -> None:
    """The overlays of the copied disks go back into what they froze. Raises JobFailed."""
    for disk in made.disks:
        if disk.copied:
            await fold.fold(monitor, disk.overlay.node, disk.site.disk.top.name)


def forget_overlays(made: Plan) -> None:
    """Delete the files of overlays that were folded back. Raises LocalFailed."""
    for disk in made.disks:
        if disk.copied:
            try:
                disk.overlay.path.unlink(missing_ok=True)
            except OSError as failed:
                raise LocalFailed(f"{disk.overlay.path}: {failed.strerror}") from failed
