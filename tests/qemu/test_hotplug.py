"""What came and went at run time is so after a restore, at its place, with the RAM."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import RamChoice, Wishes
from qmpsnap.errors import Blocked
from qmpsnap.hypervisor.machine import inventory
from qmpsnap.hypervisor.machine.properties import Properties
from qmpsnap.hypervisor.monitor import Monitor, connect
from tests.rig.graph import ask, chains, untouched
from tests.rig.qemu import Running, binary, running
from tests.rig.wire import witness

SIZE = 1 << 20
PAUSED = Wishes(ram=RamChoice.PAUSED, max_pause=60)
Line = list[str]
COMMON = ["-m", "64,slots=2,maxmem=1G", "-smp", "2,maxcpus=4", "-global", "virtio-rng-pci.period=7"]
# without -nodefaults: what QEMU adds by itself has to be the same, too
PC = [
    *("-M", "pc", *COMMON, "-device", "virtio-rng-pci,id=first", "-vga", "none"),
    *("-device", "usb-ehci,id=ehci", "-device", "usb-kbd,id=kbd", "-device", "usb-mouse,id=mouse"),
    *("-device", "virtio-serial-pci,id=vs", "-device", "pci-bridge,chassis_nr=1,id=br0"),
    *("-device", "virtio-rng-pci"),
]
Q35 = [
    *("-M", "q35", *COMMON, "-nodefaults"),
    *("-device", '{"driver":"pcie-root-port","id":"rp0","chassis":1}'),
    *("-device", '{"driver":"pcie-root-port","id":"rp1","chassis":2}'),
    *("-device", '{"driver":"pcie-root-port","id":"rp2","chassis":3}'),
    *("-device", '{"driver":"virtio-scsi-pci","id":"scsi0"}', "-object", "iothread,id=io0"),
    *("-device", '{"driver":"nec-usb-xhci","id":"xhci"}'),
    *("-device", '{"driver":"usb-mouse","id":"mouse"}', "-device", '{"driver":"usb-kbd"}'),
]


def image(path: Path, format: str = "qcow2", mark: int = 0) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", format, path, str(SIZE)], check=True)
    if mark:
        with path.open("r+b") as file:
            file.write(bytes([mark]) * 512)
    return path


def raw(path: Path, node: str) -> dict[str, Any]:
    return {"driver": "raw", "node-name": node, "file": {"driver": "file", "filename": str(path)}}


async def seen(monitor: Monitor) -> dict[str, Any]:
    """The machine as QEMU tells it, without what is another one's after every restore."""
    asking = Properties(monitor)
    devices = {}
    for one in (await inventory.take(monitor)).devices or []:
        has = await asking.changed(one.path, one.type)
        # said by now, where QEMU chose before; and its node is another one after every snapshot
        has = {key: value for key, value in has.items() if key not in ("port", "drive")}
        where = {"type": one.type, "bus": one.bus, "addr": one.addr}
        devices[one.id or f"{one.type} {one.bus} {one.addr}"] = where | has
    usb = await said(monitor, "info usb")
    cpus = await monitor.execute("query-hotpluggable-cpus")
    memory = await monitor.execute("query-memory-devices")
    block = await monitor.execute("query-block")
    return {
        "devices": devices,
        "cpus": sorted(json.dumps(cpu["props"]) for cpu in cpus if "qom-path" in cpu),
        "memory": [one["data"] | {"hotplugged": None} for one in memory],
        "pci": await monitor.execute("query-pci"),
        "drives": sorted(one["device"] for one in block),
        # the addresses are those that the firmware is about to give
        "usb": sorted(re.sub(r"Device [\d.]+", "", usb).splitlines()),
    }


async def said(monitor: Monitor, line: str) -> str:
    return str(await monitor.execute("human-monitor-command", {"command-line": line}))


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    for key, found in one.items():
        assert found == other[key], key


