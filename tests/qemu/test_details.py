"""The record of a machine with nearly everything, against what QEMU and the kernel say."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from qmpsnap import Engine
from qmpsnap.engine import configuration, survey
from qmpsnap.engine.configuration import Configuration
from qmpsnap.engine.details import Details
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.wishes import RamChoice, Wishes
from qmpsnap.errors import Blocked
from qmpsnap.hypervisor.monitor import connect
from tests.faults.fake_agent import fake_agent
from tests.rig.qemu import Running, running
from tests.rig.schema import wrong
from tests.rig.wire import Witness, witness

MIB = 1 << 20
UUID = "11111111-2222-3333-4444-555555555555"
HUSH = "correct horse battery staple"
AGENT: dict[str, Any] = {
    "guest-get-osinfo": {"id": "debian", "pretty-name": "Debian 12", "kernel-release": "6.1"},
    "guest-get-host-name": {"host-name": "rich"},
    "guest-get-timezone": {"zone": "CET", "offset": 3600},
    "guest-network-get-interfaces": [
        {
            "name": "eth0",
            "hardware-address": "52:54:00:11:22:33",
            "ip-addresses": [
                {"ip-address": "10.0.2.15", "ip-address-type": "ipv4", "prefix": 24},
                {"ip-address": "fe80::1", "ip-address-type": "ipv6", "prefix": 64},
            ],
        },
        {"name": "lo"},
    ],
    "guest-get-fsinfo": [
        {"name": "vda1", "mountpoint": "/", "type": "ext4", "disk": [], "used-bytes": 5}
    ],
}


def words(folder: Path) -> list[str]:
    """Nearly everything that a command line can say of a machine without a guest in it."""
    for name in ("d0", "d1", "d2"):
        image = folder / f"{name}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "16M"], check=True)
    (folder / "key").write_text(HUSH)
    (folder / "item").write_bytes(b"abc")
    (folder / "code").write_bytes(bytes(2 * MIB))
    (folder / "flash").symlink_to("code")
    return [
        *("-M", "q35", "-cpu", "Haswell,+avx,-rtm,vendor=AuthenticAMD", "-name", "rich"),
        *("-smp", "3,sockets=2,cores=2,threads=1,maxcpus=4", "-m", "96M,slots=4,maxmem=1G"),
        *("-nodefaults", "-uuid", UUID, "-rtc", "base=utc,clock=host,driftfix=slew"),
        *("-object", "memory-backend-ram,id=m0,size=64M,prealloc=on,dump=off"),
        *("-object", "memory-backend-memfd,id=m1,size=32M,share=on"),
        *("-object", f"memory-backend-file,id=m2,size=128M,mem-path={folder}/ram,share=off,"
          "host-nodes=0,policy=bind,merge=off"),
        *("-numa", "node,nodeid=0,cpus=0-1,memdev=m0", "-numa", "node,nodeid=1,cpus=2-3,memdev=m1"),
        *("-numa", "dist,src=0,dst=1,val=21", "-device", "pc-dimm,id=dimm0,memdev=m2,node=1"),
        *("-object", "iothread,id=io0,poll-max-ns=16384", "-object", "iothread,id=io1"),
        *("-object", "throttle-group,id=tg0,x-iops-total=500,x-bps-read=1000000"),
        *("-object", f"secret,id=s0,file={folder}/key", "-object", f"secret,id=s1,data={HUSH}"),
        *("-blockdev", f"driver=qcow2,node-name=d0,discard=unmap,l2-cache-size=1048576,"
          f"file.driver=file,file.filename={folder}/d0.qcow2"),
        *("-device", "virtio-blk-pci,drive=d0,id=vd0,iothread=io0,serial=abc,bootindex=1"),
        *("-drive", f"file={folder}/d1.qcow2,if=none,id=d1,iops=100,bps=1000000,cache=none"),
        *("-device", "virtio-scsi-pci,id=scsi0", "-device", "scsi-hd,drive=d1,id=sd0,lun=3"),
        *("-drive", f"file={folder}/d2.qcow2,if=ide,index=1"),
        *("-drive", f"file={folder}/flash,if=pflash,format=raw,readonly=on"),
        *("-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,id=nic0,"
          "mac=52:54:00:11:22:33"),
        *("-netdev", "hubport,id=n1,hubid=3", "-device", "e1000,netdev=n1,id=n1"),
        *("-nic", "none", "-device", "qemu-xhci,id=xhci", "-device", "usb-tablet,id=tab,port=2"),
        *("-fw_cfg", "name=opt/org.test/a,string=hello", "-fw_cfg",
          f"name=opt/org.test/b,file={folder}/item"),
        *("-smbios", "type=1,manufacturer=Acme,serial=42", "-device", "VGA", "-device",
          "virtio-balloon-pci,id=bal", "-vnc", f"unix:{folder}/vnc,password=on"),
        *("-serial", "null", "-S"),
    ]  # fmt: skip


@asynccontextmanager
async def rich(qemu: Path, folder: Path) -> AsyncIterator[tuple[Running, Witness]]:
    async with running(qemu, *words(folder), directory=folder) as vm:
        with witness(vm.witness) as eye:
            yield vm, eye


async def taken(vm: Running, agent: Path | None = None) -> tuple[Configuration, Details]:
    async with connect(vm.qmp) as monitor:
        machine = Machine("rich", vm.qmp, agent)
        facts = await survey.take(monitor, machine, vm.dir / "layers")
        made = configuration.of(await survey.detailed(monitor, facts))
    assert made.details is not None
    return made, made.details


def prop(eye: Witness, path: str, name: str) -> Any:
    return eye.ask("qom-get", path=path, property=name)


async def test_a_machine_with_nearly_everything(qemu: Path, short: Path) -> None:
    replies = {name.replace("-", "_"): lambda it=it: it for name, it in AGENT.items()}
    async with rich(qemu, short) as (vm, eye):
        cpus = eye.ask("query-cpus-fast")
        os.sched_setaffinity(cpus[1]["thread-id"], {0})
        with fake_agent(short / "agent", **replies) as agent:
            made, found = await taken(vm, agent.path)
            assert not any("freeze" in heard or "exec" in heard for heard in agent.heard)
        assert found.missing == []
        _cpus(found, eye)
        _memory(found, eye, short)
        _devices(found, eye)
        _disks(found, eye, short)
        _networks(found)
        _host(found, vm, eye)
        _board(found, eye, short)
        _guest(found)
        text = configuration.encode(made)
    assert HUSH.encode() not in text
    assert wrong(json.loads(text), configuration.schemas()["qmpsnap-machine"]) == []
    assert configuration.decode(text, "machine.json") == made


def _cpus(found: Details, eye: Witness) -> None:
    cpu, topology = found.cpu, found.topology
    assert cpu is not None
    assert topology is not None
    path = "/machine/unattached/device[0]"
    # a feature more or less each 0.3 ms: those that the model, the user and TCG decide
    looked = ["avx", "avx2", "rtm", "hle", "pcid", "sse2", "sse4.1", "tsc-deadline", "movbe", "nx"]
    for name in looked:
        assert (name in cpu.features) == prop(eye, path, name), name
    assert not set(cpu.features) & set(cpu.features_off)
    assert set(cpu.unavailable) <= set(cpu.features_off)
    # hle was switched on by the model, and is not there
    assert "hle" in cpu.unavailable
    assert cpu.values["vendor"] == prop(eye, path, "vendor") == "AuthenticAMD"
    assert cpu.values["model-id"] == prop(eye, path, "model-id")
    smp = prop(eye, "/machine", "smp")
    assert {key: smp[key] for key in ("cpus", "maxcpus", "sockets", "cores", "threads")} == {
        "cpus": topology.cpus,
        "maxcpus": topology.maxcpus,
        "sockets": topology.sockets,
        "cores": topology.cores,
        "threads": topology.threads,
    }
    slots = found.cpu_slots or []
    assert [one.qom_path for one in slots].count(None) == topology.maxcpus - topology.cpus == 1
    there = {one["qom-path"] for one in eye.ask("query-cpus-fast")}
    assert {one.qom_path for one in slots if one.qom_path} == there


def _memory(found: Details, eye: Witness, folder: Path) -> None:
    assert found.memory is not None
    assert (found.memory.size_bytes, found.memory.slot_count) == (96 * MIB, 4)
    assert found.memory.max_bytes == 1 << 30
    backends = {one.id: one for one in found.memory_backends or []}
    assert sorted(map(str, backends)) == ["m0", "m1", "m2"]
    for name, one in backends.items():
        path = f"/objects/{name}"
        for key in ("size", "share", "merge", "dump", "prealloc", "reserve", "policy"):
            told = getattr(one, "size_bytes" if key == "size" else key)
            assert told == prop(eye, path, key), (name, key)
        assert one.host_nodes == prop(eye, path, "host-nodes")
        assert one.type == prop(eye, path, "type")
    assert (backends["m0"].prealloc, backends["m0"].dump) == (True, False)
    assert (backends["m2"].policy, backends["m2"].host_nodes) == ("bind", [0])
    assert backends["m2"].mem_path == str(folder / "ram")
    assert backends["m2"].huge_page_bytes is None
    (module,) = found.memory_modules or []
    assert (module.id, module.memdev, module.node) == ("dimm0", "m2", 1)
    assert module.address == prop(eye, "/machine/peripheral/dimm0", "addr")
    nodes = found.numa_nodes or []
    assert [(one.cpus, one.size_bytes) for one in nodes] == [([0, 1], 64 * MIB), ([2], 32 * MIB)]
    assert [one.distances for one in nodes] == [[10, 21], [21, 10]]
    said = eye.ask("human-monitor-command", **{"command-line": "info numa"})
    assert "node 1 cpus: 2\r\n" in said
    # with the DIMM on it, which the node's own figure is without
    assert "node 1 size: 160 MB" in said


def _devices(found: Details, eye: Witness) -> None:
    tree = found.device_tree or []
    named = {one.id: one for one in tree if one.id}
    folder = eye.ask("qom-list", path="/machine/peripheral")
    there = {one["name"] for one in folder if one["type"].startswith("child<")}
    assert named.keys() == there
    for name, one in named.items():
        path = f"/machine/peripheral/{name}"
        assert one.type == prop(eye, path, "type"), name
        if one.bus is not None:
            assert prop(eye, path, "parent_bus").rpartition("/")[2] == one.bus, name
    place = prop(eye, "/machine/peripheral/vd0", "addr")
    assert named["vd0"].address == f"{place >> 3:02x}.{place & 7}"
    assert (named["sd0"].address, named["sd0"].bus_type) == ("0:0:3", "SCSI")
    assert (named["tab"].address, named["tab"].parent) == ("2", "xhci")
    # also those that nobody named, and the board's own
    types = [one.type for one in tree]
    assert {"mc146818rtc", "ICH9-LPC", "ide-hd", "isa-serial", "cfi.pflash01"} <= set(types)
    lists = [
        eye.ask("qom-list", path=f"/machine/{one}") for one in ("unattached", "peripheral-anon")
    ]
    other = [
        one["type"][6:-1] for listed in lists for one in listed if one["name"].startswith("device[")
    ]
    of_cpus = [one for one in other if one.endswith("-cpu")]
    assert sorted(of_cpus + [one for one in types if one in set(other) - set(of_cpus)]) == sorted(
        one for one in other if one in types or one in of_cpus
    )
    (disk,) = [one for one in tree if one.type == "virtio-blk-device"]
    assert disk.parent == "vd0"
    assert disk.properties is not None
    assert {"drive": "d0", "serial": "abc"}.items() <= disk.properties.items()
    assert "event_idx" not in disk.properties  # it is as it is by default
    (unnamed,) = [one for one in tree if one.type == "ide-hd"]
    assert unnamed.properties is not None
    assert unnamed.properties["drive"] in {one.name for one in found.block_drives or []}
    (rtc,) = [one for one in tree if one.type == "mc146818rtc"]
    assert rtc.properties is None
    for one in tree:
        if one.id and one.properties:
            for key, value in one.properties.items():
                now = prop(eye, f"/machine/peripheral/{one.id}", key)
                if key == "addr" and isinstance(now, int) and one.id != "dimm0":
                    now = f"{now >> 3:02x}.{now & 7}"
                assert value == now, (one.id, key)


def _disks(found: Details, eye: Witness, folder: Path) -> None:
    nodes = {one.node: one for one in found.block_nodes or []}
    assert nodes.keys() == {
        one["node-name"] for one in eye.ask("query-named-block-nodes", flat=True)
    }
    assert nodes["d0"].options == {
        "driver": "qcow2",
        "node-name": "d0",
        "discard": "unmap",
        "l2-cache-size": "1048576",
        "file": {"driver": "file", "filename": str(folder / "d0.qcow2")},
    }
    drives = {one.qdev: one for one in found.block_drives or []}
    assert drives["sd0"].limits is not None
    assert (drives["sd0"].limits.iops_total, drives["sd0"].limits.bps_total) == (100, 1_000_000)
    assert drives["sd0"].options is not None
    assert drives["sd0"].options["cache"] == "none"
    cache = nodes[str(drives["sd0"].node)].cache
    assert cache is not None
    assert cache.direct
    (group,) = found.throttle_groups or []
    assert (group.id, group.limits.iops_total, group.limits.bps_read) == ("tg0", 500, 1_000_000)
    threads = {one.id: one.poll_max_ns for one in found.iothreads or []}
    assert threads == {
        name: prop(eye, f"/objects/{name}", "poll-max-ns") for name in ("io0", "io1")
    }
    assert threads["io0"] == 16384


def _networks(found: Details) -> None:
    cards = {one.id: one for one in found.network_cards or []}
    assert cards["nic0"].mac == "52:54:00:11:22:33"
    assert (cards["nic0"].backend, cards["n1"].backend) == ("n0", "n1")
    assert cards["n1"].model == "e1000"
    backends = {one.id: one for one in found.network_backends or []}
    assert {name: one.type for name, one in backends.items()} == {"n0": "user", "n1": "hubport"}
    assert backends["n1"].options == {"type": "hubport", "id": "n1", "hubid": "3"}


def _host(found: Details, vm: Running, eye: Witness) -> None:
    pinned = {(one.kind, one.name): one.host_cpus for one in found.pinning or []}
    threads = {
        ("vcpu", str(one["cpu-index"])): one["thread-id"] for one in eye.ask("query-cpus-fast")
    }
    threads |= {("iothread", one["id"]): one["thread-id"] for one in eye.ask("query-iothreads")}
    threads[("main", "main")] = vm.pid
    assert pinned.keys() == threads.keys()
    for key, thread in threads.items():
        status = Path(f"/proc/{vm.pid}/task/{thread}/status").read_text()
        (listed,) = re.findall(r"Cpus_allowed_list:\s+(\S+)", status)
        cpus: list[int] = []
        for part in listed.split(","):
            first, _, last = part.partition("-")
            cpus += range(int(first), int(last or first) + 1)
        assert pinned[key] == cpus  # type: ignore[index]
    assert pinned["vcpu", "1"] == [0]
    files = {one.name: one for one in found.firmware or []}
    assert {"vgabios-stdvga.bin", "efi-virtio.rom", "efi-e1000.rom"} <= files.keys()
    assert str(vm.dir / "flash") in files
    for one in files.values():
        assert one.path is not None
        content = Path(one.path).read_bytes()
        assert one.size_bytes == len(content)
        assert one.blake3 == blake3(content).hexdigest()


def _board(found: Details, eye: Witness, folder: Path) -> None:
    assert found.clock is not None
    assert (found.clock.base, found.clock.clock) == ("utc", "host")
    assert found.clock.driftfix == "slew"
    now = prop(eye, "/machine", "rtc-time")
    assert found.clock.guest_time is not None
    assert found.clock.guest_time.startswith(f"{now['tm_year'] + 1900}-{now['tm_mon'] + 1:02}-")
    assert found.clock.guest_time[:13] <= found.clock.host_time
    assert found.board is not None
    assert found.board.uuid == UUID
    assert [(one.name, one.string, one.file) for one in found.board.fw_cfg] == [
        ("opt/org.test/a", "hello", None),
        ("opt/org.test/b", None, str(folder / "item")),
    ]
    (table,) = found.board.smbios
    assert (table.type, table.fields["serial"]) == (1, ["42"])
    secrets = {one.id: one for one in found.secrets or []}
    assert (secrets["s0"].file, secrets["s0"].inline) == (str(folder / "key"), False)
    assert (secrets["s1"].file, secrets["s1"].inline) == (None, True)
    assert found.withheld == ["-object s1 data"]


def _guest(found: Details) -> None:
    guest = found.guest
    assert guest is not None
    assert guest.os is not None
    assert (guest.os.id, guest.os.pretty_name, guest.host_name) == ("debian", "Debian 12", "rich")
    assert guest.time_zone is not None
    assert (guest.time_zone.name, guest.time_zone.offset_seconds) == ("CET", 3600)
    (ethernet, loop) = guest.interfaces or []
    assert ethernet.addresses == ["10.0.2.15/24", "fe80::1/64"]
    assert (loop.mac, loop.addresses) == (None, [])
    (root,) = guest.filesystems or []
    assert (root.mountpoint, root.used_bytes, root.total_bytes) == ("/", 5, None)


async def test_what_is_not_there_is_missing_by_name(qemu: Path, short: Path) -> None:
    async with running(qemu, directory=short) as vm:
        _, bare = await taken(vm)
        assert bare.cpu is None
        assert bare.guest is None
        assert "the CPU model" in bare.missing
        assert bare.memory_modules == bare.numa_nodes == bare.iothreads == []
        endless = {"id": "x" * (1 << 20)}
        replies = {"guest_get_osinfo": lambda: endless, "guest_get_host_name": lambda: None}
        with fake_agent(short / "agent", **replies) as agent:
            _, deaf = await taken(vm, agent.path)
        # one answer is too long to be kept; the next never comes, and nobody waits for the rest
        assert deaf.guest is None
        assert {name for name in deaf.missing if name.startswith("guest-")} == set(AGENT)
        assert agent.heard.count("guest-get-fsinfo") == 0
        replies = {"guest_get_osinfo": lambda: {"id": "\ud800"}}
        replies["guest_get_host_name"] = lambda: {"host-name": "sound"}
        with fake_agent(short / "mad", **replies) as agent:
            _, mad = await taken(vm, agent.path)
        assert mad.guest is not None
        assert (mad.guest.os, mad.guest.host_name) == (None, "sound")  # half a character is no text
        assert "guest-get-osinfo" in mad.missing
        _, gone = await taken(vm, short / "agent")
        assert gone.guest is None
        assert "the guest's agent" in gone.missing


async def test_what_is_no_text_is_refused_before_the_guest_is_touched(
    qemu72: Path, short: Path, store: Path
) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    line = ["-M", "pc", "-m", "64", "-nodefaults", "-name", "caf\udce9"]
    async with running(qemu72, *line, directory=short) as vm:
        with witness(vm.witness) as eye:
            eye.until_running(within=10)
            with pytest.raises(Blocked, match=r"is not UTF-8: b'caf\\xe9'"):
                await engine.create(Machine("vm", vm.qmp), Wishes(ram=RamChoice.PAUSED))
            assert eye.status == "running"
    assert await engine.list("vm") == []
