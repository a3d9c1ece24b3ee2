"""Deleting: what other snapshots need stays as it is, byte for byte, and the guest writes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Level, Wishes
from qmpsnap.errors import Refused, SnapshotUnknown, StoreError, StoreRefused, VmBusy
from qmpsnap.host.journal import Journal, pending
from qmpsnap.store.files import digest_file
from tests.rig.graph import ask, chains, untouched
from tests.rig.guest import Guest, back, booted

pytestmark = pytest.mark.guest

BUSY = "busy ram=16 rate=10 disk=1024"


@contextmanager
def hidden(store: Path) -> Iterator[None]:
    """The store is not there for the block, as if it had been unmounted."""
    away = store.with_name(f"{store.name}-away")
    store.rename(away)
    try:
        yield
    finally:
        away.rename(store)


def missing(chains: dict[str, list[str]]) -> list[str]:
    return [file for files in chains.values() for file in files if not Path(file).exists()]


class Series:
    """Snapshots of one guest, and what each of them is made of on both roots."""

    def __init__(self, engine: Engine, guest: Guest) -> None:
        self.engine, self.guest = engine, guest
        self.machine = Machine("web", guest.qmp, guest.agent)
        self.files: dict[str, dict[Path, tuple[int, str]]] = {}

    async def take(self, count: int) -> list[str]:
        ids = []
        for _ in range(count):
            made = await self.engine.create(self.machine, Wishes(level=Level.OVERLAY, max_pause=30))
            ids.append(made.id)
            shown = await self.engine.show("web", made.id)
            chain = {Path(image.path) for disk in shown.storage.disks for image in disk.chain}
            halves = [Path(made.local), Path(made.store)]
            beside = {path for half in halves for path in half.rglob("*") if path.is_file()}
            self.files[made.id] = {path: digest_file(path) for path in chain | beside}
        return ids

    async def delete(self, id: str) -> list[str]:
        folded = (await self.engine.delete(self.machine, id)).folded
        del self.files[id]
        assert [one.id for one in await self.engine.list("web")] == list(self.files)
        assert (await self.guest.console.witness(within=60)).ok
        self.unchanged()
        return folded

    def unchanged(self) -> None:
        for id, files in self.files.items():
            assert {path: digest_file(path) for path in files} == files, id

    async def restorable(self, ids: Iterable[str], to: Path) -> None:
        for id in ids:
            async with back(self.engine, "web", Restoration(to), id) as (_, console):
                assert (await console.witness(within=60)).ok
            shutil.rmtree(to)


@pytest.mark.timeout(400)
async def test_deleted_in_any_order_while_the_guest_writes(
    qemu: Path, short: Path, store: Path
) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    layers = short / "local/web/layers"
    async with booted(qemu, short) as guest:
        await guest.console.run(BUSY, within=20)
        plain = await chains(guest.qemu.witness)
        series = Series(engine, guest)
        one, two, three = await series.take(3)
        # the middle one's files lie beneath the newest: all stay
        assert await series.delete(two) == []
        # the newest one's own go
        assert len(await series.delete(three)) == 4
        await series.restorable([one], short / "b")
        assert len(await series.delete(one)) == 2
        assert await chains(guest.qemu.witness) == plain
        assert list(layers.iterdir()) == []
        # oldest first: nothing can go before the last one does
        one, two, three = await series.take(3)
        assert await series.delete(one) == []
        await series.restorable([two, three], short / "b")
        assert await series.delete(two) == []
        assert len(await series.delete(three)) == 6
        assert await chains(guest.qemu.witness) == plain
        assert list(layers.iterdir()) == []
        assert list((short / "local/web").glob("2*")) == []
        assert [path.name for path in (store / "web").iterdir()] == ["lease"]
        with pytest.raises(SnapshotUnknown):
            await engine.delete(series.machine, one)
        await series.take(1)
        await series.restorable(series.files, short / "b")
        await untouched(guest.qemu.witness)


async def test_what_must_not_be_deleted_stays(qemu72: Path, short: Path, store: Path) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(qemu72, short) as guest:
        series = Series(engine, guest)
        one, two = await series.take(2)
        was = await chains(guest.qemu.witness)
        async with back(engine, "web", Restoration(short / "b"), one) as (_, console):
            with pytest.raises(Refused, match=f"restored machines stand on it: {short}/b"):
                await engine.delete(series.machine, one)
            # the other one goes, and the machine that stands on the first one does not mind
            assert len(await series.delete(two)) == 2
            assert (await console.witness(within=60)).ok
        series.unchanged()
        mirror = {"job-id": "theirs", "device": "d0", "sync": "full", "speed": 1024}
        (two,) = await series.take(1)
        was = await chains(guest.qemu.witness)
        mirror |= {"device": Path(was["vd0"][0]).stem, "target": str(short / "copy.raw")}
        await ask(guest.qemu.witness, "drive-mirror", mirror | {"format": "raw"})
        with pytest.raises(VmBusy, match="theirs"):
            await engine.delete(series.machine, two)
        await ask(guest.qemu.witness, "block-job-cancel", {"device": "theirs", "force": True})
        # a store that is not there
        with hidden(store), pytest.raises((StoreError, StoreRefused)):
            await engine.delete(series.machine, two)
        series.unchanged()
        assert [one.state for one in await engine.list("web")] == ["paired", "paired"]
        assert pending(short / "local/web/journal") == []
        assert await chains(guest.qemu.witness) == was
        await series.take(1)
    # off: the halves go, the overlays stay, for the disks are read through them
    # an earlier run that died on the way is no hindrance
    journal = Journal(short / "local/web/journal")
    journal.open_entry(two, {"verb": "delete", "phase": "deleting"})
    deleted = await engine.delete(series.machine, two)
    assert pending(journal.folder) == []
    assert deleted.folded == []
    assert "not running" in deleted.why
    assert missing(was) == []
    series.files.pop(two)
    series.unchanged()
    newest = (await engine.list("web"))[-1].id
    await agrees_cold(engine, newest, short / "cold")


async def agrees_cold(engine: Engine, id: str, to: Path) -> None:
    async with back(engine, "web", Restoration(to, cold=True), id) as (_, console):
        said = await console.until(r"PREV disk0=(\w+) (\d+) disk1=(\w+) (\d+)\s", within=120)
        assert said[1] == said[3]
        assert int(said[2]) - int(said[4]) in {0, 1}
