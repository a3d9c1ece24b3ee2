"""Others get in the way: a second engine, another monitor client, QEMU's own end."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from qmpsnap.engine.wishes import RamChoice
from qmpsnap.errors import Failed, GuestLeftStopped, MonitorBusy, VmBusy
from tests.faults import child
from tests.faults.bench import bench, options, wishes
from tests.rig.qemu import binary, running
from tests.rig.wire import Fault, witness


async def test_a_second_engine_is_refused_and_told_of_the_first(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        it.wire.arm(Fault("blockdev-add", held=True))
        with child.engine(
            qmp=it.wire.path, local=it.local, store=it.store, ram=RamChoice.NONE
        ) as first:
            assert await asyncio.to_thread(it.wire.happened.wait, 30)
            with pytest.raises(VmBusy, match=rf"`create` of process {first.pid} ") as refused:
                await it.engine().create(it.clean, wishes(RamChoice.NONE))
            assert refused.value.exit_code == 3
            it.wire.release()
            made = (await child.outcome(first))["id"]
        assert await it.all_is_well() == {made}
        again = await it.engine().create(it.clean, wishes(RamChoice.NONE))  # the control
        assert await it.all_is_well() == {made, again.id}


async def test_a_monitor_that_serves_another_client_is_refused_naming_it(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        with witness(it.qemu.qmp), pytest.raises(MonitorBusy, match=rf"\b{os.getpid()}\b"):
            await it.engine().create(it.clean, wishes(RamChoice.NONE))
        assert await it.all_is_well() == set()
        made = await it.engine().create(it.clean, wishes(RamChoice.NONE))  # the control
        assert await it.all_is_well() == {made.id}


async def test_a_live_qemu_whose_monitor_has_gone_is_not_called_dead(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        it.wire.arm(Fault("transaction", dead=True))
        with pytest.raises(GuestLeftStopped, match=str(it.qemu.pid)) as left:
            await it.engine().create(it.wired, wishes(RamChoice.NONE))
        assert left.value.exit_code == 6
        assert it.witness.status == "paused"
        assert len(await it.engine().recover(it.clean)) == 1
        assert await it.all_is_well() == set()


@pytest.mark.parametrize(
    ("version", "ram", "at"),
    [
        ("7.2", RamChoice.NONE, "query-migrate-parameters"),
        ("7.2", RamChoice.PAUSED, "blockdev-add"),
        ("7.2", RamChoice.PAUSED, "stop"),
        ("7.2", RamChoice.PAUSED, "migrate"),
        ("7.2", RamChoice.PAUSED, "cont"),
        ("7.2", RamChoice.LIVE, "migrate"),
        ("7.2", RamChoice.LIVE, "transaction"),
        ("10.0", RamChoice.BACKGROUND, "migrate"),
    ],
)
async def test_qemu_ends_in_the_middle(
    version: str, ram: RamChoice, at: str, short: Path, store: Path
) -> None:
    async with bench(binary(version), short, store) as it:
        it.wire.arm(Fault(at, delivered=False, then=it.qemu.kill))
        with pytest.raises(Failed) as ended:
            await it.engine().create(it.wired, wishes(ram))
        assert it.wire.happened.is_set()
        assert ended.value.exit_code == 4
        assert "paired" not in {entry.state for entry in await it.engine().list("vm")}
    # the same machine, started again: what the journal owes is settled on the way
    line, _ = options(short, images=False)
    async with running(binary(version), *line, directory=short):
        made = await it.engine().create(it.clean, wishes(RamChoice.NONE))
        assert it.owes() == []
        assert {entry.id: entry.state for entry in await it.engine().list("vm")} == {
            made.id: "paired"
        }
