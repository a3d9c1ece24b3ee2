"""The door to QMP on a real QEMU: each way that a session can fail has its own name."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qmpsnap.errors import (
    CommandRefused,
    MonitorAbsent,
    MonitorBusy,
    MonitorLost,
    QemuGone,
    ReplyMalformed,
)
from qmpsnap.hypervisor import monitor as door
from qmpsnap.hypervisor.monitor import Monitor, connect, settle
from tests.rig.qemu import Running, running
from tests.rig.wire import Fault, Wire, wired, witness


@pytest.fixture
async def machine(qemu72: Path, short: Path) -> AsyncIterator[Running]:
    async with running(qemu72, directory=short) as process:
        yield process


async def test_a_refusal_has_the_words_of_qemu(machine: Running) -> None:
    async with connect(machine.qmp) as monitor:
        with pytest.raises(CommandRefused, match="blockdev-del: Failed to find node") as refused:
            await monitor.execute("blockdev-del", {"node-name": "none"})
        assert refused.value.error_class == "GenericError"
        assert (await monitor.execute("query-status"))["status"] == "running"


async def test_a_reply_of_another_shape_is_named(machine: Running) -> None:
    async with connect(machine.qmp) as monitor:
        with pytest.raises(ReplyMalformed, match="query-status"):
            await monitor.query("query-status", list[str])


async def test_nobody_and_somebody_else_are_told_apart(machine: Running, short: Path) -> None:
    with pytest.raises(MonitorAbsent):
        async with connect(short / "none"):
            pass
    with witness(machine.qmp), pytest.raises(MonitorBusy):
        async with connect(machine.qmp, within=0.2):
            pass
    async with connect(machine.qmp) as monitor:  # the control
        await monitor.execute("query-status")


@pytest.mark.parametrize("says", [b"", b"hello\r\n", b'{"return": {}}\r\n'])
async def test_what_is_no_qmp_is_not_taken_for_it(says: bytes, short: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short / "odd"))
        listener.listen()

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                client.sendall(says)

        thread = asyncio.create_task(asyncio.to_thread(answer))
        with pytest.raises(MonitorAbsent if not says else ReplyMalformed):
            async with connect(short / "odd", within=5):
                pass
        await thread


async def test_who_waits_for_an_event_hears_of_the_end(machine: Running) -> None:
    async with connect(machine.qmp) as monitor:
        with monitor.listen("NEVER") as events:
            waiting = asyncio.create_task(events.next())
            await monitor.execute("query-status")
            machine.kill()
            with pytest.raises(MonitorLost):
                async with asyncio.timeout(10):
                    await waiting
        assert monitor.lost
        with pytest.raises(MonitorLost):
            await monitor.execute("query-status")


async def test_a_qemu_that_does_not_answer_is_not_waited_for_without_end(
    machine: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_SILENT", 0.5)
    async with connect(machine.qmp) as monitor:
        await monitor.execute("query-status")
        os.kill(machine.pid, signal.SIGSTOP)
        try:
            with pytest.raises(MonitorLost, match="no answer to query-status"):
                await monitor.execute("query-status")
        finally:
            os.kill(machine.pid, signal.SIGCONT)
        assert monitor.lost
        # its place is free: what is owed is paid over another session
        assert await settle(monitor, _stop) == "paid"
    with witness(machine.witness) as eye:
        assert eye.status == "paused"


async def _stop(monitor: Monitor) -> str:
    await monitor.execute("stop")
    return "paid"


@pytest.mark.parametrize("delivered", [False, True])
async def test_a_debt_is_paid_though_the_wire_goes_under_it(
    delivered: bool, machine: Running, short: Path
) -> None:
    with wired(short / "wire", machine.qmp) as wire, witness(machine.witness) as eye:
        async with connect(wire.path) as monitor:
            wire.arm(Fault("stop", delivered=delivered))
            assert await settle(monitor, _stop) == "paid"
            assert wire.happened.is_set()
            assert monitor.lost
            assert wire.names == ["stop", "qmp_capabilities", "stop"]
            assert eye.status == "paused"
            assert await settle(monitor, _stop) == "paid"  # the wire is known to be gone


async def test_a_debt_that_nobody_takes_says_why(machine: Running, short: Path) -> None:
    with wired(short / "wire", machine.qmp) as wire:
        await _unpaid(wire, machine)


async def _unpaid(wire: Wire, machine: Running) -> None:
    async with connect(wire.path) as monitor:
        wire.arm(Fault("stop", delivered=False))
        with pytest.raises(CommandRefused):
            await settle(monitor, _refused)
        with pytest.raises(MonitorLost):
            await monitor.execute("stop")
        with witness(machine.qmp), pytest.raises(MonitorLost, match="no other is to be had"):
            await settle(monitor, _stop, within=0.2)
        machine.kill()
        with pytest.raises(QemuGone):
            await settle(monitor, _stop)


async def _refused(monitor: Monitor) -> None:
    await monitor.execute("blockdev-del", {"node-name": "none"})
