"""Folding on a real QEMU: done twice, broken off in the middle, refused, and with bitmaps."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmpsnap.errors import CommandRefused, JobFailed, MonitorLost
from qmpsnap.host import qemu_img
from qmpsnap.hypervisor.block import bitmap, fold, graph, job, overlay, transaction
from qmpsnap.hypervisor.monitor import Monitor, connect
from qmpsnap.ids import NodeName
from tests.faults.bench import options
from tests.rig.dirty import dirty, write
from tests.rig.qemu import Running, running
from tests.rig.wire import Fault, Witness, wired, witness

_BASE, _TOP = NodeName("d0"), NodeName("top")
_ONE = bitmap.name_of("web", "vda", "20261122T165057123Z")
_TWO = bitmap.name_of("web", "vda", "20261122T170000000Z")


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


@pytest.mark.parametrize("at", ["block-commit", "transaction", "job-complete", "job-dismiss"])
@pytest.mark.parametrize("delivered", [False, True], ids=["unseen", "delivered"])
async def test_a_fold_whose_wire_is_cut_leaves_no_job_and_loses_no_bitmap(
    at: str, delivered: bool, qemu72: Path, short: Path
) -> None:
    async with _disk(qemu72, short) as disk:
        async with connect(disk.process.qmp) as monitor:
            await disk.laid(monitor)
            new = transaction.AddBitmap(_TOP, _ONE, persistent=True)
            await transaction.commit(monitor, [new])
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
            (found,) = (await graph.query(monitor)).nodes[_BASE].bitmaps
            assert found.name == _ONE
            assert found.usable


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


@dataclass(frozen=True, slots=True)
class Layers:
    """A disk whose kept layers carry bitmaps: `lay` adds one more on top."""

    process: Running
    monitor: Monitor
    eye: Witness
    device: str

    async def chain(self) -> tuple[graph.Node, ...]:
        seen = await graph.query(self.monitor)
        return next(disk for disk in seen.disks if disk.name == self.device).chain

    async def lay(self, name: str, *first: transaction.Action) -> NodeName:
        over, node = (await self.chain())[0], NodeName(name)
        file = self.process.dir / f"{name}.qcow2"
        await qemu_img.create_overlay(file, Path(over.filename), over.driver, over.virtual_size)
        await overlay.add(self.monitor, overlay.Overlay(node, file, over))
        snapshot = transaction.Snapshot(over.name, node)
        await transaction.commit(self.monitor, [*first, snapshot])
        return node

    async def add(self, node: str, name: str, *, persistent: bool = True) -> None:
        new = transaction.AddBitmap(NodeName(node), name, persistent)
        await transaction.commit(self.monitor, [new])

    def write(self, megabyte: int) -> None:
        write(self.eye, self.device, megabyte << 20)

    def dirty(self, node: str, name: str) -> list[float]:
        """In megabytes; a cluster that is none of `write`'s shows as a broken number."""
        return sorted(found / 16 for found in dirty(self.eye, self.process.dir, node, name))

    async def bitmaps(self, node: str) -> dict[str, bitmap.Bitmap]:
        seen = await graph.query(self.monitor)
        return {one.name: one for one in seen.nodes[node].bitmaps}


@asynccontextmanager
async def _layers(
    qemu: Path, folder: Path, disk: str = "d0", *, images: bool = True
) -> AsyncIterator[Layers]:
    line, _ = options(folder, images=images)
    async with running(qemu, *line, directory=folder) as process:
        with witness(process.witness) as eye:
            async with connect(process.qmp) as monitor:
                yield Layers(process, monitor, eye, f"v{disk}")


