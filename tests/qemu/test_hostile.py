"""What a guest has written into its own disk, or somebody into an image, leads nowhere else."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Level, RamChoice, Wishes
from qmpsnap.errors import BaseChanged
from qmpsnap.host import qemu_img
from tests.faults.bench import options
from tests.rig.qemu import running

SECRET = b"what only the host may read\n"
WISHES = Wishes(level=Level.FULL, ram=RamChoice.NONE, max_pause=20)
AGAIN = Wishes(level=Level.OVERLAY, ram=RamChoice.PAUSED, max_pause=20)


def _leading_to(secret: Path, at: Path) -> bytes:
    """The header of a qcow2 image that stands on the host's file *secret*."""
    _ran("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", secret, "-F", "raw", at, "16M")
    return at.read_bytes()


def _open(root: Path) -> list[Path]:
    """What others may touch."""
    private = {True: 0o700, False: 0o600}
    found = root.rglob("*")
    return [one for one in found if stat.S_IMODE(one.lstat().st_mode) != private[one.is_dir()]]


def _ran(*words: str | Path) -> None:
    subprocess.run(words, check=True)


async def test_no_image_leads_to_another_file_of_the_host(
    qemu72: Path, short: Path, store: Path
) -> None:
    secret = short / "secret"
    secret.write_bytes(SECRET * 4096)
    header = _leading_to(secret, short / "bait")
    engine = Engine(short / "local", store, allow_local_store=True)
    line, disks = options(short)
    with disks[1].open("r+b") as raw:
        raw.write(header)  # as a guest may that owns a raw disk
    async with running(qemu72, *line, directory=short) as process:
        before_us = os.umask(0)
        try:
            made = await engine.create(Machine("vm", process.qmp), WISHES)
            again = await engine.create(Machine("vm", process.qmp), AGAIN)
        finally:
            os.umask(before_us)
    assert {again.state, made.state} == {"paired"}
    # with a umask of 0 as with any other nobody else sees anything
    assert _open(short / "local") == _open(store) == []
    assert (await engine.verify("vm", made.id)).findings == []

    # copied, exported and restored as what it is: bytes
    async with engine.exported("vm", "vd1", made.id) as served:
        read = ["qemu-img", "convert", "-f", "raw", "-O", "raw", served.shown.uri, short / "read"]
        _ran(*read)
    assert (short / "read").read_bytes().startswith(header)
    assert SECRET not in (short / "read").read_bytes()
    wish = Restoration(short / "back", cold=True)
    ready = await engine.prepare_restore("vm", wish, made.id)
    for overlay in (short / "back").rglob("*.qcow2"):
        chain = await qemu_img.chain(overlay, "qcow2")
        assert all(str(secret) not in (one.backing_as_written or "") for one in chain)
    assert str(secret) not in " ".join(ready.argv)

    # and an image of ours that was made to stand on it is not opened
    (image,) = (short / "local/vm" / made.id).glob("vd0.*")
    before = image.stat()
    _ran("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", secret, "-F", "raw", image)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BaseChanged, match="vd0"):
        await engine.prepare_restore("vm", Restoration(short / "again", cold=True), made.id)
    with pytest.raises(BaseChanged, match="vd0"):
        async with engine.exported("vm", "vd0", made.id):
            pytest.fail("served")
    findings = (await engine.verify("vm", made.id)).findings
    assert any(str(image) in f"{one.where} {one.what}" for one in findings)

    # nor one that is a link to it now
    image.unlink()
    image.symlink_to(secret)
    with pytest.raises(BaseChanged, match="vd0"):
        await engine.prepare_restore("vm", Restoration(short / "again", cold=True), made.id)
    assert not (short / "again").exists()
