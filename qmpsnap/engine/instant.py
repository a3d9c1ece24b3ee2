"""The instant: overlays are laid, the guard is armed, and RAM and disks are taken as planned."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from qmpsnap import private
from qmpsnap.engine import layers, room
from qmpsnap.engine.capture import Captured, Report, Shot
from qmpsnap.engine.debt import Debt
from qmpsnap.engine.phase import Phase
from qmpsnap.engine.plan import Plan
from qmpsnap.engine.survey import Survey
from qmpsnap.errors import LocalFailed
from qmpsnap.hypervisor.block import transaction
from qmpsnap.hypervisor.guest.watchdog import watching
from qmpsnap.hypervisor.monitor import Monitor


async def instant(
    monitor: Monitor, made: Plan, facts: Survey, debt: Debt, folder: Path, report: Report
) -> Captured:
    """Carry the plan out up to the point in time; the stream of the RAM goes into *folder*.

    The guest runs on its overlays afterwards. Raises Blocked where there is no room for what is
    to come, and what `Shot.take` raises.
    """
    await asyncio.to_thread(_make, folder)
    await asyncio.to_thread(room.expect, made.disks, folder)
    watch = watching(
        facts.machine.socket,
        facts.agent if made.freeze else None,
        connection=monitor.fileno(),
        log=debt.entry.path.parent / "watchdog.log",
    )
    async with watch as watchdog:
        monitor.told = watchdog.may_cut_monitor
        await layers.lay(monitor, made.disks)
        await asyncio.to_thread(_flush, made)
        await debt.note(Phase.HOLDING)

        async def fix() -> None:
            await transaction.commit(monitor, made.actions)

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
        try:
            captured = await shot.take()
        finally:
            debt.frozen = shot.still_frozen
    await debt.note(Phase.CAPTURED)
    return captured


def _make(folder: Path) -> None:
    try:
        private.folders(folder.parent)
        folder.mkdir(0o700)
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
