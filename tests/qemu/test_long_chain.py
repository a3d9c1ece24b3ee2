"""A hundred increments in a row: restored, verified and pruned."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.retention import Policy
from qmpsnap.engine.wishes import Quiesce, RamChoice, Wishes
from qmpsnap.host import qemu_img
from tests.faults.bench import options
from tests.rig.graph import untouched
from tests.rig.qemu import running
from tests.rig.wire import witness

SIZE = 16 << 20
CLUSTER = 65536
DISK = "/machine/peripheral/vd0/virtio-backend"
COUNT = 100


async def content(engine: Engine, id: str, to: Path, *, standalone: bool) -> bytes:
    await engine.prepare_restore("web", Restoration(to, cold=True, standalone=standalone), id)
    raw = to.with_suffix(".raw")
    await qemu_img.convert(to / "vd0.qcow2", "qcow2", raw, "raw")
    return raw.read_bytes()


def written_by(turn: int) -> bytes:
    """The disk after *turn*: each has a cluster of its own, and one that all of them write."""
    model = bytearray(SIZE)
    for cluster, value in [*((one, one + 1) for one in range(turn + 1)), (200, turn + 1)]:
        start = cluster * CLUSTER
        model[start : start + CLUSTER] = bytes([value]) * CLUSTER
    return bytes(model)


@pytest.mark.timeout(1800)
async def test_a_hundred_increments(qemu72: Path, short: Path, store: Path) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    line, _ = options(short)
    wishes = Wishes(ram=RamChoice.NONE, quiesce=Quiesce.NONE, max_pause=20)
    turns: dict[str, int] = {}
    async with running(qemu72, *line, directory=short) as process:
        machine = Machine("web", process.qmp)
        with witness(process.witness) as eye:
            for turn in range(COUNT + 1):
                for cluster in (turn, 200):
                    command = f'qemu-io -d {DISK} "write -P {turn + 1} {cluster << 16} 64k"'
                    said = eye.ask("human-monitor-command", **{"command-line": command})
                    assert "error" not in said.lower(), said
                made = await engine.create(machine, wishes)
                turns[made.id] = turn
                level, written = ("inc", 16 * CLUSTER) if turn else ("full", 2 * SIZE)
                assert {one.level for one in made.disks.values()} == {level}
                assert made.bytes.disks < written
        ids = list(turns)
        for id, standalone in ((ids[-1], False), (ids[-1], True), (ids[50], False)):
            to = short / f"back-{id[-5:]}{standalone}"
            assert await content(engine, id, to, standalone=standalone) == written_by(turns[id])
        assert (await engine.verify("web", ids[-1], machine=machine)).findings == []

        # the restored one that stands on the chain is in the way of nothing but itself
        pruned = await engine.prune(machine, Policy(last=3))
        kept = [fate.id for fate in pruned.fates if fate.decision == "keep"]
        assert set(kept) == {ids[50], *ids[-3:]}
        assert pruned.failed == []
        await untouched(process.witness)
    assert [one.id for one in await engine.list("web")] == sorted(kept)
    for id in kept:
        assert (await engine.verify("web", id)).findings == []
        to = short / f"after-{id[-5:]}"
        assert await content(engine, id, to, standalone=False) == written_by(turns[id])
