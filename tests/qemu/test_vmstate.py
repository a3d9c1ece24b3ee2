"""Streams of real machines are taken apart to the pages they have, and load when joined again."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from qmpsnap.hypervisor.monitor import Monitor, connect
from qmpsnap.hypervisor.vmstate import migration, sections
from qmpsnap.hypervisor.vmstate.join import join
from qmpsnap.hypervisor.vmstate.split import Split, split
from qmpsnap.hypervisor.vmstate.stream import Contents, examine
from tests.qemu.test_machine_relocate import migrated, saved
from tests.qemu.test_mapping import COUNTER, MIB, counted, counts_on, seen
from tests.rig.qemu import VERSIONS, binary, running

MEMORY = 64 * MIB
PARTS = [(0, 640 << 10), (MIB, MEMORY - MIB)]  # a PC has its screen and its ROMs between them
LINE = (
    "-M q35 -m 64 -smp 2 -nodefaults -boot strict=on -vga std -serial null -serial null "
    "-drive file=boot,format=raw,if=none,id=b0,readonly=on "
    "-device virtio-blk-pci,drive=b0,bootindex=0 "
    "-netdev user,id=n0 -device virtio-net-pci,netdev=n0,romfile= -netdev user,id=n1 "
    "-device e1000,netdev=n1,romfile= -device virtio-scsi-pci,id=s0 "
    "-blockdev driver=null-co,node-name=d0,size=1048576,read-zeroes=on "
    "-device scsi-hd,drive=d0,bus=s0.0 -device qemu-xhci -device usb-tablet "
    "-device loader,file=noise,force-raw=on,addr=0x800000"
)
# what must be among the sections, by how its name ends, and how many of it
DEVICES = {
    "/virtio-net": 1, "/virtio-blk": 1, "/virtio-scsi": 1, "/xhci": 1, "/usb-ptr": 1, "/e1000": 1,
    "/vga": 1, "serial": 2, "slirp": 2, "timer": 1, "cpu": 2, "fw_cfg": 1,
}  # fmt: skip


def _apart(stream: Path) -> Split:
    folder = stream.with_name(f"{stream.name} apart")
    folder.mkdir()
    with stream.open("rb") as source:
        return split(source.fileno(), folder)


def _joined(parts: Split, to: Path) -> Contents:
    with to.open("xb+") as file:
        join(parts.stream, {image.block: image.path for image in parts.images}, file.fileno())
        return examine(file.fileno())


def _same(parts: Split, ram: list[bytes]) -> None:
    (image,) = parts.images
    assert (image.block, image.bytes) == ("pc.ram", MEMORY)
    whole = image.path.read_bytes()
    for (start, size), part in zip(PARTS, ram, strict=True):
        assert whole[start : start + size] == part
    noise = (image.path.parent.parent / "noise").stat().st_size
    assert noise >> 12 < image.stored_pages < MEMORY >> 13
    assert image.path.stat().st_blocks * 512 <= image.stored_pages * 4096 + MIB


def _alike(one: Contents, other: Contents) -> None:
    assert (one.machine, one.ended) == (other.machine, other.ended)
    assert [(block.name, block.bytes, block.stored_pages) for block in one.blocks] == [
        (block.name, block.bytes, block.stored_pages) for block in other.blocks
    ]
    assert one.sections == other.sections


async def _taken(monitor: Monitor, stream: Path) -> Split:
    await saved(monitor, stream)
    return await asyncio.to_thread(_apart, stream)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_machine_is_its_pages_and_its_devices(version: str, tmp_path: Path) -> None:
    (tmp_path / "boot").write_bytes((COUNTER.ljust(510, b"\0") + b"\x55\xaa").ljust(MIB, b"\0"))
    (tmp_path / "noise").write_bytes(os.urandom(2 * MIB))
    taken: dict[str, tuple[Split, list[bytes] | None]] = {}
    ram, qemu = tmp_path / "ram", binary(version)
    async with running(qemu, *LINE.split(), directory=tmp_path) as vm, connect(vm.qmp) as monitor:
        await counts_on(monitor, 0)
        if version != "7.2":  # which cannot be asked to end it, when it is not there
            async with migration.tuned(monitor, {"background-snapshot"}, {}):
                taken["background"] = await _taken(monitor, tmp_path / "background"), None
        # the guest writes on: some of its pages are there several times
        live = await _taken(monitor, tmp_path / "live")
        taken["live"] = live, await seen(monitor, PARTS, ram)
        await monitor.execute("cont")
        await monitor.execute("stop")
        paused = await _taken(monitor, tmp_path / "paused")
        taken["paused"] = paused, await seen(monitor, PARTS, ram)
    for mode, (parts, was) in taken.items():
        if was is not None:
            _same(parts, was)
        contents = parts.contents
        assert contents.ended == (mode != "background")
        assert contents.bytes == (tmp_path / mode).stat().st_size
        names = [section.name for section in contents.sections]
        assert {end: sum(name.endswith(end) for name in names) for end in DEVICES} == DEVICES
        # before 8.2 all user networks had the same number
        numbers = {"slirp": {0} if version == "7.2" else {0, 1}, "serial": {0, 1}}
        for name, expected in numbers.items():
            assert {one.instance for one in contents.sections if one.name == name} == expected
            assert sections.numbers(tmp_path / mode, name) == expected
        joined = tmp_path / f"{mode} joined"
        _alike(await asyncio.to_thread(_joined, parts, joined), contents)
        if mode == "live":
            continue  # as the paused one
        waits = [*LINE.split(), "-incoming", "defer", "-S"]
        home = tmp_path / f"{mode} twin"
        home.mkdir()
        for name in ("boot", "noise"):
            (home / name).symlink_to(tmp_path / name)
        async with running(qemu, *waits, directory=home) as vm, connect(vm.qmp) as monitor:
            said = await migrated(monitor, "migrate-incoming", f"exec:cat '{joined}'")
            assert said == "completed", vm.log.read_text()
            _same(parts, await seen(monitor, PARTS, ram))
            await monitor.execute("cont")
            await counts_on(monitor, await counted(monitor))
