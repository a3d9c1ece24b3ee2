"""Freezing through the real agent, in every RAM mode: short, thawed after, and after a restore."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.configuration import decode
from qmpsnap.engine.details import Details
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Quiesce, RamChoice, Wishes
from qmpsnap.hypervisor import agent
from tests.rig.console import Console
from tests.rig.guest import Guest, booted

pytestmark = pytest.mark.guest
MODES = [RamChoice.NONE, RamChoice.LIVE, RamChoice.BACKGROUND, RamChoice.PAUSED]


async def test_a_frozen_guest_is_thawed_and_so_is_its_restored_twin(
    qemu: Path, short: Path, store: Path
) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(qemu, short) as guest:
        machine = Machine("web", guest.qmp, guest.agent)
        for mode in MODES:
            made = await engine.create(
                machine, Wishes(ram=mode, quiesce=Quiesce.AGENT, max_pause=30)
            )
            assert made.quiesce == "agent"
            assert made.frozen_ms is not None
            assert made.frozen_ms > made.pause_ms
            assert await _status(guest.agent) == "thawed"
            before = await guest.console.witness(within=30)
            assert before.ok
            if mode is RamChoice.NONE:
                await _described(guest, store / "web" / made.id / "machine.json")
            folder = short / mode
            wish = Restoration(folder, cold=mode is RamChoice.NONE)
            ready = await engine.prepare_restore("web", wish)
            async with engine.restored(ready), Console.open(folder / "console.sock") as console:
                if wish.cold:
                    await console.until("READY", within=120)
                found = await console.witness(within=60)
                assert found.ok
                if not wish.cold:
                    assert found.nonce == before.nonce
                assert await _status(folder / "agent.sock") == "thawed"


async def _described(guest: Guest, path: Path) -> None:
    """The record says of the guest what the guest says of itself."""
    details = _details(path)
    assert details.guest is not None, details.missing
    assert details.guest.os is not None
    assert details.guest.os.kernel_release == await guest.console.run("uname -r", within=30)
    assert details.guest.host_name == await guest.console.run("hostname", within=30)
    mounted = {one.mountpoint: one.type for one in details.guest.filesystems or []}
    said = await guest.console.run("grep ^/dev/vd /proc/mounts", within=30)
    assert mounted == {line.split()[1]: line.split()[2] for line in said.splitlines()}
    assert any(one.name == "lo" for one in details.guest.interfaces or [])


def _details(path: Path) -> Details:
    found = decode(path.read_bytes(), str(path)).details
    assert found is not None
    return found


async def _status(path: Path) -> str:
    async with agent.connect(path, within=30) as talk:
        return str(await talk.execute("guest-fsfreeze-status", within=30))