def places(found: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {name: (it["type"], it["bus"], it["addr"]) for name, it in found["devices"].items()}


async def plug(vm: Running, driver: str, id: str | None, **more: object) -> None:
    named = {"driver": driver} | ({"id": id} if id else {})
    properties = {key.replace("_", "-"): value for key, value in more.items()}
    await ask(vm.witness, "device_add", named | properties)


async def hmp(vm: Running, line: str) -> str:
    return str(await ask(vm.witness, "human-monitor-command", {"command-line": line}))


async def unplug(vm: Running, *ids: str) -> None:
    """What asks no guest; also its disk is free then."""
    async with connect(vm.qmp) as monitor:
        with monitor.listen("DEVICE_DELETED") as events:
            for id in ids:
                await monitor.execute("device_del", {"id": id})
            gone: set[str] = set()
            async with asyncio.timeout(30):
                while not gone >= set(ids):
                    gone.add((await events.next()).data.get("device", ""))


async def release(vm: Running, *ids: str) -> None:
    """What is on PCI: a reset of the machine stands for a guest that lets go of it."""
    for id in ids:
        await ask(vm.witness, "device_del", {"id": id})
    await ask(vm.witness, "system_reset")
    there = set(ids)
    async with asyncio.timeout(30):
        while there & set(ids):
            await asyncio.sleep(0.01)
            listed = await ask(vm.witness, "qom-list", {"path": "/machine/peripheral"})
            there = {one["name"] for one in listed}


async def a_processor(vm: Running, id: str) -> None:
    """The last place of all gets a vCPU."""
    (free, *_) = [
        cpu for cpu in await ask(vm.witness, "query-hotpluggable-cpus") if "qom-path" not in cpu
    ]
    await plug(vm, free["type"], id, **free["props"])


async def came_and_went_on_pc(vm: Running) -> None:
    at = vm.dir
    await unplug(vm, "kbd")
    await release(vm, "first", "vdgone")
    # 10.0 and 11.1 count user networks: the one that stays is not the next after the default one
    await ask(vm.witness, "netdev_add", {"type": "user", "id": "n0"})
    # a card and what it is connected to often have the same name
    await ask(vm.witness, "netdev_add", {"type": "user", "id": "nic1", "restrict": True})
    await ask(vm.witness, "netdev_del", {"id": "n0"})
    await plug(vm, "virtio-net-pci", "nic1", netdev="nic1", mac="52:54:00:00:00:77", addr="1c.1")
    await plug(vm, "e1000", "nic2", mac="52:54:00:00:00:78", romfile="", bus="br0", addr="5")
    await ask(vm.witness, "blockdev-add", raw(image(at / "h0.raw", "raw"), "h0"))
    await ask(vm.witness, "object-add", {"qom-type": "iothread", "id": "io1"})
    await plug(vm, "virtio-blk-pci", "vd9", drive="h0", iothread="io1", num_queues=2, serial="s9")
    said = await hmp(vm, f"drive_add 0 if=none,id=dx,format=qcow2,file={image(at / 'dx.qcow2')}")
    assert said.strip() == "OK"
    await plug(vm, "lsi53c895a", "lsi")
    await plug(vm, "scsi-hd", "lun9", bus="lsi.0", drive="dx", scsi_id=3)
    await ask(vm.witness, "blockdev-add", raw(image(at / "st.raw", "raw"), "st"))
    await plug(vm, "usb-storage", "stick", drive="st", bus="ehci.0")
    await plug(vm, "usb-tablet", "tablet")
    socket = {"type": "unix", "data": {"path": f"{at}/late.sock"}}
    backend = {"type": "socket", "data": {"addr": socket, "server": True, "wait": False}}
    await ask(vm.witness, "chardev-add", {"id": "late", "backend": backend})
    await plug(vm, "virtserialport", "port", chardev="late", name="org.late", bus="vs.0")
    await plug(vm, "virtio-balloon-pci", None, addr="1d")
    size = {"size": 128 << 20}
    await ask(vm.witness, "object-add", {"qom-type": "memory-backend-memfd", "id": "m1", **size})
    await plug(vm, "pc-dimm", "dimm1", memdev="m1", slot=1)
    await a_processor(vm, "cpu3")
    # nobody releases it: it is there until then
    await ask(vm.witness, "device_del", {"id": "vd9"})


async def came_and_went_on_q35(vm: Running) -> None:
    await unplug(vm, "mouse", "lun9")
    await ask(vm.witness, "netdev_add", {"type": "socket", "id": "nic1", "listen": "127.0.0.1:0"})
    await plug(vm, "virtio-net-pci", "nic1", netdev="nic1", mac="52:54:00:00:00:77", bus="rp0")
    await ask(vm.witness, "netdev_add", {"type": "user", "id": "spare"})  # on no card, with a state
    random = {"qom-type": "rng-random", "id": "r1", "filename": "/dev/urandom"}
    await ask(vm.witness, "object-add", random)
    await plug(vm, "virtio-rng-pci", "mouse", rng="r1", bus="rp1")  # the id of one that went
    # its id is that of one that went, whose own disk is another's by now
    await ask(vm.witness, "blockdev-add", raw(image(vm.dir / "h0.raw", "raw", 9), "h0"))
    await plug(vm, "scsi-hd", "lun9", bus="scsi0.0", drive="h0", lun=7)
    await plug(vm, "scsi-hd", "lun1", bus="scsi0.0", drive="s9", lun=1)
    await plug(vm, "scsi-cd", "cd", bus="scsi0.0")
    await plug(vm, "usb-tablet", "tablet")
    await plug(vm, "usb-hub", "zhub", port="4")
    await plug(vm, "usb-kbd", "behind", bus="xhci.0", port="4.2")
    await plug(vm, "qemu-xhci", "bus", bus="rp2")
    await plug(vm, "usb-mouse", None, bus="bus.0")
    await ask(
        vm.witness, "object-add", {"qom-type": "memory-backend-ram", "id": "m1", "size": SIZE << 7}
    )
    await plug(vm, "pc-dimm", "dimm1", memdev="m1")
    await a_processor(vm, "cpu3")


@pytest.mark.parametrize(
    ("version", "machine"), [("7.2", "pc"), ("7.2", "q35"), ("10.0", "q35"), ("11.1", "pc")]
)
async def test_it_comes_back_with_its_ram_and_can_be_taken_again(
    version: str, machine: str, short: Path, store: Path
) -> None:
    qemu = binary(version)
    at = short / "vm"
    at.mkdir()
    node = "driver=qcow2,node-name=d0,file.driver=file,file.filename"
    disk = ["-blockdev", f"{node}={image(at / 'd0.qcow2')}", "-device", "virtio-blk-pci,drive=d0"]
    gone = ["-drive", f"if=none,id=g0,format=raw,file={image(at / 'g0.raw', 'raw')}",
            "-device", "virtio-blk-pci,drive=g0,id=vdgone"]  # fmt: skip
    short_form = ["-drive", f"if=virtio,format=raw,file={image(at / 'v0.raw', 'raw')}"]
    source = (
        f"driver=raw,node-name=s9,file.driver=file,file.filename={image(at / 's9.raw', 'raw', 1)}"
    )
    lun = ["-blockdev", source, "-device", '{"driver":"scsi-hd","id":"lun9","drive":"s9"}']
    line = [*PC, *gone, *disk, *short_form] if machine == "pc" else [*Q35, *lun, *disk]
    engine = Engine(short / "local", store, allow_local_store=True)
    async with running(qemu, *line, directory=at) as vm:
        with witness(vm.witness) as eye:
            eye.until_running(within=10)
        await (came_and_went_on_pc if machine == "pc" else came_and_went_on_q35)(vm)
        async with connect(vm.qmp) as monitor:
            before = await seen(monitor)
        made = await engine.create(Machine("vm", vm.qmp), PAUSED)
        await untouched(vm.witness)
    ready = await engine.prepare_restore("vm", Restoration(short / "one"))
    async with engine.restored(ready) as back:
        qmp = back.machine.qmp
        assert qmp is not None
        async with connect(qmp) as monitor:
            same(await seen(monitor), before)
            for name, mark in {"lun9": 9, "lun1": 1}.items() if machine == "q35" else ():
                command = f'qemu-io -d /machine/peripheral/{name} "read -P {mark} 0 512"'
                told = await said(monitor, command)
                assert "verification" not in told, name
        again = await engine.create(Machine("again", qmp), PAUSED)
    newest = binary("11.1")
    wish = Restoration(short / "two", qemu=newest)
    (row,) = [row for row in (await engine.check("again", wish)).rows if row.what == "hotplug"]
    assert (row.verdict, row.captured) == ("ok", "none")
    async with (
        engine.restored(await engine.prepare_restore("again", wish, again.id)) as back,
        connect(back.machine.qmp) as monitor,  # type: ignore[arg-type]
    ):
        found = await seen(monitor)
        if qemu == newest:
            same(found, before)
        else:  # it has other properties, and finds other words
            assert places(found) == places(before)
            same({key: found[key] for key in ("cpus", "memory", "usb")}, before)
    wish = Restoration(short / "cold", cold=True)
    (row,) = [row for row in (await engine.check("vm", wish)).rows if row.what == "hotplug"]
    assert row.verdict == "ok"
    assert "nic1" in row.captured
    cold = await engine.prepare_restore("vm", wish, made.id)
    async with engine.restored(cold) as back, connect(back.machine.qmp) as monitor:  # type: ignore[arg-type]
        found = await seen(monitor)
        assert found["devices"].keys() == before["devices"].keys()


async def test_a_device_that_cannot_come_back_is_refused_by_its_name(
    qemu72: Path, short: Path, store: Path
) -> None:
    at = short / "vm"
    at.mkdir()
    engine = Engine(short / "local", store, allow_local_store=True)
    machine = [
        *("-M", "pc", "-m", "64", "-nodefaults", "-device", "virtio-serial-pci,id=vs"),
        *("-device", "usb-ehci,id=ehci", "-chardev", "null,id=far"),
        *("-device", "usb-redir,id=redir,chardev=far"),
    ]
    async with running(qemu72, *machine, directory=at) as vm:
        with witness(vm.witness) as eye:
            eye.until_running(within=10)
        web = Machine("vm", vm.qmp)
        await ask(vm.witness, "blockdev-add", raw(image(at / "h0.raw", "raw"), "h0"))
        await plug(vm, "virtio-blk-pci", "vd9", drive="h0")
        mux = {"type": "mux", "data": {"chardev": "rest"}}
        await ask(
            vm.witness, "chardev-add", {"id": "rest", "backend": {"type": "null", "data": {}}}
        )
        await ask(vm.witness, "chardev-add", {"id": "many", "backend": mux})
        part = raw(image(at / "part.raw", "raw"), "part") | {"offset": 4096, "size": 8192}
        await ask(vm.witness, "blockdev-add", part | {"read-only": True})
        await plug(vm, "virtio-scsi-pci", "scsi")
        await plug(vm, "scsi-cd", "slice", drive="part", bus="scsi.0")
        with pytest.raises(Blocked, match=r"disk slice: .* only a part of its file"):
            await engine.create(web, PAUSED)
        await unplug(vm, "slice")
        await plug(vm, "virtserialport", "port", chardev="many", bus="vs.0")
        before = await chains(vm.witness)
        with pytest.raises(Blocked, match=r"device port: chardev many is a mux") as refused:
            await engine.create(web, PAUSED)
        await unplug(vm, "port")
        with pytest.raises(Blocked, match=r"device redir: .*usb-redir"):
            await engine.create(web, PAUSED)
        await unplug(vm, "redir")
        await engine.create(web, PAUSED)
        null = {"type": "null", "data": {}}
        await ask(vm.witness, "chardev-add", {"id": "far", "backend": null})  # it took it along
        await plug(vm, "usb-redir", "redir", chardev="far", bus="ehci.0")
        await plug(vm, "virtserialport", "port", chardev="many", bus="vs.0")
        with pytest.raises(Blocked, match=r"device port: .*; device redir: "):
            await engine.create(web, PAUSED)
        assert "--ram none" in refused.value.hint
        assert await chains(vm.witness) == before
        await untouched(vm.witness)
        (auto, *_) = (await engine.info(web)).possibilities
        assert not auto.possible
        assert "port" in auto.why
        await engine.create(web, Wishes(ram=RamChoice.NONE, max_pause=60))
    wish = Restoration(short / "cold", cold=True)
    ready = await engine.prepare_restore("vm", wish)
    assert any("left out: device port" in told for told in ready.notices)
    async with engine.restored(ready) as back, connect(back.machine.qmp) as monitor:  # type: ignore[arg-type]
        assert (await seen(monitor))["devices"].keys() == {"vs", "ehci", "vd9", "scsi"}
