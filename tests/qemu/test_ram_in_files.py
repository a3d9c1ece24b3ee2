"""A guest whose RAM is a file in memory that has no room for all of it: no snapshot ends it."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.wishes import RamChoice, Wishes
from qmpsnap.errors import Blocked
from qmpsnap.host import ramfiles
from tests.faults.bench import options
from tests.rig.graph import status
from tests.rig.qemu import binary, running
from tests.rig.room import room

MIB = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory for half of the RAM."""
    with room(tmp_path / "small", "32M") as root:
        yield root


async def test_ram_that_has_no_room_is_not_read(short: Path, store: Path, small: Path) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    line, _ = options(short)
    words = [*line, "-mem-path", str(small)]
    async with running(binary("7.2"), *words, directory=short) as vm:
        machine = Machine("vm", vm.qmp)
        (found,) = ramfiles.untouched(vm.pid)
        assert found.place == str(small)
        assert 32 * MIB < found.untouched_bytes <= 64 * MIB
        assert found.free_bytes <= 32 * MIB
        for ram in (RamChoice.AUTO, RamChoice.LIVE, RamChoice.BACKGROUND, RamChoice.PAUSED):
            with pytest.raises(Blocked, match=f"{small}: .* are not there before they are read"):
                await engine.create(machine, Wishes(ram=ram, max_pause=20))
        told = await engine.info(machine)
        assert [one.of for one in told.blockers if str(small) in one.why] == ["ram"]
        await engine.create(machine, Wishes(ram=RamChoice.NONE, max_pause=20))
        assert await status(vm.witness) == "running"
        more = ["mount", "-o", "remount,size=80M", small]
        await asyncio.to_thread(subprocess.run, more, check=True)
        await engine.create(machine, Wishes(ram=RamChoice.LIVE, max_pause=20))
        assert await status(vm.witness) == "running"
        (left,) = ramfiles.untouched(vm.pid)
        assert left.untouched_bytes < MIB, left


async def test_memory_of_no_file_system(short: Path) -> None:
    line, _ = options(short)
    words = ["-object", "memory-backend-memfd,id=m0,size=64M", "-machine", "memory-backend=m0"]
    async with running(binary("11.1"), *line, *words, directory=short) as vm:
        (found,) = ramfiles.untouched(vm.pid)
    assert found.place == "memfd"
    assert found.untouched_bytes > 32 * MIB
    assert found.free_bytes > found.untouched_bytes
