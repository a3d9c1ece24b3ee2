"""A machine is restored beside its living original, from nothing but its command line."""

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from qmpsnap.hypervisor.machine.attach import facts
from qmpsnap.hypervisor.machine.inventory import take
from qmpsnap.hypervisor.machine.launch import launched
from qmpsnap.hypervisor.machine.relocate import relocate
from qmpsnap.hypervisor.monitor import Monitor, connect
from tests.rig.qemu import VERSIONS, binary, running

# BASE and OTHER are images that the original holds; what is written beside a key is its disk
MACHINES = {
    "all defaults": ("-hda BASE -monitor stdio -parallel null", ["drive:0"]),
    "nographic": ("-nographic -serial mon:stdio -drive file=BASE,if=virtio,id=v", ["v"]),
    "nographic, bare": ("-nographic -drive file=BASE,format=qcow2,if=ide,cache=none,id=v", ["v"]),
    "q35, json": (
        '-M q35,vmport=off -nodefaults -object {"qom-type":"iothread","id":"io"} '
        '-blockdev {"driver":"file","filename":"BASE","node-name":"f","aio":"native",'
        '"cache":{"direct":true}} '
        '-blockdev {"driver":"qcow2","file":"f","node-name":"d","cache":{"direct":true}} '
        '-device {"driver":"virtio-blk-pci","drive":"d","id":"vda","iothread":"io"} '
        "-blockdev file,filename=OTHER,node-name=iso -device ide-cd,drive=iso,id=cd",
        ["d"],
    ),
    "pflash by node": (
        "-M pc,pflash0=p -blockdev qcow2,node-name=p,file.driver=file,file.filename=BASE "
        "-object filter-dump,id=dump,netdev=n,file=n.pcap -netdev user,id=n -device e1000,netdev=n",
        ["p"],
    ),
    "wires": (
        "-nodefaults -chardev socket,path=agent,server=on,wait=off,id=a -device virtio-serial-pci "
        "-device virtserialport,chardev=a,name=org.qemu.guest_agent.0 -chardev stdio,id=o,mux=on "
        "-mon o -serial chardev:o -serial unix:s1,server=on,wait=off -pidfile pid -D log "
        "-nic socket,listen=127.0.0.1:0,model=e1000 -gdb unix:gdb,server=on,wait=off "
        "-drive if=none,id=v -device virtio-blk-pci,drive=v,id=x -set drive.v.file=BASE -vga std "
        "-vnc unix:vnc -global isa-debugcon.iobase=0x402",
        ["v"],
    ),
}


@pytest.fixture(params=VERSIONS)
def qemu(request):
    return binary(request.param)


def image(path: Path, size: str, *more: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *more, path, size], check=True)
    return path


async def migrated(monitor: Monitor, command: str, uri: str) -> str:
    on = {"capabilities": [{"capability": "events", "state": True}]}
    await monitor.execute("migrate-set-capabilities", on)
    status = "setup"
    with monitor.listen("MIGRATION") as events:
        await monitor.execute(command, {"uri": uri})
        async with asyncio.timeout(20):
            while status not in ("completed", "failed"):
                status = (await events.next()).data["status"]
    return status


async def saved(monitor: Monitor, stream: Path) -> None:
    """The migration stream is in the file, whole: QEMU is done before who reads from it."""
    end = stream.with_name(f"{stream.name} end")
    os.mkfifo(end)
    assert await migrated(monitor, "migrate", f"exec:cat >{stream}; : >'{end}'") == "completed"
    assert await asyncio.to_thread(end.read_bytes) == b""


async def told(monitor: Monitor) -> dict[str, object]:
    """What the guest can see of its machine, bus addresses and all."""
    found = await take(monitor)
    return {
        "devices": found.devices, "pci": found.pci, "memory": found.memory,
        "machine": found.machine, "cpus": [cpu.props for cpu in found.cpus or []],
        "tree": (await monitor.execute("human-monitor-command", {"command-line": "info qtree"})),
    }  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES)
async def test_relocated_machine_takes_the_state_beside_its_original(qemu, tmp_path, machine):
    text, keys = MACHINES[machine]
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    base, other = image(old / "base", "4M"), image(old / "other", "1M")
    words = text.replace("BASE", base.name).replace("OTHER", other.name).split(" ")
    disks = {key: image(new / f"{key}.qcow2", "4M", "-F", "qcow2", "-b", str(base)) for key in keys}
    if "pflash0" in text:  # the original holds a lock on its flash, which the backing file shares
        disks = {key: image(new / f"{key}.qcow2", "4M") for key in keys}
    stream = tmp_path / "stream"
    async with running(qemu, *words, "-S", "-m", "32", directory=old) as vm:
        async with connect(vm.qmp) as monitor:
            was = await told(monitor)
            await saved(monitor, stream)
            before = {path.name: path.stat().st_size for path in old.iterdir()}
            attached = facts(vm.argv, old)
            moved = relocate(
                attached.line, cwd=old, into=new, machine_type=str(was["machine"]), disks=disks,
                incoming=True, paused=True, qmp=new / "q", agent=None,
            )  # fmt: skip
            async with (
                launched(moved.cmdline.argv(), directory=tmp_path, log=tmp_path / "log") as twin,
                connect(twin.qmp) as restored,
            ):
                assert comparable(await told(restored)) == comparable(was)
                uri = f"exec:cat {stream}"
                assert await migrated(restored, "migrate-incoming", uri) == "completed"
                await restored.execute("cont")
                assert (await restored.execute("query-status"))["status"] == "running"
                if attached.agent:
                    assert moved.agent == new / "agent"
                    assert moved.agent.is_socket()
        assert {path.name: path.stat().st_size for path in old.iterdir()} == before


def comparable(seen: dict[str, object]) -> dict[str, object]:
    """Without the names of what is behind the devices: those are what a restore changes."""
    apart = ("chardev = ", "drive = ", "netdev = ", "write-cache = ", "backend")
    lines = str(seen["tree"]).splitlines()
    kept = [line for line in lines if not line.strip().startswith(apart)]
    return seen | {"tree": kept}
