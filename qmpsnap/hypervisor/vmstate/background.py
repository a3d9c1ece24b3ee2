"""Execution state taken in the background: RAM is write-protected and saved while it is used."""

from __future__ import annotations

from contextlib import suppress

from qmpsnap.errors import MigrationFailed, MonitorLost
from qmpsnap.hypervisor.guest import runstate
from qmpsnap.hypervisor.monitor import Monitor, settle
from qmpsnap.hypervisor.vmstate import migration
from qmpsnap.hypervisor.vmstate.session import Fix, Session, bounded, timed
from qmpsnap.hypervisor.vmstate.target import Target
from qmpsnap.shield import finish


async def background(session: Session, target: Target, fix: Fix, *, failure_safe: bool) -> None:
    """Stop, fix the disks, protect the RAM, continue; each page is saved before it changes.

    The guest is continued only once pages are counted, for then the protection is armed: earlier
    it would run on between its disks and its RAM. 7.2 continues it by itself; 9.0 and later leave
    a guest that was paused before paused.

    *failure_safe*: whether this QEMU survives a cancelled background save; one that does not is
    let run to its end whatever happens (7.2 would hang the guest for ever).
    """
    monitor = session.monitor
    async with timed(session), migration.tuned(monitor, {"background-snapshot"}, {}):
        with monitor.listen("MIGRATION") as events:
            try:
                if session.running:
                    await _held(session, target, fix)
                    await session.thaw()  # its RAM is still being saved
                else:
                    await fix()
                    await monitor.execute("migrate", {"uri": target.uri})

                async def each(now: migration.Migration) -> None:
                    session.show(now)

                await migration.reach(monitor, events, "completed", each=each)
            except BaseException:
                with suppress(MonitorLost):  # `recover` finds it
                    end = migration.call_off if failure_safe else _seen_through
                    await finish(settle(monitor, end), within=60 if failure_safe else 3600)
                raise


async def _held(session: Session, target: Target, fix: Fix) -> None:
    monitor = session.monitor
    async with (
        session.watchdog.owing("cont", within=session.deadline) as owed,
        runstate.stopped(monitor, owed) as hold,
    ):
        async with bounded(session):
            await fix()
            await monitor.execute("migrate", {"uri": target.uri})
            while True:
                now = await migration.query(monitor)
                if now.ram.normal + now.ram.duplicate > 0:
                    break
                now.refuse_over()
        await hold.release()


async def _seen_through(monitor: Monitor) -> None:
    with monitor.listen("MIGRATION") as events, suppress(MigrationFailed):
        await migration.reach(monitor, events, "completed")
