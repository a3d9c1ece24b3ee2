"""What is outside of QEMU: named before the guest is touched, and left out of a boot."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Level, RamChoice, Wishes
from qmpsnap.errors import Blocked
from qmpsnap.host import qemu_img
from tests.rig.graph import status
from tests.rig.qemu import binary, running

DISKS = Wishes(level=Level.FULL, ram=RamChoice.NONE, max_pause=30)
_VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
_SHARED = ["-object", "memory-backend-memfd,id=m,size=64M,share=on", "-M", "pc,memory-backend=m"]


@contextmanager
def beside(socket: Path, *words: str) -> Iterator[None]:
    """A process that listens at *socket*."""
    process = subprocess.Popen(["setpriv", "--pdeathsig=KILL", *words], stderr=subprocess.DEVNULL)
    try:
        while not socket.exists():
            assert process.poll() is None
            time.sleep(0.005)
        yield
    finally:
        process.kill()
        process.wait()


def a_disk(image: Path, socket: Path) -> list[str]:
    return [
        *("qemu-storage-daemon", "--blockdev", f"file,node-name=f,filename={image}"),
        "--export",
        f"vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket},writable=on",
    ]


def a_folder(folder: Path, socket: Path) -> list[str]:
    how = ("-o", f"source={folder}", "-o", "sandbox=chroot")
    return [str(_VIRTIOFSD), f"--socket-path={socket}", *how]


@pytest.mark.timeout(200)
@pytest.mark.skipif(not _VIRTIOFSD.exists(), reason="needs the virtiofsd of Debian's QEMU 7.2")
@pytest.mark.parametrize("version", ["7.2", "11.1"])
async def test_another_process_is_named(version: str, short: Path, store: Path) -> None:
    qemu = binary(version)
    (short / "share").mkdir()
    (short / "other.raw").write_bytes(bytes(1 << 20))
    await qemu_img.create(short / "d0.qcow2", 16 << 20)
    words = [
        *("-m", "64", "-nodefaults", *_SHARED),
        *("-drive", f"file={short}/d0.qcow2,if=virtio,id=d0"),
        *("-chardev", f"socket,id=c0,path={short}/blk.sock"),
        *("-device", "vhost-user-blk-pci,chardev=c0,id=blk"),
        *("-chardev", f"socket,id=c1,path={short}/fs.sock"),
        *("-device", "vhost-user-fs-pci,chardev=c1,tag=x,id=fs"),
    ]
    engine = Engine(short / "local", store, allow_local_store=True)
    with (
        beside(short / "blk.sock", *a_disk(short / "other.raw", short / "blk.sock")),
        beside(short / "fs.sock", *a_folder(short / "share", short / "fs.sock")),
    ):
        async with running(qemu, *words, directory=short) as vm:
            machine = Machine("web", vm.qmp)
            for ram in (RamChoice.AUTO, RamChoice.PAUSED, RamChoice.BACKGROUND):
                with pytest.raises(Blocked) as refused:
                    await engine.create(machine, Wishes(level=Level.FULL, ram=ram, max_pause=20))
                assert "device blk: vhost-user-blk-pci" in str(refused.value)
                assert "device fs: vhost-user-fs-pci" in str(refused.value)
                assert "--ram none" in refused.value.hint
            assert not list((short / "local/web").glob("2*"))
            info = await engine.info(machine)
            named = " ".join(one.why for one in info.blockers if one.of == "ram")
            assert "device blk" in named
            assert "device fs" in named
            made = await engine.create(machine, DISKS)
            assert await status(vm.witness) == "running"
    kept = (await engine.show("web", made.id)).storage.left_out
    told = {one.device: one.reason for one in kept}
    assert told["blk"] == "vhost-user-blk-pci: its data is in another process"
    assert told["fs"] == "vhost-user-fs-pci: a folder of the host"
    ready = await engine.prepare_restore("web", Restoration(short / "back", cold=True), made.id)
    notices = [one for one in ready.notices if "of the original's host" in one]
    assert [one.split(":")[0] for one in notices] == ["device blk", "device fs"]
    async with engine.restored(ready) as restored:
        assert await status(restored.machine.socket) == "running"


@pytest.mark.timeout(200)
async def test_an_nvme_disk(qemu: Path, short: Path, store: Path) -> None:
    """Its state can be saved by the newest QEMU only; its data by all."""
    await qemu_img.create(short / "d0.qcow2", 16 << 20)
    words = [
        *("-M", "pc", "-m", "64", "-nodefaults"),
        *("-blockdev", f"qcow2,node-name=d0,file.driver=file,file.filename={short}/d0.qcow2"),
        *("-device", "nvme,drive=d0,serial=1,id=nv0"),
    ]
    engine = Engine(short / "local", store, allow_local_store=True)
    newest = qemu == binary("11.1")
    async with running(qemu, *words, directory=short) as vm:
        machine = Machine("web", vm.qmp)
        wishes = Wishes(level=Level.FULL, max_pause=20)
        if newest:
            made = await engine.create(machine, wishes)
        else:
            with pytest.raises(
                Blocked, match=r"cannot save its state: non-migratable device.*nvme"
            ):
                await engine.create(machine, wishes)
            assert await status(vm.witness) == "running"
            made = await engine.create(machine, DISKS)
    wish = Restoration(short / "back", cold=not newest)
    ready = await engine.prepare_restore("web", wish, made.id)
    async with engine.restored(ready) as restored:
        assert await status(restored.machine.socket) == "running"
