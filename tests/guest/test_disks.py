"""Disks of every kind that people give a QEMU: frozen, brought back, and left out by name."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Level, Wishes
from qmpsnap.errors import Blocked, Refused, UsageError, VmBusy
from qmpsnap.store.files import digest_file
from tests.rig.console import Console
from tests.rig.graph import ask, chains, status, untouched
from tests.rig.guest import agrees, back, blockdev, booted, disk

pytestmark = pytest.mark.guest
OVERLAY = Wishes(level=Level.OVERLAY, max_pause=30)
FIRMWARE = Path("/usr/share/seabios/bios-256k.bin")
VARIABLES = 0x1_0000_0000 - (256 << 10) - (64 << 10)  # where unit 1 lies beneath unit 0
DATA = ["a.qcow2", "data.img", "limited.raw", "named.qcow2", "sub/data.img", "throttled.qcow2"]


def an_engine(short: Path, store: Path) -> Engine:
    return Engine(short / "local", store, allow_local_store=True)


def overlaid(path: Path, golden: Path) -> Path:
    """An image over *golden*, which it names without a folder, as people do."""
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", golden.name]
    subprocess.run([*create, path], check=True, cwd=golden.parent)
    return path


def empty(path: Path) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "16M"], check=True)
    return path


def everyday(short: Path) -> list[str]:
    """The options of a machine with all that goes together, its images made in *short*."""
    (short / "sub").mkdir()
    overlaid(short / "a.qcow2", disk(short / "golden.qcow2"))
    disk(short / "data.img", "raw", "32M")
    disk(short / "sub/data.img", "raw", "32M")
    disk(short / "named.qcow2", size="32M")
    disk(short / "throttled.qcow2", size="32M")
    disk(short / "limited.raw", "raw", "32M")
    disk(short / "ro.qcow2", size="16M")
    file = {"driver": "file", "filename": str(short / "a.qcow2")}
    top = {"driver": "qcow2", "node-name": "a", "file": file}
    device = {"driver": "virtio-blk-pci", "drive": "a", "id": "disk-a", "iothread": "io0"}
    beneath = f"driver=qcow2,node-name=slow,file.driver=file,file.filename={short}/throttled.qcow2"
    unwritten = f"driver=qcow2,node-name=ro,file.driver=file,file.filename={short}/ro.qcow2"
    return [
        *("-object", "iothread,id=io0", "-object", "throttle-group,id=tg,x-iops-total=900"),
        *("-blockdev", json.dumps(top), "-device", json.dumps(device)),
        # the rig starts QEMU in *short*: relative paths, and two files of one name
        *("-drive", "if=virtio,file=data.img,format=raw,cache=none"),
        *("-drive", "if=virtio,id=twin,file=sub/data.img,format=raw"),
        *("-drive", "if=none,id=named,file=named.qcow2,format=qcow2,discard=unmap"),
        *("-device", "virtio-blk-pci,drive=named,id=by-id"),
        *("-blockdev", beneath, "-device", "virtio-blk-pci,drive=t0,id=vt"),
        *("-blockdev", "driver=throttle,node-name=t0,throttle-group=tg,file=slow"),
        *("-drive", "if=virtio,file=limited.raw,format=raw,throttling.iops-total=900"),
        *("-blockdev", f"{unwritten},read-only=on", "-device", "virtio-blk-pci,drive=ro,id=ro"),
        *("-drive", "if=none,id=tray,media=cdrom", "-device", "ide-cd,drive=tray,id=cd"),
        *("-serial", "file:second.log", "-pidfile", "machine.pid", "-D", "machine.log"),
        *("-netdev", "user,id=net0,hostfwd=tcp:127.0.0.1:0-:22"),
        *("-device", "e1000,netdev=net0,romfile="),
    ]


@pytest.mark.timeout(400)
async def test_an_everyday_machine_comes_back_with_all_its_disks(
    qemu: Path, short: Path, store: Path
) -> None:
    engine = an_engine(short, store)
    options = everyday(short)
    golden, unwritten = digest_file(short / "golden.qcow2"), digest_file(short / "ro.qcow2")
    async with booted(qemu, short, disks=options, machine="q35") as guest:
        machine = Machine("web", guest.qmp, guest.agent)
        await guest.console.run("busy disk=512", within=20)
        before = await guest.console.witness(within=30)
        assert (await guest.console.run("ls /data | wc -l", within=10)).strip() == "7"
        was = await chains(guest.qemu.witness)
        made = await engine.create(machine, OVERLAY)
        now = await chains(guest.qemu.witness)
        assert {name for name in now if len(now[name]) == len(was[name]) + 1} == set(was) - {"ro"}
        assert len(now["disk-a"]) == 3
        shown = await engine.show("web")
        taken = {one.device: Path(one.chain[0].path) for one in shown.storage.disks}
        assert sorted(str(path.relative_to(short)) for path in taken.values()) == DATA
        reasons = {left.device: left.reason for left in shown.storage.left_out}
        assert reasons == {"ro": "read-only", "cd": "empty drive"}
        to = short / "back"
        async with back(engine, "web", Restoration(to)) as (restored, console):
            found = await console.witness(within=60)
            assert found.ok
            assert found.nonce == before.nonce
            assert (await console.run("ls /data | wc -l", within=10)).strip() == "7"
            qmp = restored.machine.qmp
            assert qmp is not None
            inside = await chains(qmp)
            tops = [Path(files[0]) for name, files in inside.items() if name != "ro"]
            assert len(set(tops)) == len(DATA)
            assert {path.parent for path in tops} == {to}
            assert inside["ro"] == [str(short / "ro.qcow2")]
            there = {path.name for path in to.iterdir()}
            assert there >= {"second.log", "machine.pid", "console.sock", "agent.sock"}
            assert (to / "machine.pid").read_text().strip() == str(restored.process.pid)
            assert any("hostfwd" in notice for notice in restored.ready.notices)
            limits = {"path": "/objects/tg", "property": "limits"}
            assert (await ask(qmp, "qom-get", limits))["iops-total"] == 900
        with pytest.raises(Refused, match=str(to)):
            await engine.delete(machine, made.id)
        shutil.rmtree(to)
        # what was written since goes back into the files where it came from
        deleted = await engine.delete(machine, made.id)
        assert len(deleted.folded) == len(DATA)
        assert await chains(guest.qemu.witness) == was
        assert (await guest.console.witness(within=60)).ok
        # copies leave every disk where it is
        copied = await engine.create(machine, Wishes(max_pause=30))
        assert await chains(guest.qemu.witness) == was
        assert {disk.level for disk in copied.disks.values()} == {"full"}
        assert len(copied.disks) == len(DATA)
        assert (await engine.verify("web")).findings == []
        await untouched(guest.qemu.witness)
    assert digest_file(short / "golden.qcow2") == golden
    assert digest_file(short / "ro.qcow2") == unwritten


async def test_what_is_left_out_stays_out(qemu72: Path, short: Path, store: Path) -> None:
    engine = an_engine(short, store)
    scratch = empty(short / "scratch.qcow2")
    options = [
        *blockdev(disk(short / "d0.qcow2"), "d0", "qcow2", device="vd0"),
        *blockdev(scratch, "s0", "qcow2", device="scratch"),
    ]
    async with booted(qemu72, short, disks=options) as guest:
        machine = Machine("web", guest.qmp, guest.agent)
        await guest.console.run(
            "tr '\\000' x </dev/zero | dd of=/dev/vdb bs=4k count=64 iflag=fullblock", within=20
        )
        before = await guest.console.witness(within=30)
        with pytest.raises(UsageError, match="no disk 'sda'; there are: vd0, scratch"):
            await engine.create(
                machine, Wishes(level=Level.OVERLAY, max_pause=30, exclude=("sda",))
            )
        await engine.create(machine, Wishes(level=Level.OVERLAY, max_pause=30, exclude=("s0",)))
        await engine.create(machine, Wishes(level=Level.OVERLAY, max_pause=30, include=("vd0",)))
        now = await chains(guest.qemu.witness)
        assert (len(now["vd0"]), now["scratch"]) == (3, [str(scratch)])
        for entry, reason in zip(
            await engine.list("web"), ("excluded", "not included"), strict=True
        ):
            left = (await engine.show("web", entry.id)).storage.left_out
            assert [(one.device, one.reason) for one in left] == [("scratch", reason)]
            to = short / f"b{entry.id}"
            async with back(engine, "web", Restoration(to), entry.id) as (_, console):
                assert (await console.witness(within=60)).nonce == before.nonce
                await console.run("echo 3 >/proc/sys/vm/drop_caches", within=20)
                read = "dd if=/dev/vdb bs=4k count=64 2>/dev/null | tr -d '\\000' | wc -c"
                assert (await console.run(read, within=20)).splitlines()[-1].strip() == "0"
        read = "dd if=/dev/vdb bs=4k count=64 2>/dev/null | tr -d '\\000' | wc -c"
        assert (await guest.console.run(read, within=20)).splitlines()[-1].strip() == str(64 * 4096)


async def test_what_cannot_be_frozen_is_refused_by_name(
    qemu72: Path, short: Path, store: Path
) -> None:
    engine = an_engine(short, store)
    logged, log = disk(short / "logged.raw", "raw", "16M"), disk(short / "log.raw", "raw", "16M")
    part = disk(short / "part.raw", "raw", "16M")
    bare = empty(short / "bare.qcow2")
    files = "file.driver=file,file.filename"
    options = [
        *blockdev(disk(short / "d0.qcow2"), "d0", "qcow2", device="vd0"),
        *("-blockdev", f"driver=raw,node-name=logged,{files}={logged}"),
        *("-blockdev", f"driver=raw,node-name=log,{files}={log}"),
        *("-blockdev", "driver=blklogwrites,node-name=strange,file=logged,log=log"),
        *("-device", "virtio-blk-pci,drive=strange,id=odd"),
        *("-blockdev", f"driver=raw,node-name=part,offset=4096,size=8388608,{files}={part}"),
        *("-device", "virtio-blk-pci,drive=part,id=slice"),
        # its header knows nothing of what lies beneath it here
        *("-blockdev", f"driver=qcow2,node-name=under,read-only=on,{files}={disk(short / 'u.q')}"),
        *("-blockdev", f"driver=qcow2,node-name=bare,backing=under,{files}={bare}"),
        *("-device", "virtio-blk-pci,drive=bare,id=grafted"),
    ]
    async with booted(qemu72, short, disks=options) as guest:
        machine = Machine("web", guest.qmp, guest.agent)
        was = await chains(guest.qemu.witness)
        others = ("odd", "slice", "grafted")
        for name, said in (
            ("odd", "disk odd: node strange has driver blklogwrites"),
            ("slice", "disk slice: node part shows only a part of its file"),
            ("grafted", "disk grafted: .*bare.qcow2 names no backing file"),
        ):
            exclude = tuple(other for other in others if other != name)
            with pytest.raises(Blocked, match=said) as refused:
                await engine.create(
                    machine, Wishes(level=Level.OVERLAY, max_pause=30, exclude=exclude)
                )
            assert refused.value.hint == f"-x {name} leaves it out"
        # a job of somebody else's
        mirror = {"job-id": "theirs", "device": "d0", "sync": "full", "speed": 1024}
        mirror |= {"target": str(short / "copy.raw"), "format": "raw"}
        await ask(guest.qemu.witness, "drive-mirror", mirror)
        with pytest.raises(VmBusy, match="mirror theirs"):
            await engine.create(machine, Wishes(level=Level.OVERLAY, max_pause=30, exclude=others))
        assert len(await ask(guest.qemu.witness, "query-jobs")) == 1
        await ask(guest.qemu.witness, "block-job-cancel", {"device": "theirs", "force": True})
        assert await chains(guest.qemu.witness) == was
        assert await status(guest.qemu.witness) == "running"
        assert await engine.list("web") == []
        made = await engine.create(
            machine, Wishes(level=Level.OVERLAY, max_pause=30, exclude=others)
        )
        assert made.state == "paired"


def by_drive(variables: Path) -> list[str]:
    return [
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={FIRMWARE}"),
        *("-drive", f"if=pflash,unit=1,format=raw,file={variables}"),
    ]


def by_blockdev(variables: Path) -> list[str]:
    code = f"driver=raw,node-name=code,read-only=on,file.driver=file,file.filename={FIRMWARE}"
    return [
        *("-blockdev", code, "-machine", "pflash0=code,pflash1=vars"),
        *("-blockdev", f"driver=raw,node-name=vars,file.driver=file,file.filename={variables}"),
    ]


@pytest.mark.parametrize("given", [by_drive, by_blockdev])
async def test_firmware_variables_are_taken_along(
    qemu72: Path, short: Path, store: Path, given: object
) -> None:
    engine = an_engine(short, store)
    variables = short / "vars.fd"
    variables.write_bytes(b"\xff" * (64 << 10))
    assert callable(given)
    options = [
        *blockdev(disk(short / "d0.qcow2"), "d0", "qcow2", device="vd0"),
        *given(variables),
    ]
    async with booted(qemu72, short, disks=options) as guest:
        machine = Machine("web", guest.qmp, guest.agent)
        await write_variable(guest.console, 0x5A)
        before = await guest.console.witness(within=30)
        made = await engine.create(machine, OVERLAY)
        shown = await engine.show("web")
        (flash,) = [one for one in shown.storage.disks if one.role == "pflash"]
        kept = store / "web" / made.id / f"nvram/{flash.label}.raw"
        assert kept.read_bytes() == b"\x5a" + b"\xff" * ((64 << 10) - 1)
        assert kept.name in {Path(one.name).name for one in shown.manifest.files}
        await write_variable(guest.console, 0x33)
        async with back(engine, "web", Restoration(short / "back")) as (_, console):
            assert (await console.witness(within=60)).nonce == before.nonce
            assert await read_variable(console) == 0x5A
            await write_variable(console, 0x77)
            assert await read_variable(console) == 0x77
        assert await read_variable(guest.console) == 0x33
        assert variables.read_bytes()[0] == 0x5A
        assert kept.read_bytes()[0] == 0x5A
        # the next snapshot leaves the last one's as they are
        await engine.create(machine, OVERLAY)
        await agrees(engine, "web", Restoration(short / "second"), before)
        await untouched(guest.qemu.witness)


async def write_variable(console: Console, value: int) -> None:
    """Program the first byte of the flash, as firmware does it (Intel command set)."""
    for word in (0x40, value, 0xFF):
        await console.run(f"devmem {VARIABLES:#x} 8 {word:#x}", within=10)


async def read_variable(console: Console) -> int:
    return int(await console.run(f"devmem {VARIABLES:#x} 8", within=10), 16)
