"""A machine that was put together by -readconfig, in part, comes back with its RAM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Level, RamChoice, Wishes
from qmpsnap.errors import Blocked
from qmpsnap.host import process, qemu_img
from qmpsnap.hypervisor.machine import inventory
from qmpsnap.hypervisor.monitor import connect
from tests.rig.qemu import running

_CONFIG = """\
[machine]
  type = "pc"
  memory-backend = "ram0"
[object "ram0"]
  qom-type = "memory-backend-ram"
  size = "64M"
[memory]
  size = "64M"
[smp-opts]
  cpus = "2"
[drive "d0"]
  if = "none"
  file = "d0.qcow2"
  format = "qcow2"
[device "vd0"]
  driver = "virtio-blk-pci"
  drive = "d0"
[chardev "s0"]
  backend = "socket"
  path = "s0.sock"
  server = "on"
  wait = "off"
[device "ser0"]
  driver = "isa-serial"
  chardev = "s0"
[netdev "n0"]
  type = "user"
[device "net0"]
  driver = "e1000"
  netdev = "n0"
  mac = "52:54:00:00:00:17"
[global]
  driver = "e1000"
  property = "romfile"
  value = ""
[name]
  guest = "by file"
[rtc]
  base = "localtime"
[boot-opts]
  menu = "off"
"""


@pytest.mark.timeout(200)
async def test_it_comes_back(qemu: Path, short: Path, store: Path) -> None:
    home = short / "vm"
    home.mkdir()
    config = home / "q.cfg"
    config.write_text(_CONFIG)
    await qemu_img.create(home / "d0.qcow2", 16 << 20)
    engine = Engine(short / "local", store, allow_local_store=True)
    arguments = ["-nodefaults", "-readconfig", "q.cfg", "-set", "device.net0.id=net0"]
    async with running(qemu, *arguments, directory=home) as vm:
        machine = Machine("web", vm.qmp)
        assert process.started(vm.pid) >= config.stat().st_ctime - 0.1
        id = (await engine.create(machine, Wishes(level=Level.FULL, max_pause=20))).id
        async with connect(vm.witness) as monitor:
            before = await inventory.take(monitor)
        config.write_text(_CONFIG.replace("52:54", "52:55"))
        # the clock of files goes by ticks, and that of processes by hundredths
        os.utime(config, (config.stat().st_mtime + 60, config.stat().st_mtime + 60))
        info = await engine.info(machine)
        assert not info.restorable
        assert f"{config} was changed" in info.restorable_why
        for ram in (RamChoice.AUTO, RamChoice.PAUSED):
            with pytest.raises(Blocked, match=r"q\.cfg was changed"):
                await engine.create(machine, Wishes(level=Level.FULL, ram=ram, max_pause=20))
    wish = Restoration(short / "back")
    ready = await engine.prepare_restore("web", wish, id)
    assert not any("readconfig" in word for word in ready.argv)
    async with (
        engine.restored(ready) as restored,
        connect(restored.machine.qmp) as monitor,
    ):
        after = await inventory.take(monitor)
        said = await monitor.execute(
            "qom-get", {"path": "/machine/peripheral/net0", "property": "mac"}
        )
        assert said == "52:54:00:00:00:17"
        assert after.name == before.name == "by file"
        assert after.devices == before.devices
        assert len(after.cpus or []) == 2
        assert after.memory_backends == before.memory_backends
