"""A booted guest goes on where it was while its RAM still comes, page after page."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from qmpsnap.hypervisor.guest import runstate
from qmpsnap.hypervisor.monitor import connect
from qmpsnap.hypervisor.vmstate.split import split
from tests.rig.console import Console, Witness
from tests.rig.guest import booted
from tests.rig.qemu import binary, running
from tests.rig.sourced import postcopy

pytestmark = pytest.mark.guest


class OnDemand:
    """Page images of which only what the guest asks for is there, until *open*."""

    def __init__(self, images: Mapping[str, Path]) -> None:
        self.images, self.open, self.requests = images, asyncio.Event(), 0

    async def ready(self, block: str, start: int, length: int) -> None:
        if length > 65536:
            await self.open.wait()
        elif length == 4096:
            self.requests += 1


@pytest.mark.timeout(400)
async def test_it_knows_all_its_ram(short: Path, tmp_path: Path) -> None:
    qemu = binary("11.1")
    async with booted(qemu, short) as guest, connect(guest.qmp) as monitor:
        before = await guest.console.witness(within=60)
        line = guest.qemu.argv[1 : guest.qemu.argv.index("-display")]
        reading, writing = os.pipe()
        await monitor.send_fd(writing)
        await monitor.execute("getfd", {"fdname": "out"})
        os.close(writing)
        await monitor.execute("stop")
        await monitor.execute("migrate", {"uri": "fd:out"})
        parts = await asyncio.to_thread(split, reading, tmp_path)
        os.close(reading)
    pages = OnDemand({image.block: image.path for image in parts.images})
    seen: list[Witness] = []
    async with (
        running(qemu, *line, "-incoming", "defer", "-S", directory=short) as process,
        connect(process.qmp) as monitor,
        Console.open(short / "console.sock") as console,
    ):

        async def run() -> None:
            await runstate.let_run(monitor)
            # whatever it does now it does with pages that it has asked for
            seen.append(await console.witness(within=60))
            pages.open.set()

        await postcopy(monitor, parts.stream, pages, on_running=run)
        asked = pages.requests
        await console.run("sleep 0.3", within=30)
        seen.append(await console.witness(within=60))
    assert all(one.ok and one.nonce == before.nonce for one in seen)
    assert seen[1].ram > seen[0].ram >= before.ram
    assert console.alarms == []
    assert pages.requests == asked > 100
    stored = sum(image.stored_pages for image in parts.images)
    assert asked < stored / 2  # with what lies around each it got on with a part of its RAM
