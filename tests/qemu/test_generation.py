"""A guest that is one of several learns it: a new generation ID on the command line reaches it."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

from qmpsnap.hypervisor.monitor import Monitor, connect
from tests.qemu.test_machine_relocate import migrated, saved
from tests.rig.qemu import running

SIZE = 32 << 20
MACHINE = ["-M", "pc", "-m", "32", "-nodefaults"]
EVENTS, CHANGED = 0xAFE0, 0x20  # hw/i386/acpi-build.c, hw/acpi/acpi_dev_interface.h


async def ram(monitor: Monitor, to: Path) -> bytes:
    await monitor.execute("pmemsave", {"val": 0, "size": SIZE, "filename": str(to)})
    return await asyncio.to_thread(to.read_bytes)


async def pending(monitor: Monitor) -> int:
    """The general-purpose events that the guest has been told of and not taken."""
    said = await monitor.execute("human-monitor-command", {"command-line": f"i /1b {EVENTS:#x}"})
    return int(str(said).rpartition("=")[2], 16)


async def test_a_new_generation_is_written_over_the_saved_one_and_told(qemu, tmp_path):
    was, now = uuid.uuid4(), uuid.uuid4()
    old, new, stream = tmp_path / "old", tmp_path / "new", tmp_path / "stream"
    old.mkdir()
    new.mkdir()
    words = [*MACHINE, "-device", f"vmgenid,guid={was}"]
    async with running(qemu, *words, directory=old) as vm, connect(vm.qmp) as monitor:
        async with asyncio.timeout(30):
            # the firmware has it put there
            while (at := (await ram(monitor, tmp_path / "ram")).find(was.bytes_le)) < 0:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        await monitor.execute("stop")
        assert not await pending(monitor) & CHANGED
        await saved(monitor, stream)
    words = [*MACHINE, "-device", f"vmgenid,guid={now}", "-incoming", "defer", "-S"]
    async with running(qemu, *words, directory=new) as vm, connect(vm.qmp) as monitor:
        assert await migrated(monitor, "migrate-incoming", f"exec:cat {stream}") == "completed"
        seen = await ram(monitor, tmp_path / "ram")
        assert (seen.find(now.bytes_le), seen.find(was.bytes_le)) == (at, -1)
        assert await pending(monitor) & CHANGED
