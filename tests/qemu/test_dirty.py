"""What changed on a frozen disk, by bitmap and by layer; QEMU's NBD server is as it was before."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.errors import CommandRefused, LocalFailed, MonitorLost, VmBusy
from qmpsnap.host import qemu_img
from qmpsnap.hypervisor.block import graph, overlay, transaction
from qmpsnap.hypervisor.monitor import Monitor, connect
from qmpsnap.hypervisor.nbd import dirty
from qmpsnap.ids import NodeName
from tests.faults.bench import options
from tests.rig.dirty import CLUSTER, write
from tests.rig.qemu import Running, running
from tests.rig.wire import Fault, Wire, Witness, wired, witness

NAME = "qmpsnap:web:vd0:20261122T165057123Z"
THEIRS = "theirs"
# getfd, nbd-server-start, block-export-add, query-block-exports, block-export-del,
# query-block-exports, nbd-server-stop; one more where the export takes its time to go
COMMANDS = 7
_DISKS = pytest.mark.parametrize("disk", ["d0", "d1"], ids=["qcow2", "raw"])


@dataclass(frozen=True, slots=True)
class Vm:
    process: Running
    eye: Witness

    @property
    def socket(self) -> Path:
        return self.process.dir / "ours"

    def write(self, disk: str, *clusters: int) -> None:
        for cluster in clusters:
            write(self.eye, f"v{disk}", cluster * CLUSTER)

    def add_bitmap(self, disk: str) -> None:
        self.eye.ask(
            "block-dirty-bitmap-add",
            node=disk,
            name=NAME,
            granularity=CLUSTER,
            persistent=disk == "d0",
        )

    async def overlaid(self, monitor: Monitor, disk: str, node: str) -> None:
        """*node* takes the writes of *disk* from now on."""
        seen = await graph.query(monitor)
        top = next(one for one in seen.disks if one.name == f"v{disk}").top
        file = self.process.dir / f"{node}.qcow2"
        below, format = self.process.dir / Path(top.filename).name, top.driver
        await qemu_img.create_overlay(file, below, format, top.virtual_size)
        await overlay.add(monitor, overlay.Overlay(NodeName(node), file, top))
        await transaction.commit(monitor, [transaction.Snapshot(top.name, NodeName(node))])

    def idle(self) -> None:
        """No export, no server, no bitmap in use, and no socket."""
        assert self.eye.ask("query-block-exports") == []
        for node in self.eye.ask("query-named-block-nodes", flat=True):
            assert not any(one["busy"] for one in node.get("dirty-bitmaps", []))
        assert not self.socket.exists()
        # of two servers the second is refused: so there was none
        self.serve(export=False)
        self.eye.ask("nbd-server-stop")

    def serve(self, *, export: bool = True, path: Path | None = None, id: str = THEIRS) -> None:
        """An NBD server, of somebody else unless the words are ours."""
        address = {"type": "unix", "data": {"path": str(path or self.process.dir / THEIRS)}}
        self.eye.ask("nbd-server-start", addr=address)
        if export:
            self.eye.ask("block-export-add", **{"type": "nbd", "id": id, "node-name": "d0"})

    def theirs_is_untouched(self) -> None:
        (export,) = self.eye.ask("query-block-exports")
        assert (export["id"], export["shutting-down"]) == (THEIRS, False)
        uri = f"nbd+unix:///d0?socket={self.process.dir / THEIRS}"
        subprocess.run(["nbdinfo", "--size", uri], check=True, capture_output=True)


@asynccontextmanager
async def _vm(qemu: Path, folder: Path) -> AsyncIterator[Vm]:
    line, _ = options(folder)
    async with running(qemu, *line, "-S", directory=folder) as process:
        with witness(process.witness) as eye:
            yield Vm(process, eye)


async def _frozen(vm: Vm, monitor: Monitor, disk: str = "d0") -> set[int]:
    """A chain scratch > layer > *disk*; the clusters that changed since its bitmap began."""
    vm.write(disk, 3, 4)  # written, and not dirty
    vm.add_bitmap(disk)
    vm.write(disk, 5, 6, 40)
    write(vm.eye, f"v{disk}", 10 * CLUSTER + 512, 512)  # dirty, and hardly written
    await vm.overlaid(monitor, disk, "layer")
    vm.write(disk, 5, 7, 20)
    await vm.overlaid(monitor, disk, "scratch")
    vm.write(disk, 30)  # after the point in time
    return {5, 6, 7, 10, 20, 40}


async def _changed(
    monitor: Monitor, vm: Vm, node: str = "layer", disk: str = "d0", **other: Any
) -> list[tuple[int, int]]:
    asked: dict[str, Any] = {"bitmap": (NodeName(disk), NAME), "layers": 1, **other}
    return await dirty.changed(monitor, vm.socket, NodeName(node), **asked)


def _clusters(ranges: list[tuple[int, int]]) -> set[int]:
    """The clusters of *ranges*, which are in order, and apart from one another."""
    ends = [start + length for start, length in ranges]
    assert all(end < start for end, (start, _) in zip(ends, ranges[1:], strict=False))
    return {
        cluster
        for start, length in ranges
        for cluster in range(start // CLUSTER, -(-(start + length) // CLUSTER))
    }


@_DISKS
async def test_the_bitmap_and_the_layers_above_it_are_united(
    disk: str, qemu: Path, short: Path
) -> None:
    async with _vm(qemu, short) as vm, connect(vm.process.qmp) as monitor:
        everything = await _frozen(vm, monitor, disk)
        for _ in range(2):
            assert _clusters(await _changed(monitor, vm, disk=disk)) == everything
            vm.idle()
        layer = await _changed(monitor, vm, disk=disk, bitmap=None)
        assert _clusters(layer) == {5, 7, 20}
        base = await _changed(monitor, vm, disk, disk, layers=0)
        assert base == [
            (5 * CLUSTER, 2 * CLUSTER),
            (10 * CLUSTER, CLUSTER),
            (40 * CLUSTER, CLUSTER),
        ]
        both = await _changed(monitor, vm, "scratch", disk, bitmap=None, layers=2)
        assert _clusters(both) == {5, 7, 20, 30}
        assert _clusters(await _changed(monitor, vm, "scratch", disk, layers=2)) == everything | {
            30
        }
        assert await _changed(monitor, vm, bitmap=None, layers=0) == []
        vm.idle()


async def test_the_socket_is_its_owners_alone(qemu: Path, short: Path) -> None:
    async with _vm(qemu, short) as vm:
        with wired(short / "wire", vm.process.qmp) as wire:
            async with connect(wire.path) as monitor:
                await _frozen(vm, monitor)
                seen: list[int] = []
                look = lambda: seen.append(vm.socket.stat().st_mode & 0o777)  # noqa: E731
                wire.arm(Fault("block-export-add", then=look))
                with pytest.raises(MonitorLost):
                    await _changed(monitor, vm)
                assert seen == [0o600]
        vm.idle()


async def test_somebody_elses_server_is_left_alone(qemu: Path, short: Path) -> None:
    async with _vm(qemu, short) as vm, connect(vm.process.qmp) as monitor:
        everything = await _frozen(vm, monitor)
        vm.serve()
        with pytest.raises(VmBusy, match="NBD server") as refused:
            await _changed(monitor, vm)
        assert "nbd-server-stop" in refused.value.hint
        assert not await dirty.broken_off(monitor, vm.socket)
        assert not await dirty.broken_off(monitor)
        vm.theirs_is_untouched()
        assert not vm.socket.exists()
        vm.eye.ask("nbd-server-stop")
        assert _clusters(await _changed(monitor, vm)) == everything


async def test_theirs_is_left_alone_also_where_the_refusal_was_lost(
    qemu72: Path, short: Path
) -> None:
    async with _vm(qemu72, short) as vm:
        with wired(short / "wire", vm.process.qmp) as wire:
            async with connect(wire.path) as monitor:
                await _frozen(vm, monitor)
                vm.serve()
                wire.arm(Fault("nbd-server-start"))
                with pytest.raises(MonitorLost):
                    await _changed(monitor, vm)
                assert wire.happened.is_set()
        vm.theirs_is_untouched()


@pytest.mark.parametrize("delivered", [False, True], ids=["unseen", "delivered"])
async def test_wherever_the_wire_is_cut_nothing_is_left(
    delivered: bool, qemu: Path, short: Path
) -> None:
    async with _vm(qemu, short) as vm:
        async with connect(vm.process.qmp) as monitor:
            everything = await _frozen(vm, monitor)
        with wired(short / "wire", vm.process.qmp) as wire:
            for at in range(1, COMMANDS + 2):
                async with connect(wire.path) as monitor:
                    wire.arm(Fault(at, delivered=delivered))
                    found = set()
                    with suppress(MonitorLost):
                        found = _clusters(await _changed(monitor, vm))
                assert wire.happened.is_set() or (found == everything and at > COMMANDS), at
                # only what is asked for before the reading makes it fail
                assert found == (everything if at > 3 else set()), at
                vm.idle()


@pytest.mark.parametrize("at", ["nbd-server-start", "block-export-add", "block-export-del"])
async def test_cancelled_while_a_reply_is_awaited(at: str, qemu72: Path, short: Path) -> None:
    async with _vm(qemu72, short) as vm:
        with wired(short / "wire", vm.process.qmp) as wire:
            async with connect(wire.path) as monitor:
                await _frozen(vm, monitor)
                task = await _held(wire, Fault(at, held=True), _changed(monitor, vm))
                task.cancel()
                await asyncio.sleep(0)
                task.cancel()
                wire.release()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(task, 20)
        vm.idle()


async def test_cancelled_while_qemu_says_nothing(qemu: Path, short: Path) -> None:
    async with _vm(qemu, short) as vm:
        with wired(short / "wire", vm.process.qmp) as wire:
            async with connect(wire.path) as monitor:
                await _frozen(vm, monitor)
                stop = lambda: os.kill(vm.process.pid, signal.SIGSTOP)  # noqa: E731
                fault = Fault("block-export-add", held=True, then=stop)
                task = await _held(wire, fault, _changed(monitor, vm))
                wire.release()
                await _until(lambda: bool(_threads()))
                task.cancel()
                await _until(lambda: not _threads())
                assert not task.done()  # the debt is not paid yet
                os.kill(vm.process.pid, signal.SIGCONT)
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(task, 20)
        vm.idle()


async def test_qemu_dies_under_it(qemu: Path, short: Path) -> None:
    async with _vm(qemu, short) as vm:
        with wired(short / "wire", vm.process.qmp) as wire:
            async with connect(wire.path) as monitor:
                await _frozen(vm, monitor)
                wire.arm(Fault("block-export-add", held=True, then=vm.process.kill))
                task = asyncio.create_task(_changed(monitor, vm))
                await asyncio.to_thread(wire.happened.wait, 20)
                wire.release()
                with pytest.raises((LocalFailed, MonitorLost)):
                    await asyncio.wait_for(task, 30)
        assert not vm.socket.exists()


async def test_a_bitmap_that_is_in_use(qemu: Path, short: Path) -> None:
    async with _vm(qemu, short) as vm, connect(vm.process.qmp) as monitor:
        await _frozen(vm, monitor)
        with pytest.raises(CommandRefused):
            await _changed(monitor, vm, bitmap=(NodeName("d0"), "nobody"))
        vm.idle()
        with pytest.raises(CommandRefused):
            await _changed(monitor, vm, "nowhere")
        vm.idle()


async def test_what_a_dead_engine_left_is_ended(qemu: Path, short: Path) -> None:
    async with _vm(qemu, short) as vm, connect(vm.process.qmp) as monitor:
        everything = await _frozen(vm, monitor)
        # it died while it read
        vm.serve(path=vm.socket, id="qmpsnap-0123")
        assert await dirty.broken_off(monitor)
        assert not await dirty.broken_off(monitor)
        with suppress(FileNotFoundError):
            vm.socket.unlink()
        vm.idle()
        # it died between server and export: the socket alone tells whose it is
        vm.serve(path=vm.socket, export=False)
        with pytest.raises(VmBusy, match="another engine"):
            await _changed(monitor, vm)
        assert await dirty.broken_off(monitor, vm.socket)
        assert not await dirty.broken_off(monitor, vm.socket)
        vm.idle()
        assert _clusters(await _changed(monitor, vm)) == everything


async def _held(wire: Wire, fault: Fault, work: Any) -> asyncio.Task[Any]:
    """*work* under way, up to *fault*."""
    wire.arm(fault)
    task = asyncio.create_task(work)
    assert await asyncio.to_thread(wire.happened.wait, 20)
    return task


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - threads come and go without a word
            await asyncio.sleep(0.001)


def _threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("nbd_")]
