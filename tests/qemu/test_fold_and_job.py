"""Folding on a real QEMU: done twice, broken off in the middle, refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmpsnap.errors import CommandRefused, JobFailed, MonitorLost
from qmpsnap.host import qemu_img
from qmpsnap.hypervisor.block import fold, graph, job, overlay, transaction
from qmpsnap.hypervisor.monitor import Monitor, connect
from qmpsnap.ids import NodeName
from tests.faults.bench import options
from tests.rig.qemu import Running, running
from tests.rig.wire import Fault, wired

_BASE, _TOP = NodeName("d0"), NodeName("top")


@dataclass(frozen=True, slots=True)
class Disk:
    process: Running
    file: Path

    async def laid(self, monitor: Monitor) -> None:
        """`top` over `d0`, by the same calls as the engine's."""
        await qemu_img.create_overlay(self.file, self.file.with_name("d0.qcow2"), "qcow2", 16 << 20)
        seen = await graph.query(monitor)
        await overlay.add(monitor, overlay.Overlay(_TOP, self.file, seen.nodes[_BASE]))
        await transaction.commit(monitor, [transaction.Snapshot(_BASE, _TOP)])
        assert await _chain(monitor) == [_TOP, _BASE]


@asynccontextmanager
async def _disk(qemu: Path, folder: Path) -> AsyncIterator[Disk]:
    line, _ = options(folder)
    async with running(qemu, *line, directory=folder) as process:
        yield Disk(process, folder / "top.qcow2")


async def _chain(monitor: Monitor) -> list[str]:
    seen = await graph.query(monitor)
    return [node.name for node in next(disk for disk in seen.disks if disk.name == "vd0").chain]


async def test_a_fold_gives_the_disk_back_and_leaves_nothing(qemu: Path, short: Path) -> None:
    async with _disk(qemu, short) as disk, connect(disk.process.qmp) as monitor:
        await disk.laid(monitor)
        assert await fold.fold(monitor, _TOP, _BASE) == [_TOP]
        assert await _chain(monitor) == [_BASE]
        assert await job.query(monitor) == []
        assert _TOP not in (await graph.query(monitor)).nodes
        with pytest.raises(JobFailed, match="does not lie under"):
            await fold.fold(monitor, _TOP, _BASE)


@pytest.mark.parametrize("at", ["block-commit", "job-complete", "job-dismiss"])
@pytest.mark.parametrize("delivered", [False, True], ids=["unseen", "delivered"])
async def test_a_fold_whose_wire_is_cut_leaves_no_job(
    at: str, delivered: bool, qemu72: Path, short: Path
) -> None:
    async with _disk(qemu72, short) as disk:
        async with connect(disk.process.qmp) as monitor:
            await disk.laid(monitor)
        with wired(short / "wire", disk.process.qmp) as wire:
            async with connect(wire.path) as monitor:
                wire.arm(Fault(at, delivered=delivered))
                with suppress(MonitorLost):
                    await fold.fold(monitor, _TOP, _BASE)
                assert wire.happened.is_set()
        async with connect(disk.process.qmp) as monitor:
            assert await job.query(monitor) == []
            if await _chain(monitor) == [_TOP, _BASE]:
                await fold.fold(monitor, _TOP, _BASE)
            assert await _chain(monitor) == [_BASE]


async def test_a_fold_that_a_dead_engine_left_is_ended(qemu: Path, short: Path) -> None:
    async with _disk(qemu, short) as disk, connect(disk.process.qmp) as monitor:
        await disk.laid(monitor)
        started = {"device": _TOP, "base-node": _BASE, "auto-dismiss": False}
        await monitor.execute("block-commit", {"job-id": f"fold-{_TOP}", **started})
        with pytest.raises(CommandRefused):  # the fault: a second one does not go
            await fold.fold(monitor, _TOP, _BASE)
        # and does not take along what is not its own
        assert [one.id for one in await job.query(monitor)] == [f"fold-{_TOP}"]
        await fold.broken_off(monitor)
        assert await job.query(monitor) == []
        assert await _chain(monitor) == [_TOP, _BASE]
        await fold.broken_off(monitor)
        assert await fold.fold(monitor, _TOP, _BASE) == [_TOP]
