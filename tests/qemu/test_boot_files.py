"""Kernel and initrd of a direct boot: in the snapshot once, and there when the host has others."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.comparison import Row
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Level, RamChoice, Wishes
from qmpsnap.errors import HalfMissing
from qmpsnap.host import qemu_img
from qmpsnap.store.files import digest_file
from tests.rig.guest import built
from tests.rig.halves import names
from tests.rig.qemu import running

DISKS = Wishes(level=Level.FULL, ram=RamChoice.NONE, max_pause=30)


async def told(engine: Engine, id: str, to: Path) -> dict[str, Row]:
    """What is not well of the files that it is booted from."""
    found = await engine.check("web", Restoration(to, cold=True), id)
    about = [row for row in found.rows if row.what.split()[0] in ("kernel", "initrd")]
    assert len(about) == 2
    return {row.what.split()[0]: row for row in about if row.verdict != "ok"}


@pytest.mark.timeout(200)
async def test_they_come_along(
    qemu72: Path, short: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "qmpsnap.engine.bootfiles")
    kernel, initrd = short / "vmlinuz", short / "initrd.img"
    shutil.copyfile(built() / "vmlinuz", kernel)
    initrd.write_bytes(b"no initrd, and never unpacked" * 100)
    await qemu_img.create(short / "d0.qcow2", 16 << 20)
    engine = Engine(short / "local", store, allow_local_store=True)
    words = [
        *("-M", f"pc,kernel={kernel.name}", "-m", "96", "-nodefaults", "-initrd", str(initrd)),
        *("-drive", f"file={short}/d0.qcow2,if=virtio,id=d0"),
    ]
    async with running(qemu72, *words, directory=short) as vm:
        machine = Machine("web", vm.qmp)
        first = (await engine.create(machine, DISKS)).id
        copies = store / "web/shared"
        was = {path.name: path.stat() for path in copies.iterdir()}
        digests = [digest_file(path)[1] for path in (kernel, initrd)]
        assert sorted(was) == sorted(digests)
        second = (await engine.create(machine, Wishes(level=Level.FULL, max_pause=20))).id
        # packs of RAM lie beside them
        packs = {one.blake3 for one in (await engine.show("web", second)).manifest.packs}
        there = {path.name: path.stat() for path in copies.iterdir()}
        assert {name: it for name, it in there.items() if name not in packs} == was
        assert caplog.messages == []

        # another kernel takes its place, as an upgrade does it
        (short / "new").write_bytes(b"another kernel")
        os.utime(short / "new", (initrd.stat().st_mtime + 60, initrd.stat().st_mtime + 60))
        (short / "new").replace(kernel)
        initrd.unlink()
        third = (await engine.create(machine, DISKS)).id
        assert f"{kernel} was changed after QEMU had read it" in caplog.text
        assert f"{initrd}: No such file" in caplog.text
        assert len(set(names(copies)) - packs) == 3
        await engine.delete(machine, third)
        assert set(names(copies)) == {*digests, *packs}
        await engine.delete(machine, first)
        assert set(names(copies)) == {*digests, *packs}

    # this host has neither any more: the snapshot's own take their place, with the RAM
    to = short / "back"
    found = await told(engine, second, to)
    assert {row.verdict for row in found.values()} == {"differs"}
    assert "another content" in found["kernel"].why
    assert "is missing" in found["initrd"].why
    ready = await engine.prepare_restore("web", Restoration(to), second)
    async with engine.restored(ready) as restored:
        assert restored.shown()["moved"][str(kernel)] == str(to / "vmlinuz")
        assert [digest_file(to / path.name)[1] for path in (kernel, initrd)] == digests
        assert (to / "vmlinuz").stat().st_mode & 0o777 == 0o600
        assert str(to / "vmlinuz") in restored.ready.argv

    # one that is damaged is named before anything starts; and so is one that is gone
    assert (await engine.verify("web", second)).findings == []
    copy = copies / digests[0]
    content = bytearray(copy.read_bytes())
    content[5000] ^= 1
    copy.write_bytes(content)
    assert (await told(engine, second, short / "b2"))["kernel"].verdict == "blocks"
    shutil.copyfile(built() / "vmlinuz", kernel)
    assert "kernel" not in await told(engine, second, short / "b2")
    (finding,) = (await engine.verify("web", second)).findings
    assert finding.where == f"shared/{digests[0]}"
    copy.unlink()
    found = await told(engine, second, short / "b2")
    assert found["kernel"].verdict == "differs"
    assert f"{copy}: is missing" in found["kernel"].why
    (copies / digests[1]).unlink()
    with pytest.raises(HalfMissing, match=r"initrd\.img is missing, and"):
        await engine.prepare_restore("web", Restoration(short / "b2"), second)
    assert not (short / "b2").exists()
