"""Pruning beneath a running guest: the chain goes on, and what stays restores, RAM and disks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.retention import Policy
from qmpsnap.engine.wishes import Level, Wishes
from qmpsnap.errors import Refused
from qmpsnap.store import points
from tests.rig.graph import chains, untouched
from tests.rig.guest import Guest, Witness, agrees, booted

pytestmark = pytest.mark.guest

BUSY = "busy ram=16 rate=10 disk=1024"


class History:
    """Snapshots of one guest, and what its witness said before each."""

    def __init__(self, engine: Engine, guest: Guest) -> None:
        self.engine, self.guest = engine, guest
        self.machine = Machine("web", guest.qmp, guest.agent)
        self.before: dict[str, Witness] = {}

    async def take(self, level: Level) -> str:
        witness = await self.guest.console.witness(within=60)
        wishes = Wishes(level=level, max_pause=30)
        made = await self.engine.create(self.machine, wishes)
        self.before[made.id] = witness
        return made.id

    async def prune(self, count: int) -> dict[str, str]:
        """Keep the newest *count*; all that is left restores, and is what `verify` expects."""
        done = await self.engine.prune(self.machine, Policy(last=count))
        assert done.failed == []
        listed = [one.id for one in await self.engine.list("web")]
        assert listed == list(self.before)[-count:]
        for id in listed:
            assert (await self.engine.verify("web", id)).findings == []
            to = Path(self.guest.dir / "back")
            await agrees(self.engine, "web", Restoration(to), self.before[id], id)
            shutil.rmtree(to)
        assert (await self.guest.console.witness(within=60)).ok
        return {one.id: one.decision for one in done.fates}


@pytest.mark.timeout(600)
async def test_a_chain_of_increments_goes_on_while_its_beginning_is_merged(
    qemu: Path, short: Path, store: Path
) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(qemu, short) as guest:
        await guest.console.run(BUSY, within=20)
        plain = await chains(guest.qemu.witness)
        history = History(engine, guest)
        full = await history.take(Level.FULL)
        one, two, three = [await history.take(Level.INC) for _ in range(3)]
        got = await history.prune(2)
        assert got == {full: "remove", one: "remove", two: "keep", three: "keep"}
        # the increment stands on what has come from a merge
        four = await history.take(Level.INC)
        there = points.read(engine.roots.local, "web")
        assert {disk.parent for disk in there.by_name[four].storage.disks} == {three}
        await engine.protect("web", three)
        assert set((await history.prune(2)).values()) == {"remove", "keep"}
        with pytest.raises(Refused, match="protected"):
            await engine.delete(history.machine, three)
        await engine.unprotect("web", three)
        await history.prune(1)
        assert [point.name for point in points.read(engine.roots.local, "web")] == [four]
        assert await chains(guest.qemu.witness) == plain
        await untouched(guest.qemu.witness)


@pytest.mark.timeout(400)
async def test_overlays_are_folded_once_at_the_end(qemu72: Path, short: Path, store: Path) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(qemu72, short) as guest:
        await guest.console.run(BUSY, within=20)
        history = History(engine, guest)
        ids = [await history.take(Level.OVERLAY) for _ in range(3)]
        depth = {name: len(files) for name, files in (await chains(guest.qemu.witness)).items()}
        got = await history.prune(1)
        assert got == {ids[0]: "remove", ids[1]: "remove", ids[2]: "keep"}
        # the newest one's files are beneath what the guest writes to: they stay as they are
        now = {name: len(files) for name, files in (await chains(guest.qemu.witness)).items()}
        assert now == depth
        await history.take(Level.FULL)
        assert await history.prune(1) == {ids[2]: "remove", list(history.before)[-1]: "keep"}
        after = await chains(guest.qemu.witness)
        assert {len(files) for files in after.values()} == {1}
        assert list((short / "local/web/layers").iterdir()) == []
        await untouched(guest.qemu.witness)
