"""Machines whose RAM is the snapshot's page images, beside their originals, page by page."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from qmpsnap.hypervisor.machine.attach import facts
from qmpsnap.hypervisor.machine.launch import launched
from qmpsnap.hypervisor.machine.mapping import mapped
from qmpsnap.hypervisor.machine.relocate import relocate
from qmpsnap.hypervisor.monitor import Monitor, connect
from qmpsnap.hypervisor.vmstate.split import split
from tests.qemu.test_machine_relocate import migrated, saved
from tests.rig.qemu import VERSIONS, binary, running

MIB = 1 << 20
# counts at 0x7e00, and writes the number all over the 64 KiB from 0x20000 on, for ever
COUNTER = bytes.fromhex(
    "31c0 8ed8 b80020 8ec0"  # xor ax,ax; mov ds,ax; mov ax,0x2000; mov es,ax
    "ff06007e a1007e 89c7 83e7fe 268905 ebef"  # inc [0x7e00]; mov [es:counter&~1],counter; loop
)
BIOS = ["-nodefaults", "-drive", "file=boot,format=raw,if=virtio,readonly=on"]
NOISE = "-device loader,file=noise,force-raw=on,addr="
# by machine: its options, and its RAM as the guest sees it: address and bytes of each part
MACHINES = {
    "as by default, in files": (
        f"-M pc -m 24 -mem-path . -mem-prealloc {NOISE}{8 * MIB:#x}",
        [(0, 24 * MIB)],
    ),
    "a backend, bound and preallocated": (
        "-M q35,memory-backend=m0 -m 24 "
        "-object memory-backend-ram,id=m0,size=24M,prealloc=on,host-nodes=0,policy=bind,merge=off "
        f"{NOISE}{8 * MIB:#x}",
        [(0, 24 * MIB)],
    ),
    "shared, of an old type": (
        "-M OLD,memory-backend=m0 -m 24 -object memory-backend-memfd,id=m0,size=24M,share=on "
        f"{NOISE}{8 * MIB:#x}",
        [(0, 24 * MIB)],
    ),
    "two nodes and a module": (
        "-M q35 -m 48M,slots=1,maxmem=128M -object memory-backend-ram,id=m0,size=24M "
        '-object {"qom-type":"memory-backend-memfd","id":"m1","size":25165824} '
        "-numa node,memdev=m0 -numa node,memdev=m1 -object memory-backend-ram,id=d0,size=24M "
        f"-device pc-dimm,memdev=d0,id=dimm0 {NOISE}{30 * MIB:#x} {NOISE}{1 << 32:#x}",
        [(0, 48 * MIB), (1 << 32, 24 * MIB)],
    ),
}
OLD = {"7.2": "pc-i440fx-3.1", "10.0": "pc-i440fx-3.1"}  # later ones have none of those


async def counted(monitor: Monitor) -> int:
    said = await monitor.execute("human-monitor-command", {"command-line": "xp /1hx 0x7e00"})
    return int(str(said).split()[-1], 16)


async def counts_on(monitor: Monitor, than: int) -> None:
    async with asyncio.timeout(30):
        while await counted(monitor) == than:  # noqa: ASYNC110 - a guest tells nobody
            await asyncio.sleep(0.02)


async def seen(monitor: Monitor, parts: list[tuple[int, int]], to: Path) -> list[bytes]:
    """All of the guest's RAM as its processor would read it."""
    found = []
    for address, size in parts:
        asked = {"val": address, "size": size, "filename": str(to)}
        await monitor.execute("pmemsave", asked)
        found.append(await asyncio.to_thread(to.read_bytes))
        await asyncio.to_thread(to.unlink)
    return found


def access(pid: int, path: Path) -> set[int]:
    """How the process *pid* has *path* open."""
    modes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if link.readlink() == path:
            told = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text()
            flags = next(row for row in told.splitlines() if row.startswith("flags:"))
            modes.add(int(flags.split()[1], 8) & os.O_ACCMODE)
    return modes


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("version", VERSIONS)
async def test_a_mapped_machine_has_every_page_and_writes_to_none(version, machine, tmp_path):
    text, parts = MACHINES[machine]
    old, new = tmp_path / "old", tmp_path / "new"
    (tmp_path / "apart").mkdir()
    old.mkdir()
    new.mkdir()
    sector = COUNTER.ljust(510, b"\0") + b"\x55\xaa"
    (old / "boot").write_bytes(sector.ljust(MIB, b"\0"))
    (old / "noise").write_bytes(os.urandom(2 * MIB))
    words = [*text.replace("OLD", OLD.get(version, "pc")).split(" "), *BIOS]
    stream = tmp_path / "stream"
    async with running(binary(version), *words, directory=old) as vm, connect(vm.qmp) as monitor:
        await counts_on(monitor, 0)
        await monitor.execute("stop")
        await saved(monitor, stream)
        was, count = await seen(monitor, parts, tmp_path / "ram"), await counted(monitor)
        line = facts(vm.argv, old).line
        type_ = await monitor.execute("qom-get", {"path": "/machine", "property": "type"})
    with stream.open("rb") as source:
        apart = split(source.fileno(), tmp_path / "apart")
    images = {one.block: (one.path, one.bytes) for one in apart.images}
    digests = {path: hashlib.sha256(path.read_bytes()).digest() for path, _ in images.values()}
    moved = relocate(
        line, cwd=old, into=new, machine_type=str(type_).removesuffix("-machine"), disks={},
        incoming=True, paused=True, qmp=new / "q",
    )  # fmt: skip
    found = mapped(moved.cmdline, images, version=version)
    assert found.left == {}
    assert found.blocks == {name: path for name, (path, _) in images.items()}
    assert len(images) == (3 if "pc-dimm" in text else 1)
    async with (
        launched(found.cmdline.argv(), directory=new, log=tmp_path / "log") as twin,
        connect(twin.qmp) as monitor,
    ):
        assert (
            await migrated(monitor, "migrate-incoming", f"exec:cat {apart.stream}") == "completed"
        )
        assert await seen(monitor, parts, tmp_path / "ram") == was
        reading = os.O_RDWR if version == "7.2" else os.O_RDONLY
        assert all(access(twin.pid, path) == {reading} for path in digests)
        await monitor.execute("cont")
        await counts_on(monitor, count)
        await monitor.execute("stop")
        assert await seen(monitor, parts, tmp_path / "ram") != was
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in digests} == digests
