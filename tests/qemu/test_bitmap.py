"""Bitmaps of ours on real QEMUs: from the transaction that makes them to the kill they miss."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qmpsnap.errors import CommandRefused
from qmpsnap.host import qemu_img
from qmpsnap.hypervisor.block import bitmap, fold, graph, overlay
from qmpsnap.hypervisor.block.bitmap import Bitmap, Standing
from qmpsnap.hypervisor.block.transaction import Action, AddBitmap, Snapshot, commit
from qmpsnap.hypervisor.guest import runstate
from qmpsnap.hypervisor.monitor import Monitor, connect
from qmpsnap.hypervisor.vmstate import migration
from qmpsnap.ids import NodeName
from tests.faults.bench import options
from tests.rig.dirty import CLUSTER, dirty, write
from tests.rig.qemu import Running, running
from tests.rig.wire import Witness, witness

MIB = 1 << 20
_OLD = bitmap.name_of("web", "vd0", "20261122T165057123Z")
_NEW = bitmap.name_of("web", "vd0", "20261122T170000000Z/20261122T180000000Z")
_DISKS = pytest.mark.parametrize("disk", ["d0", "d1"], ids=["qcow2", "raw"])


@dataclass(frozen=True, slots=True)
class Vm:
    process: Running
    monitor: Monitor
    eye: Witness

    def dirty(self, node: str, name: str) -> set[int]:
        return dirty(self.eye, self.process.dir, node, name)

    async def chain(self, disk: str) -> tuple[graph.Node, ...]:
        seen = await graph.query(self.monitor)
        return next(one for one in seen.disks if one.name == f"v{disk}").chain

    async def names(self, node: str) -> dict[str, Bitmap]:
        seen = await graph.query(self.monitor)
        return {one.name: one for one in seen.nodes[node].bitmaps}

    async def overlaid(self, disk: str) -> list[Action]:
        """The action that puts an overlay on *disk*, all else prepared."""
        base = (await self.chain(disk))[0]
        file = self.process.dir / f"over-{disk}.qcow2"
        await qemu_img.create_overlay(file, Path(base.filename), base.driver, base.virtual_size)
        node = NodeName(f"over-{disk}")
        await overlay.add(self.monitor, overlay.Overlay(node, file, base))
        return [Snapshot(base.name, node)]

    async def fold(self, disk: str) -> None:
        await fold.fold(self.monitor, NodeName(f"over-{disk}"), NodeName(disk))


@asynccontextmanager
async def _vm(qemu: Path, folder: Path, *, again: bool = False) -> AsyncIterator[Vm]:
    line, _ = options(folder, images=not again)
    async with running(qemu, *line, directory=folder) as process:
        with witness(process.witness) as eye:
            async with connect(process.qmp) as monitor:
                yield Vm(process, monitor, eye)


def _add(disk: str, name: str) -> AddBitmap:
    return AddBitmap(NodeName(disk), name, persistent=disk == "d0")


@_DISKS
async def test_a_scratch_overlay_costs_neither_the_old_nor_the_new(
    disk: str, qemu: Path, short: Path
) -> None:
    async with _vm(qemu, short) as vm:
        await commit(vm.monitor, [_add(disk, _OLD)])
        write(vm.eye, f"v{disk}", 0)
        write(vm.eye, f"v{disk}", MIB, 2 * CLUSTER)
        await commit(vm.monitor, [_add(disk, _NEW), *await vm.overlaid(disk)])
        write(vm.eye, f"v{disk}", 4 * MIB)

        chain = await vm.chain(disk)
        assert bitmap.classify(chain, _OLD) == (Standing.RECORDING, 1, "")
        assert bitmap.classify(chain, _NEW) == (Standing.RECORDING, 1, "")
        assert {one.name: one.count for one in chain[1].bitmaps} == {_OLD: 3 * CLUSTER, _NEW: 0}
        assert {one.persistent for one in chain[1].bitmaps} == {disk == "d0"}
        assert vm.dirty(disk, _OLD) == {0, 16, 17}

        await vm.fold(disk)
        assert vm.dirty(disk, _OLD) == {0, 16, 17, 64}
        assert vm.dirty(disk, _NEW) == {64}
        write(vm.eye, f"v{disk}", 8 * MIB)
        assert vm.dirty(disk, _NEW) == {64, 128}
        assert bitmap.classify(await vm.chain(disk), _NEW) == (Standing.RECORDING, 0, "")


async def test_a_refused_action_adds_no_bitmap(qemu: Path, short: Path) -> None:
    async with _vm(qemu, short) as vm:
        nowhere = Snapshot(NodeName("d0"), NodeName("nowhere"))
        with pytest.raises(CommandRefused):
            await commit(vm.monitor, [_add("d0", _NEW), nowhere])
        assert await vm.names("d0") == {}


async def test_bitmaps_made_at_the_switchover_outlive_it(qemu: Path, short: Path) -> None:
    """The disks go inactive at the end of the migration, and come back with the `cont`."""
    async with _vm(qemu, short) as vm:
        for disk in ("d0", "d1"):
            await commit(vm.monitor, [_add(disk, _OLD)])
            write(vm.eye, f"v{disk}", 0)
        actions = [action for disk in ("d0", "d1") for action in await vm.overlaid(disk)]
        async with migration.tuned(vm.monitor, {"pause-before-switchover"}, {}):
            with vm.monitor.listen("MIGRATION") as events:
                uri = f"exec:cat >{short}/stream"
                await vm.monitor.execute("migrate", {"uri": uri})
                await migration.reach(vm.monitor, events, "pre-switchover")
                await commit(vm.monitor, [_add("d0", _NEW), _add("d1", _NEW), *actions])
                await vm.monitor.execute("migrate-continue", {"state": "pre-switchover"})
                await migration.reach(vm.monitor, events, "completed")
        await runstate.let_run(vm.monitor)
        assert (short / "stream").read_bytes().startswith(b"QEVM")
        for disk in ("d0", "d1"):
            write(vm.eye, f"v{disk}", 2 * MIB)
            assert vm.dirty(disk, _OLD) == {0}
            assert vm.dirty(disk, _NEW) == set()
            await vm.fold(disk)
            assert vm.dirty(disk, _OLD) == {0, 32}
            assert vm.dirty(disk, _NEW) == {32}


async def test_what_an_end_of_qemu_leaves_of_bitmaps(qemu: Path, short: Path) -> None:
    async with _vm(qemu, short) as vm:
        await commit(vm.monitor, [_add("d0", _OLD), _add("d1", _OLD)])
        write(vm.eye, "vd0", 0)
        await _ended(vm)
    async with _vm(qemu, short, again=True) as vm:
        assert bitmap.classify(await vm.chain("d0"), _OLD) == (Standing.RECORDING, 0, "")
        assert vm.dirty("d0", _OLD) == {0}
        standing, where, why = bitmap.classify(await vm.chain("d1"), _OLD)
        assert (standing, where) == (Standing.MISSING, None)
        assert "raw" in why
        await commit(vm.monitor, [_add("d0", _NEW)])
        vm.process.kill()
    async with _vm(qemu, short, again=True) as vm:
        chain = await vm.chain("d0")
        standing, where, why = bitmap.classify(chain, _OLD)  # it had been read from the image
        assert (standing, where) == (Standing.INCONSISTENT, 0)
        assert "killed" in why
        standing, where, why = bitmap.classify(chain, _NEW)  # it had never been written to it
        assert (standing, where) == (Standing.MISSING, None)
        assert "killed" in why
        assert await bitmap.remove_all(vm.monitor, lambda name: False) == [_OLD]
        await commit(vm.monitor, [_add("d0", _OLD)])


async def _ended(vm: Vm) -> None:
    await vm.monitor.execute("quit")
    left = os.WEXITED | os.WNOWAIT
    await asyncio.to_thread(os.waitid, os.P_PID, vm.process.pid, left)


async def test_removal_stops_at_what_qemu_refuses(qemu: Path, short: Path) -> None:
    theirs = "libvirt-1"
    async with _vm(qemu, short) as vm:
        await commit(vm.monitor, [_add("d0", _OLD), _add("d0", _NEW), _add("d0", theirs)])
        await commit(vm.monitor, [_add("d1", _OLD), *await vm.overlaid("d0")])
        # d0 is a read-only base now, d1 is not
        assert await bitmap.remove_all(vm.monitor, lambda name: name == _NEW) == [_OLD]
        assert set(await vm.names("d0")) == {_OLD, _NEW, theirs}
        assert await vm.names("d1") == {}
        assert not await bitmap.remove(vm.monitor, NodeName("d0"), _OLD)
        await vm.fold("d0")
        assert await bitmap.remove_all(vm.monitor, lambda name: name == _NEW) == [_OLD]
        assert await bitmap.remove_all(vm.monitor, lambda name: name == _NEW) == []
        assert set(await vm.names("d0")) == {_NEW, theirs}


async def test_a_bitmap_that_an_export_holds_is_busy(qemu: Path, short: Path) -> None:
    async with _vm(qemu, short) as vm:
        await commit(vm.monitor, [_add("d0", _OLD)])
        address = {"type": "unix", "data": {"path": str(short / "nbd")}}
        vm.eye.ask("nbd-server-start", addr=address)
        export = {"type": "nbd", "id": "e", "node-name": "d0"}
        vm.eye.ask("block-export-add", **export, bitmaps=[{"node": "d0", "name": _OLD}])
        standing, where, why = bitmap.classify(await vm.chain("d0"), _OLD)
        assert (standing, where) == (Standing.BUSY, 0)
        assert "export" in why
        assert not await bitmap.remove(vm.monitor, NodeName("d0"), _OLD)
        vm.eye.ask("block-export-del", id="e", mode="hard")
        vm.eye.until(lambda: vm.eye.ask("query-block-exports") == [], within=10)
        assert await bitmap.remove(vm.monitor, NodeName("d0"), _OLD)


async def test_a_disabled_or_a_coarse_one_is_no_use(qemu72: Path, short: Path) -> None:
    async with _vm(qemu72, short) as vm:
        await commit(vm.monitor, [_add("d0", _OLD), replace(_add("d0", _NEW), granularity=4096)])
        await vm.monitor.execute("block-dirty-bitmap-disable", {"node": "d0", "name": _OLD})
        chain = await vm.chain("d0")
        standing, _, why = bitmap.classify(chain, _OLD)
        assert standing is Standing.DISABLED
        assert "disabled" in why
        standing, _, why = bitmap.classify(chain, _NEW)
        assert standing is Standing.WRONG_GRANULARITY
        assert "4096" in why


@pytest.mark.parametrize(
    "name",
    [
        "libvirt-1",
        "web:vd0:20261122T165057123Z",
        "qmpsnap:web:20261122T165057123Z",
        "qmpsnap:web:vd0:20261122T165057123Z:more",
        "qmpsnap:web:vd0:yesterday",
        "qmpsnap:web:vd0:20261122T165057123Z/",
        "qmpsnap:../web:vd0:20261122T165057123Z",
        "qmpsnap:web:VD0:20261122T165057123Z",
    ],
)
def test_a_name_that_is_not_ours_is_foreign(name: str) -> None:
    assert bitmap.parse(name) is None
    assert bitmap.classify([], name)[0] is Standing.FOREIGN


def test_a_name_tells_what_it_was_made_of() -> None:
    point = "20261122T165057123Z/20261122T180000000Z"
    assert bitmap.parse(bitmap.name_of("web-1", "sda", point)) == bitmap.Name("web-1", "sda", point)


def test_rows_of_jobs_and_of_old_versions_are_read() -> None:
    row = {"name": _OLD, "recording": True, "busy": False, "persistent": True, "count": 0}
    seen = bitmap.listed({"dirty-bitmaps": [{"recording": True}, {**row, "granularity": 65536}]})
    assert seen == (Bitmap(_OLD, True, False, True, False, 0, 65536),)
    assert bitmap.listed({}) == ()
    (bare,) = bitmap.listed({"dirty-bitmaps": [{"name": _OLD}]})
    assert not bare.usable
