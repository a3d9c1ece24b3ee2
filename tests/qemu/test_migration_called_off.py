"""A live save that is called off at any moment lets the guest go."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qmpsnap.errors import CommandRefused
from qmpsnap.hypervisor.guest import runstate
from qmpsnap.hypervisor.monitor import connect
from qmpsnap.hypervisor.vmstate import migration
from qmpsnap.hypervisor.vmstate.session import give_back
from tests.faults.bench import options
from tests.rig.qemu import running
from tests.rig.wire import witness

_ROUNDS = 150


async def test_the_guest_runs_whenever_a_live_save_is_called_off(qemu: Path, short: Path) -> None:
    line, _ = options(short)
    met: set[str] = set()
    async with running(qemu, *line, directory=short) as process:
        with witness(process.witness) as eye:
            async with (
                connect(process.qmp) as monitor,
                migration.tuned(monitor, {"pause-before-switchover"}, {"downtime-limit": 20}),
            ):
                for looks in range(_ROUNDS):
                    await monitor.execute("migrate", {"uri": "exec:cat >/dev/null"})
                    # a look more each time: the switchover comes after a few
                    for _ in range(looks % 15):
                        if (now := await migration.query(monitor)).status == "pre-switchover":
                            break
                        met.add(now.status)
                    async with asyncio.timeout(20):
                        await give_back(monitor)
                    assert eye.status == "running"
                    assert eye.ask("query-migrate")["status"] == "cancelled"
    assert "active" in met


async def test_a_wake_that_nobody_waits_for_is_refused_or_forgotten(
    qemu72: Path, short: Path
) -> None:
    line, _ = options(short)
    async with running(qemu72, *line, directory=short) as process, connect(process.qmp) as monitor:
        with pytest.raises(CommandRefused):
            await monitor.execute("migrate-continue", migration.WAKE)
        assert await runstate.query(monitor) is runstate.RunState.RUNNING
