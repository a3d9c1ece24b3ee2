"""Copies of frozen disks: fulls, and increments of what changed, while the guest runs on."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qmpsnap.engine import folds, layers, recover
from qmpsnap.engine.capture import Report
from qmpsnap.engine.copy import Copied, copied
from qmpsnap.engine.debt import Debt
from qmpsnap.engine.levels import is_copy
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.phase import Phase
from qmpsnap.engine.plan import Plan
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.sealing import Sealing
from qmpsnap.engine.wishes import Copying, Level
from qmpsnap.errors import LocalFailed, SnapError
from qmpsnap.host.priority import in_background
from qmpsnap.hypervisor.block import fold
from qmpsnap.hypervisor.guest import runstate
from qmpsnap.hypervisor.monitor import Monitor, connect, settle
from qmpsnap.store import digests
from qmpsnap.store.files import forget_partial
from qmpsnap.store.layout import DIGESTS, PAIRED, STORAGE
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
    *,
    asked: Level,
    sealing: Sealing | None = None,
) -> dict[str, Copied]:
    """Copy what *made* says into *folder*, then give the guest its own disks back.

    *asked* is the level that was wished for, *sealing* as for `copied`. Raises as `take`, and
    JobFailed; the debt then tells how far it came.
    """
    if not any(disk.copied for disk in made.disks):
        return {}
    with _private(debt.owed.sockets) as sockets:
        found = await take(monitor, made, folder, points, how, report, sockets, asked, sealing)
    await fold_back(monitor, made, debt)
    if made.running:
        await _retried(monitor, made)
    await debt.note(Phase.COPIED)
    return found


@contextmanager
def _private(name: str | None) -> Iterator[Path]:
    """The folder for sockets that the journal knows, ours alone. Raises LocalFailed."""
    assert name is not None
    folder = Path(name)
    try:
        folder.mkdir(0o700)
    except OSError as failed:
        raise LocalFailed(f"{folder}: {failed.strerror}") from failed
    yield folder
    # after a failure it stays: a server of ours that could not be ended is known by its socket
    shutil.rmtree(folder, ignore_errors=True)


async def paid(roots: Roots, machine: Machine, made: Plan, debt: Debt) -> None:
    """The point is sealed: bitmaps that no increment needs any more go, and then the debt does.

    A guest that lacked the room which we had taken meanwhile goes on. Where QEMU is out of reach
    the debt for bitmaps stands, for `recover`: the point is whole all the same. Raises LocalFailed.
    """
    copied = any(disk.copied for disk in made.disks)

    async def settled(monitor: Monitor) -> None:
        if copied:
            await recover.sweep(roots, machine, monitor)
        if made.running:
            await _retried(monitor, made)

    try:
        async with connect(machine.socket) as monitor:
            await settle(monitor, settled)
    except SnapError as trouble:
        if copied:
            log.warning("%s: old bitmaps stay for now: %s", machine.name, trouble)
            return
        log.info("%s: was not looked at once more: %s", machine.name, trouble)
    await asyncio.to_thread(debt.entry.close)


async def _retried(monitor: Monitor, made: Plan) -> None:
    if await runstate.retry_io(monitor):
        log.warning("%s: QEMU had stopped the guest: its overlay met an I/O error", made.vm)


async def digested(roots: Roots, vm: str, report: Report) -> None:
    """Write down the digests of all images of *vm* that have none yet.

    That is what was just sealed, and what an engine that died had sealed before; the names that it
    has left beside are removed. Where it fails the points are whole all the same, and `verify`
    tells what is missing.
    """
    for point in await asyncio.to_thread(read_points, roots.local, vm):
        await asyncio.to_thread(_forget_partials, point.folder)
        names = [Path(disk.chain[0].path).name for disk in point.storage.disks if is_copy(disk)]
        if names and not await asyncio.to_thread((point.folder / DIGESTS).exists):
            try:
                await in_background(digests.take, point.folder, point.name, names, _telling(report))
            except LocalFailed as failed:
                log.warning("%s %s was not hashed: %s", vm, point.name, failed)


def _forget_partials(folder: Path) -> None:
    for name in (STORAGE, DIGESTS, PAIRED):
        if (folder / name).exists():
            forget_partial(folder / name, LocalFailed)


def _telling(report: Report) -> Callable[[int, int, str], None]:
    return lambda done, total, what: report("reading the copies back", done, total)


async def take(
    monitor: Monitor,
    made: Plan,
    folder: Path,
    points: Points,
    how: Copying,
    report: Report,
    sockets: Path,
    asked: Level,
    sealing: Sealing | None = None,
) -> dict[str, Copied]:
    """Copy every disk of *made* that is to be copied into *folder*; by label.

    The guest is on its overlays, so what is read stands still. Raises as `copied`; what was written
    by then stays for the caller to remove.
    """
    found: dict[str, Copied] = {}
    for disk in made.disks:
        if disk.copied:
            found[disk.label] = await copied(
                monitor, disk, folder, points, how, report,
                sockets=sockets, asked=asked, sealing=sealing,
            )  # fmt: skip
    return found


async def fold_back(monitor: Monitor, made: Plan, debt: Debt) -> None:
    """The overlays of the copied disks go back into what they froze; their files go at once.

    Should QEMU end between two of them, what is still there is what the disk lacks. Raises
    JobFailed, LocalFailed.
    """
    for disk in made.disks:
        if disk.copied:
            told = folds.noting(debt.entry, str(disk.overlay.path))
            await fold.fold(monitor, disk.overlay.node, disk.site.disk.top.name, told=told)
            await asyncio.to_thread(layers.unlink, disk.overlay.path)
