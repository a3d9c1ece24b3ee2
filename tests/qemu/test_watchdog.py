"""The watchdog's process by itself: what is owed is paid when its engine ends, and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from qmpsnap.errors import Failed, GuestLeftStopped, MonitorLost, SnapError
from qmpsnap.hypervisor.guest import runstate
from qmpsnap.hypervisor.guest.watchdog import Watchdog, watching
from qmpsnap.hypervisor.monitor import Monitor, connect
from tests.faults.bench import options
from tests.rig.qemu import Running, running
from tests.rig.wire import witness


@pytest.fixture
async def machine(qemu72: Path, short: Path) -> AsyncIterator[Running]:
    line, _ = options(short)
    async with running(qemu72, *line, directory=short) as process:
        yield process


@asynccontextmanager
async def _watched(machine: Running, log: Path) -> AsyncIterator[tuple[Monitor, Watchdog]]:
    async with connect(machine.qmp) as monitor:
        fd = monitor.fileno()
        async with watching(machine.qmp, None, connection=fd, log=log) as dog:
            yield monitor, dog


async def _failing(block: AbstractAsyncContextManager[object], failure: Exception) -> None:
    async with block:
        raise failure


async def _settled_and_failing(dog: Watchdog) -> None:
    async with dog.owing("cont", within=60) as debt:
        debt.settled = True
        raise Failed("no")


async def test_what_is_paid_is_not_paid_again(machine: Running, short: Path) -> None:
    log = short / "log"
    with witness(machine.witness) as eye:
        async with _watched(machine, log) as (monitor, dog):
            async with dog.owing("cont", within=60):
                await monitor.execute("stop")
            with pytest.raises(Failed):
                await _settled_and_failing(dog)
        # whoever stops the guest on purpose finds it stopped: nothing was owed at the end
        assert eye.status == "paused"
        assert log.read_text() == ""


@pytest.mark.parametrize("failure", [GuestLeftStopped("no"), MonitorLost("no")])
async def test_what_nobody_saw_paid_is_paid_after_the_engine(
    machine: Running, short: Path, failure: SnapError
) -> None:
    with witness(machine.witness) as eye:
        async with _watched(machine, short / "log") as (monitor, dog):
            await monitor.execute("stop")
            with pytest.raises(type(failure)):
                await _failing(dog.owing("cont", within=60), failure)
            assert eye.status == "paused"
        eye.until_running(within=5)
        eye.until(lambda: "engine gone" in (short / "log").read_text(), within=5)


async def test_a_debt_that_is_renewed_is_not_called_in(machine: Running, short: Path) -> None:
    log = short / "log"
    with witness(machine.witness) as eye:
        async with (
            _watched(machine, log) as (monitor, dog),
            dog.owing("cont", within=1.5) as debt,
        ):
            await monitor.execute("stop")
            loop = asyncio.get_running_loop()
            end = loop.time() + 3
            while loop.time() < end:
                await debt.renew()
                assert (await monitor.execute("query-status"))["status"] == "paused"
            # the control: without it, it is
            await asyncio.to_thread(eye.until_running, within=10)
        eye.until(lambda: "deadline passed" in log.read_text(), within=5)


async def test_without_a_watchdog_nothing_is_held(machine: Running, short: Path) -> None:
    with witness(machine.witness) as eye:
        async with _watched(machine, short / "log") as (_, dog):
            os.kill(dog.pid, signal.SIGKILL)
            with pytest.raises(Failed, match="the watchdog has ended"):
                await _failing(dog.owing("cont", within=60), AssertionError("held"))
        assert eye.status == "running"


async def test_a_stopped_block_runs_again_however_it_ends(machine: Running) -> None:
    with witness(machine.witness) as eye:
        async with connect(machine.qmp) as monitor:
            with pytest.raises(Failed, match="no"):
                await _failing(runstate.stopped(monitor), Failed("no"))
            assert eye.status == "running"
            inside = asyncio.Event()

            async def hold() -> None:
                async with runstate.stopped(monitor):
                    inside.set()
                    await asyncio.Event().wait()

            holding = asyncio.create_task(hold())
            await inside.wait()
            assert eye.status == "paused"
            holding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await holding
            assert eye.status == "running"
            async with runstate.stopped(monitor) as held:
                await held.release()
                assert eye.status == "running"
