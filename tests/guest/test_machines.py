"""Machines of every make: taken on QEMU 7.2, back on each QEMU with RAM and disks in agreement."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Quiesce, RamChoice, Wishes
from qmpsnap.errors import Blocked
from tests.rig.graph import ask, chains, status, untouched
from tests.rig.guest import Guest, back, blockdev, booted, disk
from tests.rig.qemu import VERSIONS, binary

pytestmark = pytest.mark.guest
EFI = Path("/usr/share/OVMF")


async def _as_it_is(_guest: Guest) -> None:
    """Nothing happens to this machine before its snapshot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Make:
    """What is to be built, and what the guest says of itself: each command with its answer."""

    machine: str
    options: Callable[[Path], list[str]]
    also: str = ""
    cpus: int = 1
    memory: int = 128
    sees: dict[str, str]
    happens: Callable[[Guest], Awaitable[None]] = _as_it_is


def two_disks(dir: Path) -> list[str]:
    first, second = disk(dir / "d0.qcow2"), disk(dir / "d1.raw", "raw")
    return [
        *blockdev(first, "d0", "qcow2", device="vd0"),
        *blockdev(second, "d1", "raw", device="vd1"),
    ]


def nodes_of_memory(dir: Path) -> list[str]:
    return [
        *two_disks(dir),
        *("-object", "memory-backend-memfd,id=m0,size=96M"),
        *("-object", "memory-backend-ram,id=m1,size=96M"),
        *("-numa", "node,nodeid=0,memdev=m0,cpus=0", "-numa", "node,nodeid=1,memdev=m1,cpus=1"),
        *("-numa", "dist,src=0,dst=1,val=21"),
        *("-netdev", "user,id=n0", "-device", "e1000,netdev=n0,mac=52:54:00:12:34:99,romfile="),
        *("-device", "piix3-usb-uhci,id=usb", "-device", "usb-tablet", "-device", "usb-kbd"),
        *("-smbios", "type=1,serial=qs-4711", "-uuid", "0b8d3f9c-8d3b-4f4c-9a53-8e6d3a1c5b11"),
        *("-fw_cfg", "name=opt/qs/word,string=hello", "-rtc", "base=utc,driftfix=slew"),
    ]


async def a_new_top(guest: Guest) -> None:
    """Somebody else puts an overlay on a disk: its node has another name now."""
    overlay = {
        "node-name": "d0",
        "snapshot-file": str(guest.dir / "mine.qcow2"),
        "snapshot-node-name": "mine",
        "format": "qcow2",
    }
    await ask(guest.qemu.witness, "blockdev-snapshot-sync", overlay)


CONTROLLERS = """
[device "scsi"]
  driver = "virtio-scsi-pci"
  bus = "port1"
  iothread = "io0"

[device "xhci"]
  driver = "qemu-xhci"
"""


def lun(path: Path, format: str, number: int) -> list[str]:
    node = f"n{number}"
    return [
        *("-blockdev", f"driver={format},node-name={node},file.driver=file,file.filename={path}"),
        *("-device", f"scsi-hd,drive={node},bus=scsi.0,scsi-id=1,lun={number},id=lun{number}"),
    ]


def many_luns(dir: Path) -> list[str]:
    file = dir / "controllers.cfg"
    file.write_text(CONTROLLERS)
    return [
        *("-object", f"memory-backend-file,id=ram,size=192M,mem-path={dir}/ram,share=on"),
        *("-machine", "memory-backend=ram", "-object", "iothread,id=io0"),
        *("-device", "pcie-root-port,id=port1,chassis=1,slot=1"),
        *("-readconfig", str(file)),
        *lun(disk(dir / "d0.qcow2"), "qcow2", 0),
        *lun(disk(dir / "d1.raw", "raw"), "raw", 1),
        *lun(disk(dir / "d5.qcow2", size="32M"), "qcow2", 5),
        *("-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:0a:0b:0c"),
        *("-device", "usb-tablet,bus=xhci.0"),
    ]


def efi(dir: Path) -> list[str]:
    variables = dir / "vars.fd"
    variables.write_bytes((EFI / "OVMF_VARS_4M.fd").read_bytes())
    code = EFI / "OVMF_CODE_4M.fd"
    return [
        *two_disks(dir),
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}"),
        *("-drive", f"if=pflash,unit=1,format=raw,file={variables}"),
    ]


_NAME = "/sys/firmware/efi/efivars/Word-0b8d3f9c-8d3b-4f4c-9a53-8e6d3a1c5b11"


