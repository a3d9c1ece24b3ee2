"""A disk of any snapshot and revision, served over NBD: byte for byte what it was then."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.wishes import Level, RamChoice, Wishes
from qmpsnap.errors import BaseChanged, LocalFailed, Refused, SnapshotUnknown, UsageError
from tests.faults.bench import options
from tests.rig.dirty import CLUSTER
from tests.rig.qemu import Running, running
from tests.rig.wire import Witness, witness

SIZE = 16 << 20
DISKS = {"vd0": "d0", "vd1": "d1"}


@dataclass(slots=True)
class Vm:
    """A running VM and what its disks hold."""

    process: Running
    eye: Witness
    engine: Engine
    model: dict[str, bytearray] = field(
        default_factory=lambda: {name: bytearray(SIZE) for name in DISKS}
    )
    _mark: int = 0

    @property
    def machine(self) -> Machine:
        return Machine("web", self.process.qmp)

    def write(self, *clusters: int) -> dict[str, bytes]:
        """Fill *clusters* of both disks with something new; all that they hold now."""
        self._mark += 1
        for disk, content in self.model.items():
            for cluster in clusters:
                at = cluster * CLUSTER
                device = f"/machine/peripheral/{disk}/virtio-backend"
                line = f'qemu-io -d {device} "write -P {self._mark} {at} {CLUSTER}"'
                said = self.eye.ask("human-monitor-command", **{"command-line": line})
                assert "error" not in said.lower(), said
                content[at : at + CLUSTER] = bytes([self._mark]) * CLUSTER
        return {disk: bytes(content) for disk, content in self.model.items()}

    async def create(self, level: Level) -> str:
        wishes = Wishes(level=level, ram=RamChoice.NONE, max_pause=20)
        return (await self.engine.create(self.machine, wishes)).id


@asynccontextmanager
async def _vm(qemu: Path, folder: Path, store: Path) -> AsyncIterator[Vm]:
    line, _ = options(folder)
    engine = Engine(folder / "local", store, allow_local_store=True)
    async with running(qemu, *line, directory=folder) as process:
        with witness(process.witness) as eye:
            yield Vm(process, eye, engine)


def spoil(image: Path) -> None:
    image.chmod(0o600)
    with image.open("ab") as file:
        file.write(b"!")


def there(path: Path) -> bool:
    return path.exists()


@contextmanager
def hidden(store: Path) -> Iterator[None]:
    """The store is not there for the block, as if it had been unmounted."""
    away = store.with_name(f"{store.name}-away")
    store.rename(away)
    try:
        yield
    finally:
        away.rename(store)


async def _copied(uri: str) -> bytes:
    """All that *uri* serves, by somebody else's program."""
    copying = await asyncio.create_subprocess_exec("nbdcopy", uri, "-", stdout=PIPE)
    content, _ = await copying.communicate()
    assert copying.returncode == 0
    return content


async def test_every_snapshot_and_revision_reads_back(qemu: Path, short: Path, store: Path) -> None:
    async with _vm(qemu, short, store) as vm:
        then: dict[tuple[str, int], dict[str, bytes]] = {}
        for number, level in enumerate((Level.OVERLAY, Level.FULL, Level.INC, Level.INC)):
            held = vm.write(number, 50 + number, 100)
            then[await vm.create(level), 0] = held
        last = max(id for id, _ in then)
        held = vm.write(7, 100)
        assert (await vm.engine.refresh(vm.machine, last)).revision == 1
        then[last, 1] = held
        vm.write(*range(8))
        for (id, revision), held in then.items():
            for disk, content in held.items():
                async with vm.engine.exported(
                    "web", disk, id, revision=revision, socket=short / "it.nbd"
                ) as served:
                    shown = served.shown
                    assert (shown.id, shown.revision) == (id, revision)
                    assert shown.virtual_size_bytes == SIZE
                    assert await _copied(shown.uri) == content, (id, revision, disk)
                assert not there(short / "it.nbd")
        async with vm.engine.exported("web", "vd0", last, socket=short / "it.nbd") as served:
            assert served.shown.revision == 1  # the newest


