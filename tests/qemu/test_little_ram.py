"""A machine whose RAM is too little for a page image is no less a machine."""

from __future__ import annotations

from pathlib import Path

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Level, RamChoice, Wishes
from tests.faults.bench import options
from tests.rig.graph import ask, status, untouched
from tests.rig.qemu import running

WISHES = Wishes(level=Level.OVERLAY, ram=RamChoice.PAUSED, max_pause=20)


async def test_it_is_saved_and_comes_back(qemu: Path, short: Path, store: Path) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    line, _ = options(short)
    line[line.index("-m") + 1] = "8"
    async with running(qemu, *line, directory=short) as process:
        made = await engine.create(Machine("web", process.qmp), WISHES)
        manifest = (await engine.show("web")).manifest
        assert (manifest.ram.images, manifest.packs, manifest.version) == ([], [], 1)
        assert made.state == "paired"
        assert (await engine.verify("web")).findings == []
        await untouched(process.witness)
    ready = await engine.prepare_restore("web", Restoration(short / "back"))
    async with engine.restored(ready) as restored:
        assert restored.machine.qmp is not None
        assert await status(restored.machine.qmp) == "running"
        memory = await ask(restored.machine.qmp, "query-memory-size-summary")
        assert memory["base-memory"] == 8 << 20
