"""A QEMU that was started again with the command line of old, past its newest overlays."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.wishes import RamChoice
from tests.faults.bench import bench, options, wishes
from tests.rig.qemu import running


async def test_who_writes_into_a_snapshot_is_told(
    qemu72: Path, short: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    async with bench(qemu72, short, store) as first:
        await engine.create(first.clean, wishes(RamChoice.NONE))
        await engine.create(first.clean, wishes(RamChoice.NONE))
    assert "froze" not in caplog.text  # the control: overlays on overlays are in order
    line, _ = options(short, images=False)
    async with running(qemu72, *line, directory=short) as again:
        machine = Machine("vm", again.qmp)
        made = await engine.create(machine, wishes(RamChoice.NONE))
        assert f"{short}/d0.qcow2, which a snapshot froze" in caplog.text
        # nothing is folded into what the two others keep
        assert (await engine.delete(machine, made.id)).folded == []
        assert (await engine.verify("vm", "latest")).findings == []