async def test_a_disk_has_many_names(qemu72: Path, short: Path, store: Path) -> None:
    async with _vm(qemu72, short, store) as vm:
        held = vm.write(1)
        await vm.create(Level.OVERLAY)
        async with AsyncExitStack() as stack:
            for number, (disk, node) in enumerate(DISKS.items()):
                qdev = f"/machine/peripheral/{disk}/virtio-backend"
                for word in (disk, node, qdev):
                    at = short / f"n {number}{len(word)}.nbd"
                    exported = vm.engine.exported("web", word, socket=at)
                    shown = (await stack.enter_async_context(exported)).shown
                    assert shown.disk == disk
                    assert await _copied(shown.uri) == held[disk]


async def test_what_is_not_there_is_refused(qemu72: Path, short: Path, store: Path) -> None:
    async with _vm(qemu72, short, store) as vm:
        vm.write(1)
        id = await vm.create(Level.FULL)
        at = short / "it.nbd"
        with pytest.raises(UsageError, match="vd0, vd1"):
            await _refused(vm, "sda", id, at)
        with pytest.raises(UsageError, match="no revision 3; there are: 0"):
            await _refused(vm, "vd0", id, at, revision=3)
        with pytest.raises(SnapshotUnknown):
            await _refused(vm, "vd0", "1999", at)
        with pytest.raises(LocalFailed, match="nowhere"):
            await _refused(vm, "vd0", id, short / "nowhere/it.nbd")
        shown = await vm.engine.show("web", id)
        spoil(Path(shown.storage.disks[0].chain[0].path))
        with pytest.raises(BaseChanged, match="disk vd0"):
            await _refused(vm, "vd0", id, at)
        async with vm.engine.exported("web", "vd1", id, socket=at):
            pass
        assert not at.exists()
        assert list((short / "local/web" / id / "dependents").iterdir()) == []


async def _refused(vm: Vm, disk: str, id: str, at: Path, revision: int | None = None) -> None:
    async with vm.engine.exported("web", disk, id, revision=revision, socket=at):
        pytest.fail("it was served")


async def test_a_dead_store_keeps_nobody_from_the_files(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with _vm(qemu72, short, store) as vm:
        held = vm.write(1)
        id = await vm.create(Level.FULL)
        with hidden(store):
            async with vm.engine.exported("web", "vd1", id, socket=short / "it.nbd") as served:
                assert await _copied(served.shown.uri) == held["vd1"]


async def test_delete_waits_for_those_who_read(qemu72: Path, short: Path, store: Path) -> None:
    async with _vm(qemu72, short, store) as vm:
        held = vm.write(1)
        id = await vm.create(Level.OVERLAY)
        at = short / "it.nbd"
        async with vm.engine.exported("web", "vd0", id, socket=at) as served:
            with pytest.raises(Refused, match=f"exports stand on it: {at}"):
                await vm.engine.delete(vm.machine, id)
            assert await _copied(served.shown.uri) == held["vd0"]
        await vm.engine.delete(vm.machine, id)


async def test_the_vm_folds_and_writes_while_it_is_read(
    qemu: Path, short: Path, store: Path
) -> None:
    """What is served takes no lock that the VM could want."""
    async with _vm(qemu, short, store) as vm:
        held = vm.write(1, 2)
        first = await vm.create(Level.OVERLAY)
        vm.write(1)
        second = await vm.create(Level.OVERLAY)
        vm.write(2)
        async with vm.engine.exported("web", "vd0", first, socket=short / "it.nbd") as served:
            await vm.engine.delete(vm.machine, second)
            now = vm.write(3)
            assert await _copied(served.shown.uri) == held["vd0"]
        await vm.create(Level.FULL)
        async with vm.engine.exported("web", "vd0", socket=short / "it.nbd") as served:
            assert await _copied(served.shown.uri) == now["vd0"]