@pytest.mark.parametrize("disk", ["d0", "d1"], ids=["qcow2", "raw"])
async def test_a_fold_takes_the_bitmap_of_a_layer_along(
    disk: str, qemu: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _layers(qemu, short, disk) as it:
        top = await it.lay("top")
        it.write(0)  # is in the layer, but before the point
        await it.add(top, _ONE)
        await it.add(top, "libvirt-1")
        it.write(1)
        complete = job.Job.complete

        async def late(self: job.Job) -> None:
            it.write(5)  # after the merge: only the commit can tell the base
            await graph.query(it.monitor)  # the job's own bitmaps have no name in 7.2 and 10.0
            await complete(self)

        monkeypatch.setattr(job.Job, "complete", late)
        assert await fold.fold(it.monitor, top, NodeName(disk)) == [top]
        it.write(7)
        assert it.dirty(disk, _ONE) == [1, 5, 7]
        found = await it.bitmaps(disk)
        assert set(found) == {_ONE}
        assert found[_ONE].persistent == (disk == "d0")
        assert bitmap.classify(await it.chain(), _ONE) == (bitmap.Standing.RECORDING, 0, "")


@pytest.mark.parametrize("disk", ["d0", "d1"], ids=["qcow2", "raw"])
async def test_a_fold_of_several_layers_loses_no_bitmap_on_the_way(
    disk: str, qemu: Path, short: Path
) -> None:
    async with _layers(qemu, short, disk) as it:
        low = await it.lay("low")
        it.write(0)
        await it.add(low, _ONE)
        it.write(1)
        mid = await it.lay("mid")
        it.write(2)
        top = await it.lay("top", transaction.AddBitmap(mid, _TWO, persistent=True))
        it.write(3)
        assert bitmap.classify(await it.chain(), _ONE) == (bitmap.Standing.RECORDING, 2, "")
        assert bitmap.classify(await it.chain(), _TWO) == (bitmap.Standing.RECORDING, 1, "")
        assert await fold.fold(it.monitor, top, NodeName(disk)) == [top, mid, low]
        assert [node.name for node in await it.chain()] == [disk]
        assert it.dirty(disk, _ONE) == [1, 2, 3]
        assert it.dirty(disk, _TWO) == [3]
        assert {top, mid, low} & set((await graph.query(it.monitor)).nodes) == set()


async def test_a_fold_without_bitmaps_is_one_commit(qemu: Path, short: Path) -> None:
    async with _layers(qemu, short) as it:
        low = await it.lay("low")
        it.write(0)
        top = await it.lay("top")
        it.write(1)
        with it.monitor.listen("BLOCK_JOB_READY") as ready:
            assert await fold.fold(it.monitor, top, _BASE) == [top, low]
            assert len(ready.pending()) == 1
        assert [node.name for node in await it.chain()] == [_BASE]


async def test_a_fold_that_is_broken_off_keeps_the_bitmap_twice_and_both_hold(
    qemu: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _layers(qemu, short) as it:
        top = await it.lay("top")
        it.write(0)
        await it.add(top, _ONE)
        it.write(1)

        async def refused(self: job.Job) -> None:
            raise CommandRefused("job-complete", "GenericError", "the fault")

        with monkeypatch.context() as patched:
            patched.setattr(job.Job, "complete", refused)
            with pytest.raises(CommandRefused, match="the fault"):
                await fold.fold(it.monitor, top, _BASE)
        assert await job.query(it.monitor) == []
        it.write(2)
        assert bitmap.classify(await it.chain(), _ONE) == (bitmap.Standing.RECORDING, 0, "")
        assert it.dirty(top, _ONE) == [1, 2]
        await fold.fold(it.monitor, top, _BASE)
        # the copy that was there has recorded all of the commit: too much, never too little
        assert it.dirty(_BASE, _ONE) == [0, 1, 2]


async def test_a_bitmap_of_the_base_that_is_no_use_gives_way(qemu: Path, short: Path) -> None:
    async with _layers(qemu, short) as it:
        await it.add(_BASE, _ONE)
        it.write(4)
        await it.monitor.execute("block-dirty-bitmap-disable", {"node": _BASE, "name": _ONE})
        top = await it.lay("top")
        await it.add(top, _ONE)
        it.write(1)
        await fold.fold(it.monitor, top, _BASE)
        assert it.dirty(_BASE, _ONE) == [1]


def _version_two(folder: Path) -> None:
    old = ["-f", "qcow2", "-o", "compat=0.10"]
    image = options(folder)[1][0]
    subprocess.run(["qemu-img", "create", "-q", *old, image, "16M"], check=True)


async def test_an_image_of_version_two_takes_a_bitmap_for_as_long_as_qemu_lives(
    qemu: Path, short: Path
) -> None:
    _version_two(short)
    async with _layers(qemu, short, images=False) as it:
        top = await it.lay("top")
        await it.add(top, _ONE)
        it.write(1)
        await fold.fold(it.monitor, top, _BASE)
        assert it.dirty(_BASE, _ONE) == [1]
        assert not (await it.bitmaps(_BASE))[_ONE].persistent


async def test_a_bitmap_that_is_being_read_is_not_folded_away(qemu: Path, short: Path) -> None:
    async with _layers(qemu, short) as it:
        top = await it.lay("top")
        await it.add(top, _ONE)
        it.write(1)
        address = {"type": "unix", "data": {"path": str(short / "nbd")}}
        it.eye.ask("nbd-server-start", addr=address)
        export = {"type": "nbd", "id": "e", "node-name": top}
        it.eye.ask("block-export-add", **export, bitmaps=[{"node": top, "name": _ONE}])
        with pytest.raises(JobFailed, match="is in use"):
            await fold.fold(it.monitor, top, _BASE)
        assert [node.name for node in await it.chain()] == [top, _BASE]
        it.eye.ask("nbd-server-stop")
        it.eye.until(lambda: it.eye.ask("query-block-exports") == [], within=10)
        await fold.fold(it.monitor, top, _BASE)
        assert it.dirty(_BASE, _ONE) == [1]


async def test_nodes_that_qemu_named_itself_are_folded_too(qemu: Path, short: Path) -> None:
    async with _layers(qemu, short) as it:
        await it.lay("top")
        await it.add("top", _ONE)
        it.write(1)
        await it.monitor.execute("quit")
        left = os.WEXITED | os.WNOWAIT
        await asyncio.to_thread(os.waitid, os.P_PID, it.process.pid, left)
    drive = f"file={short}/top.qcow2,if=none,id=dr"
    line = ["-nodefaults", "-drive", drive, "-device", "virtio-blk-pci,drive=dr,id=vd0"]
    async with running(qemu, *line, directory=short) as process:
        with witness(process.witness) as eye:
            async with connect(process.qmp) as monitor:
                it = Layers(process, monitor, eye, "vd0")
                top, base = (node.name for node in await it.chain())
                assert top.startswith("#block")
                await fold.fold(monitor, top, base)
                assert it.dirty(base, _ONE) == [1]
