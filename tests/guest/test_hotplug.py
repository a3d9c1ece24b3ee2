"""A real guest that uses what was plugged into it, and has released what it started with."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Wishes
from tests.rig.graph import ask
from tests.rig.guest import Console, Guest, back, booted
from tests.rig.qemu import binary

pytestmark = pytest.mark.guest

PATIENT = Wishes(max_pause=30)  # no test of the pause
# as tests/rig/guest.py has it, with the interrupts that ACPI tells of hot-plug by
APPEND = (
    "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check mitigations=off random.trust_cpu=on "
    "init_on_alloc=0 cryptomgr.notests"
)
COMMON = ["-append", APPEND, "-smp", "3,maxcpus=4", "-m", "128,slots=2,maxmem=1G"]
MACHINES = {
    "pc": ["-device", "virtio-rng-pci,id=gone", "-device", "virtio-scsi-pci,id=scsi0",
           "-device", "usb-ehci,id=ehci"],
    "q35": ["-device", "pcie-root-port,id=rp0,chassis=1,hotplug=on",
            "-device", "pcie-root-port,id=rp1,chassis=2",
            "-device", "pcie-root-port,id=rp2,chassis=3",
            "-device", "virtio-rng-pci,id=gone,bus=rp0", "-device", "virtio-scsi-pci,id=scsi0",
            "-device", "usb-ehci,id=ehci"],
}  # fmt: skip
# what the guest sees: its vCPUs, memory in MiB, disks in order, PCI functions
LOOK = (
    "cat /sys/devices/system/cpu/present /sys/devices/system/cpu/online; "
    "cat /proc/meminfo | head -n 1; ls /sys/block; ls /sys/bus/pci/devices; "
    "cat /sys/bus/pci/devices/*/device; dd if=/dev/vdc bs=64 count=1 2>/dev/null"
)


async def plug(guest: Guest, driver: str, id: str, **more: object) -> None:
    properties = {key.replace("_", "-"): value for key, value in more.items()}
    await ask(guest.qemu.witness, "device_add", {"driver": driver, "id": id} | properties)


async def until(console: Console, command: str) -> None:
    """The guest has caught up with what was done to it."""
    await console.run(f"until {command}; do sleep 0.05; done", within=60)


async def gone(guest: Guest, path: str) -> None:
    """The guest releases it; QEMU's event comes later still, or never."""
    folder, _, name = path.rpartition("/")
    await ask(guest.qemu.witness, "device_del", {"id": path})
    there = {name}
    async with asyncio.timeout(60):
        while name in there:
            await asyncio.sleep(0.05)
            listed = await ask(guest.qemu.witness, "qom-list", {"path": folder})
            there = {one["name"] for one in listed}


async def changed(guest: Guest, at: Path, machine: str, *, fewer: bool) -> None:
    console, witness = guest.console, guest.qemu.witness
    await gone(guest, "/machine/peripheral/gone")
    cpus = await ask(witness, "query-hotpluggable-cpus")
    if fewer:
        (second,) = [one["qom-path"] for one in cpus if one["props"]["core-id"] == 1]
        await gone(guest, second)
    (free,) = [one for one in cpus if "qom-path" not in one]
    await plug(guest, free["type"], "late", **free["props"])
    await until(console, "[ -e /sys/devices/system/cpu/cpu3 ]")
    await console.run("echo 1 >/sys/devices/system/cpu/cpu3/online", within=20)
    size = 128 << 20
    memory = {"qom-type": "memory-backend-ram", "id": "m1", "size": size}
    await ask(witness, "object-add", memory)
    await plug(guest, "pc-dimm", "dimm1", memdev="m1")
    await until(console, "[ -e /sys/devices/system/memory/memory32 ]")
    await console.run(
        "cd /sys/devices/system/memory/memory32; "
        "[ $(cat state) = online ] || echo online >state; cd /",
        within=20,
    )
    await ask(witness, "netdev_add", {"type": "user", "id": "n1"})
    bus = {"bus": "rp1"} if machine == "q35" else {}
    await plug(guest, "virtio-net-pci", "nic1", netdev="n1", **bus)
    for name in ("h0", "l0"):
        path = at / f"{name}.raw"
        with path.open("wb") as file:
            file.truncate(1 << 20)
        below = {"driver": "file", "filename": str(path)}
        node = {"driver": "raw", "node-name": name, "file": below}
        await ask(witness, "blockdev-add", node)
    bus = {"bus": "rp2"} if machine == "q35" else {}
    await plug(guest, "virtio-blk-pci", "vd9", drive="h0", **bus)
    await until(console, "[ -e /dev/vdc ]")
    await console.run(
        "echo the late disk | dd of=/dev/vdc conv=sync bs=64 2>/dev/null; sync", within=20
    )
    await plug(guest, "scsi-hd", "lun9", drive="l0", bus="scsi0.0", lun=9)
    await plug(guest, "usb-tablet", "tablet", bus="ehci.0")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("version", "machine"), [("7.2", "pc"), ("7.2", "q35"), ("11.1", "q35")])
async def test_a_guest_goes_on_with_what_was_plugged_into_it(
    version: str, machine: str, short: Path, store: Path
) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    extra = [*COMMON, *MACHINES[machine]]
    async with booted(binary(version), short, machine=machine, extra=extra) as guest:
        fewer = version != "7.2"  # that hangs when a vCPU goes, under TCG
        await changed(guest, short, machine, fewer=fewer)
        saw = await guest.console.run(LOOK, within=20)
        assert "the late disk" in saw
        assert ("0,2-3" if fewer else "0-3") in saw
        before = await guest.console.witness(within=30)
        await engine.create(Machine("vm", guest.qmp, guest.agent), PATIENT)
    for other in ("7.2", "10.0") if version == "7.2" else ():
        wish = Restoration(short / other, qemu=binary(other))
        async with back(engine, "vm", wish) as (_, console):
            found = await console.witness(within=60)
            assert (found.ok, found.nonce) == (True, before.nonce), other
            assert await console.run(LOOK, within=20) == saw, other
    wish = Restoration(short / "one", qemu=binary("11.1"))
    async with back(engine, "vm", wish) as (restored, console):
        found = await console.witness(within=60)
        assert found.ok
        assert (found.nonce, found.ram >= before.ram) == (before.nonce, True)
        assert await console.run(LOOK, within=20) == saw
        # all of it still works: a vCPU, the memory, a disk
        assert await console.run("taskset 8 dd if=/dev/vdc bs=64 count=1 2>/dev/null", within=20)
        await console.run("fill 120", within=60)
        assert (await console.witness(within=60)).ok
        qmp = restored.machine.qmp
        assert qmp is not None
        made = await engine.create(Machine("again", qmp, restored.machine.agent), PATIENT)
        assert made.state == "paired"
    async with back(engine, "vm", Restoration(short / "cold", cold=True)) as (_, console):
        await console.until("READY", within=120)
        await console.until("^W ", within=60)  # with more than one vCPU it starts a little later
        assert (await console.witness(within=30)).ok
        booted_anew = await console.run(LOOK, within=20)
        # the guest counts its CPUs anew
        assert "the late disk" in booted_anew