async def a_variable(guest: Guest) -> None:
    await guest.console.run("mount -t efivarfs efi /sys/firmware/efi/efivars", within=20)
    await guest.console.run(f"printf '\\007\\0\\0\\0hello' >{_NAME}", within=30)


MAKES = {
    "pc, NUMA, e1000, USB, a disk's node renamed": Make(
        machine="pc",
        options=nodes_of_memory,
        cpus=2,
        memory=192,
        sees={
            "cat /sys/devices/system/cpu/online": "0-1",
            "ls -d /sys/devices/system/node/node? | wc -l": "2",
            "cat /sys/class/dmi/id/product_serial": "qs-4711",
            "cat /sys/bus/pci/devices/*/device | grep -c 0x100e": "1",
        },
        happens=a_new_top,
    ),
    "q35, LUNs, shared RAM in a file, virtio-net, xHCI, -readconfig": Make(
        machine="q35",
        options=many_luns,
        also="scsi,net",
        memory=192,
        sees={
            "ls /data | wc -l": "3",
            "cat /sys/class/net/eth0/address": "52:54:00:0a:0b:0c",
        },
    ),
    "q35, EFI with a variable": Make(
        machine="q35",
        options=efi,
        also="efi",
        memory=256,
        sees={f"tail -c 5 {_NAME}": "hello"},
        happens=a_variable,
    ),
}


@pytest.mark.parametrize("name", MAKES)
async def test_a_machine_comes_back_on_every_qemu(name: str, short: Path, store: Path) -> None:
    make = MAKES[name]
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(
        binary("7.2"), short, disks=make.options(short), machine=make.machine,
        memory=make.memory, also=make.also, cpus=make.cpus,
    ) as guest:  # fmt: skip
        await make.happens(guest)
        machine = Machine("web", guest.qmp, guest.agent)
        before = await guest.console.witness(within=60)
        for command, answer in make.sees.items():
            assert (await guest.console.run(command, within=20)).strip() == answer, command
        made = await engine.create(machine, Wishes(max_pause=60))
        assert made.state == "paired"
        assert (await guest.console.witness(within=60)).ok
        await untouched(guest.qemu.witness)
    for version in VERSIONS:
        wish = Restoration(short / version, qemu=binary(version))
        async with back(engine, "web", wish) as (restored, console):
            found = await console.witness(within=60)
            assert found.ok, version
            assert (found.nonce, found.ram >= before.ram) == (before.nonce, True)
            for command, answer in make.sees.items():
                assert (await console.run(command, within=20)).strip() == answer, command
            assert restored.machine.qmp
            assert set(await chains(restored.machine.qmp)) - {"pflash0"} == set(made.disks)
    async with back(engine, "web", Restoration(short / "cold", cold=True)) as (_, console):
        booted_from = await console.until(r"PREV disk0=(\w+) (\d+) disk1=(\w+) (\d+)\s", within=120)
        assert {booted_from[1], booted_from[3]} == {before.nonce}
        assert int(booted_from[2]) - int(booted_from[4]) in {0, 1}
        await console.until("READY", within=60)


async def test_nvme_has_no_ram_to_come_back_with(short: Path, store: Path) -> None:
    """It is named before anything is touched; its disks are taken without the RAM."""
    engine = Engine(short / "local", store, allow_local_store=True)
    node = f"driver=qcow2,node-name=d0,file.driver=file,file.filename={disk(short / 'd0.qcow2')}"
    options = ["-blockdev", node, "-device", "nvme,drive=d0,id=nv0,serial=qs"]
    async with booted(binary("7.2"), short, disks=options) as guest:
        machine = Machine("web", guest.qmp, guest.agent)
        was = await chains(guest.qemu.witness)
        with pytest.raises(Blocked, match="nvme") as refused:
            await engine.create(machine, Wishes(max_pause=60))
        assert "--ram none" in refused.value.hint
        assert await chains(guest.qemu.witness) == was
        assert await status(guest.qemu.witness) == "running"
        await untouched(guest.qemu.witness)
        before = await guest.console.witness(within=30)
        await engine.create(machine, Wishes(ram=RamChoice.NONE, quiesce=Quiesce.NONE, max_pause=60))
        assert (await guest.console.witness(within=30)).ok
    async with back(engine, "web", Restoration(short / "cold", cold=True)) as (_, console):
        seen = await console.until(r"PREV disk0=(\w+) (\d+)\n", within=120)
        assert (seen[1], int(seen[2]) >= before.ram) == (before.nonce, True)
