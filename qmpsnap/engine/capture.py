"""The point in time: the modes of the plan are tried in turn until one took RAM and disks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.engine.plan import Plan
from qmpsnap.errors import AgentError, FreezeTooLong, IllegalMove, PauseTooLong
from qmpsnap.hypervisor.abilities import Abilities, Tracking
from qmpsnap.hypervisor.guest import quiesce
from qmpsnap.hypervisor.guest.watchdog import Watchdog
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.hypervisor.vmstate import live, target
from qmpsnap.hypervisor.vmstate.background import background
from qmpsnap.hypervisor.vmstate.paused import disks_only, paused
from qmpsnap.hypervisor.vmstate.session import Fix, Pause, RamMode, Session

log = logging.getLogger(__name__)
Report = Callable[[str, int, int], None]
"""Called with what is going on, how much of it is done, and how much there is (bytes)."""

_BESIDE_RAM = 96 << 20  # bytes of a stream that are not RAM pages: devices, video RAM, ROMs


@dataclass(frozen=True, slots=True)
class Captured:
    """What was taken and how. *frozen_ms* is None if the guest was not frozen."""

    mode: RamMode
    reason: str
    pause: Pause
    frozen_ms: float | None


@dataclass(slots=True)
class Shot:
    """One attempt at the point in time and everything that it needs."""

    plan: Plan
    monitor: Monitor
    watchdog: Watchdog
    abilities: Abilities
    agent: Path | None
    raw: Path
    fix: Fix
    report: Report
    freezer: quiesce.Freezer | None = None

    @property
    def still_frozen(self) -> bool:
        """Whether a thaw is owed and was not paid."""
        return self.freezer is not None and self.freezer.owed

    async def take(self) -> Captured:
        """Try the plan's modes in turn.

        Raises PauseTooLong, MigrationFailed and what QEMU, the agent and the disk say; the guest
        then runs as before, but the transaction may have happened: look.
        """
        reason = self.plan.why
        for mode, further in zip(self.plan.modes, (*self.plan.modes[1:], None), strict=True):
            try:
                pause, frozen_ms = await self._one(mode, last=further is None)
            except live.DoesNotConverge as stuck:
                if further is None:
                    raise
                log.info("%s; going on with %s", stuck, further)
                reason = f"live did not converge: {stuck}"
                await asyncio.to_thread(self.raw.unlink, missing_ok=True)
                continue
            bound = self.plan.max_pause
            if bound is not None and pause.milliseconds > bound * 1000:
                raise PauseTooLong(
                    f"the guest was held {pause.milliseconds:.0f} ms, more than {bound * 1000:g}"
                )
            return Captured(mode, reason, pause, frozen_ms)
        raise IllegalMove("a plan without a RAM mode")

    async def _one(self, mode: RamMode, *, last: bool) -> tuple[Pause, float | None]:
        session = Session(
            self.monitor,
            self.watchdog,
            self.plan.running,
            self.plan.max_pause,
            progress=lambda done, total: self.report(f"saving RAM ({mode})", done, total),
        )
        if not self.plan.freeze:
            await self._run(mode, session, last=last)
            return session.pause, None
        assert self.agent is not None
        freezer = session.freezer = self.freezer = quiesce.Freezer(
            self.agent, self.watchdog, longest=self.plan.max_freeze
        )
        async with quiesce.thawed_after(freezer):
            try:
                if mode is not RamMode.LIVE:
                    await freezer.freeze()
                await self._run(mode, session, last=last)
            except live.HeldTooEarly:
                # all of its RAM is saved frozen then: longer, but frozen it is
                await asyncio.to_thread(self.raw.unlink, missing_ok=True)
                session.pause = Pause()
                if not freezer.owed:
                    await freezer.freeze()
                await self._run(mode, session, last=last)
        if not freezer.state.held:
            raise AgentError(
                f"frozen were {freezer.state.count} file systems, thawed {freezer.state.thawed}: "
                "somebody thawed the guest meanwhile"
            )
        longest, took = self.plan.max_freeze, freezer.state.milliseconds
        if took > longest * 1000:
            raise FreezeTooLong(f"the guest was frozen {took:.0f} ms, more than {longest * 1000:g}")
        return session.pause, took

    async def _run(self, mode: RamMode, session: Session, *, last: bool) -> None:
        if mode is RamMode.NONE:
            return await disks_only(session, self.fix)
        if mode is RamMode.BACKGROUND:
            size = self.plan.ram_bytes + self.plan.ram_bytes // 256 + _BESIDE_RAM
            async with target.drained(self.monitor, self.raw, size=size) as drain:
                safe = self.abilities.background_safe
                return await background(session, drain, self.fix, failure_safe=safe)
        uses_uri = self.abilities.file_uri
        async with target.direct(self.monitor, self.raw, file_uri=uses_uri) as file:
            if mode is RamMode.PAUSED:
                await paused(session, file, self.fix)
            else:
                one_pass = self.abilities.tracking is Tracking.ONE_PASS
                aim = live.Aim(self.plan.pause, self.plan.budget, stretch=last, one_pass=one_pass)
                await live.live(session, file, self.fix, aim)
