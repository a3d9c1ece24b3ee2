"""A state that QEMU does not take: it says why, not the pipe that it has closed."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from qmpsnap.errors import LocalFailed, MigrationFailed, MonitorLost
from qmpsnap.hypervisor.monitor import connect
from qmpsnap.hypervisor.vmstate.load import load
from qmpsnap.store.files import told
from tests.rig.qemu import running


async def test_who_closes_the_pipe_says_why(qemu: Path) -> None:
    async def feed(fd: int) -> None:
        def write() -> None:
            with told(Path("pipe"), LocalFailed), open(os.dup(fd), "wb") as pipe:  # noqa: PTH123
                pipe.write(b"no stream" * (1 << 20))

        await asyncio.to_thread(write)

    line = ["-M", "pc", "-m", "16", "-nodefaults", "-incoming", "defer", "-S"]
    async with running(qemu, *line) as vm, connect(vm.qmp) as monitor:
        # before 9.1 it exits then
        with pytest.raises((MigrationFailed, MonitorLost)):
            await load(monitor, feed)


async def test_what_went_wrong_on_our_side_is_told(qemu72: Path) -> None:
    async def feed(fd: int) -> None:
        raise LocalFailed("no state")

    line = ["-M", "pc", "-m", "16", "-nodefaults", "-incoming", "defer", "-S"]
    async with running(qemu72, *line) as vm, connect(vm.qmp) as monitor:
        with pytest.raises(LocalFailed, match="no state"):
            await load(monitor, feed)
