"""Network cards of clones: each card takes its saved state on the clone's command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpsnap.hypervisor.machine.clones import clone
from qmpsnap.hypervisor.machine.cmdline import parse
from qmpsnap.hypervisor.monitor import connect
from tests.qemu.test_machine_relocate import migrated, saved
from tests.rig.qemu import VERSIONS, binary, running

CARDS = ["virtio-net-pci", "e1000", "e1000-82544gc", "e1000e", "rtl8139", "ne2k_pci", "pcnet",
         "i82550", "i82801", "vmxnet3", "tulip"]  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
async def test_all_cards_take_their_state(version: str, tmp_path: Path) -> None:
    qemu = binary(version)
    words = "-M q35 -m 16 -net nic -nodefaults"
    for card in [*CARDS, *(["igb"] if version != "7.2" else [])]:
        words += f" -device {card}"
    stream = tmp_path / "stream"
    async with running(qemu, *words.split(), directory=tmp_path) as vm, connect(vm.qmp) as monitor:
        await saved(monitor, stream)
    one = clone(parse([str(qemu), *words.split()]), (), of="web/1", number=1)
    assert len(one.macs) == len(CARDS) + (2 if version != "7.2" else 1)
    argv = [*one.cmdline.argv()[1:], "-incoming", "defer", "-S"]
    async with running(qemu, *argv, directory=tmp_path) as vm, connect(vm.qmp) as monitor:
        assert await migrated(monitor, "migrate-incoming", f"exec:cat {stream}") == "completed"
        macs = await monitor.execute("human-monitor-command", {"command-line": "info network"})
    new = [mac for mac in one.macs.values() if mac in str(macs)]
    assert len(new) == len(one.macs) - 3  # those of q35, e1000e and vmxnet3
