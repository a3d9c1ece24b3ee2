"""Execution state taken the plain way: stop, save, continue; and no execution state at all."""

from __future__ import annotations

from qmpsnap.hypervisor.guest import runstate
from qmpsnap.hypervisor.vmstate import migration
from qmpsnap.hypervisor.vmstate.session import Fix, Session, bounded, give_back, timed
from qmpsnap.hypervisor.vmstate.target import Target
from qmpsnap.shield import finish


async def disks_only(session: Session, fix: Fix) -> None:
    """No RAM: the pause is that of the transaction. A paused guest stays paused."""
    if not session.running:
        return await fix()
    async with (
        timed(session),
        session.watchdog.owing("cont", within=session.deadline) as owed,
        runstate.stopped(session.monitor, owed) as hold,
    ):
        async with bounded(session):
            await fix()
        await hold.release()
        await session.thaw()


async def paused(session: Session, target: Target, fix: Fix) -> None:
    """Stop, save everything, continue: the pause is as long as the saving."""
    monitor = session.monitor
    async with (
        timed(session),
        migration.tuned(monitor, set(), {}),
        session.watchdog.owing("cont", "cancel", within=session.deadline) as owed,
        runstate.stopped(monitor, owed) as hold,
    ):

        async def each(now: migration.Migration) -> None:
            session.show(now)
            await owed.renew()

        try:
            with monitor.listen("MIGRATION") as events:
                async with bounded(session):
                    await fix()
                    await monitor.execute("migrate", {"uri": target.uri})
                    await migration.reach(monitor, events, "completed", each=each)
        except BaseException:
            await finish(hold.release(by=give_back), within=60)
            raise
        await hold.release()
        await session.thaw()
