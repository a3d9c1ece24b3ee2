import asyncio
import json
import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

from qmpsnap.errors import LocalFailed
from qmpsnap.host import qemu_img
from tests.rig.halves import names

SIZE = 8 << 20
pytestmark = pytest.mark.skipif(
    not shutil.which("qemu-img") and not os.environ.get("CI"), reason="needs qemu-img"
)


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base, with: blank.raw"
    path.write_bytes(os.urandom(1 << 20) + bytes(SIZE - (1 << 20)))
    return path


async def test_overlay_and_chain(base, tmp_path):
    top = tmp_path / "top.qcow2"
    await qemu_img.create_overlay(top, base, "raw", SIZE)
    assert stat.S_IMODE(top.stat().st_mode) == 0o600
    images = await qemu_img.chain(top, "qcow2")
    assert [image.filename for image in images] == [str(top), str(base)]
    assert [image.format for image in images] == ["qcow2", "raw"]
    assert images[0].backing_as_written == str(base)
    assert images[0].backing_format == "raw"
    assert images[0].virtual_size_bytes == SIZE
    assert not images[0].corrupt
    assert images[0].bitmaps == []


async def test_an_overlay_over_nothing_or_over_something(base, tmp_path):
    with pytest.raises(LocalFailed, match="does not exist"):
        await qemu_img.create_overlay(tmp_path / "top", tmp_path / "none", "raw", SIZE)
    with pytest.raises(LocalFailed, match="exists"):
        await qemu_img.create_overlay(base, base, "raw", SIZE)
    assert names(tmp_path) == [base.name]
    assert base.stat().st_size == SIZE


async def test_a_format_is_said_or_asked_for(base, tmp_path):
    top = tmp_path / "top.qcow2"
    await qemu_img.create_overlay(top, base, "raw", SIZE)
    assert (await qemu_img.info(top, "raw")).format == "raw"
    assert (await qemu_img.info(top, probe_format=True)).format == "qcow2"
    with pytest.raises(ValueError, match="format"):
        await qemu_img.info(top)


async def test_a_chain_that_would_have_to_be_guessed(base, tmp_path):
    top = tmp_path / "top.qcow2"
    await qemu_img.create_overlay(top, base, "raw", SIZE)
    # the header extension 0xE2792ACA holds the backing format: another number hides it
    content = top.read_bytes()
    assert content.count(b"\xe2\x79\x2a\xca") == 1
    top.write_bytes(content.replace(b"\xe2\x79\x2a\xca", b"\xe2\x79\x2a\xcb"))
    with pytest.raises(LocalFailed, match="does not say the format"):
        await qemu_img.chain(top, "qcow2")


async def test_convert_and_check(base, tmp_path):
    heard: list[float] = []
    copy = tmp_path / "copy.qcow2"
    await qemu_img.convert(base, "raw", copy, "qcow2", heard.append)
    assert heard[-1] == 1.0
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert await qemu_img.check(copy, "qcow2") == qemu_img.Health()
    assert (await qemu_img.check(base, "raw")).corruptions is None
    await qemu_img.convert(copy, "qcow2", tmp_path / "back.raw", "raw")
    assert (tmp_path / "back.raw").read_bytes() == base.read_bytes()
    with pytest.raises(LocalFailed, match="exists"):
        await qemu_img.convert(base, "raw", copy, "qcow2")


async def test_a_corrupt_image(base, tmp_path):
    copy = tmp_path / "copy.qcow2"
    await qemu_img.convert(base, "raw", copy, "qcow2")
    with copy.open("r+b") as file:
        file.seek(0x20000)  # the refcount block of a fresh image
        file.write(bytes(4096))
    health = await qemu_img.check(copy, "qcow2")
    assert health.corruptions


async def test_what_fails_says_why_and_leaves_nothing(tmp_path):
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    with pytest.raises(LocalFailed, match=r"qemu-img convert: .*not in qcow2 format"):
        await qemu_img.convert(tmp_path / "junk", "qcow2", tmp_path / "new", "raw")
    assert names(tmp_path) == ["junk"]
    with pytest.raises(LocalFailed, match="no-such-binary") as failed:
        await qemu_img.info(tmp_path / "junk", "raw", binary="no-such-binary")
    assert "qemu-utils" in failed.value.hint


async def test_commit(base, tmp_path):
    top, written = tmp_path / "top.qcow2", tmp_path / "written.raw"
    written.write_bytes(b"z" * SIZE)
    await qemu_img.convert(written, "raw", top, "qcow2")
    rebase = ["rebase", "-u", "-b", str(base), "-F", "raw", "-f", "qcow2", str(top)]
    process = await asyncio.create_subprocess_exec("qemu-img", *rebase)
    assert await process.wait() == 0
    await qemu_img.commit(top, "qcow2")
    assert base.read_bytes() == b"z" * SIZE


async def test_cancelled_in_the_middle(tmp_path):
    os.mkfifo(tmp_path / "started")
    stuck = tmp_path / "stuck"
    stuck.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/started\nexec cat /dev/zero >/dev/null\n")
    stuck.chmod(0o700)
    work = qemu_img.convert(tmp_path, "raw", tmp_path / "new", "raw", binary=str(stuck))
    task = asyncio.create_task(work)
    pid = int(await asyncio.to_thread((tmp_path / "started").read_text))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert names(tmp_path) == ["started", "stuck"]


def qemu(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def bits(image):
    """The names of the bitmaps, and whether one is marked as in use."""
    told = json.loads(qemu("qemu-img", "info", "-U", "--output=json", image))
    found = told["format-specific"]["data"].get("bitmaps", [])
    return {one["name"] for one in found}, any("in-use" in one["flags"] for one in found)


@pytest.fixture
def marked(tmp_path):
    """A qcow2 of the guest's own with two bitmaps, one of an awkward name."""
    path = tmp_path / "marked.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE))
    for name in ("qmpsnap:vm:vda:20261122T165057123Z", "--a b, c"):
        qemu("qemu-img", "bitmap", "--add", "-f", "qcow2", "--", path, name)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 1M 1M", path)
    return path


async def test_bitmaps_are_stripped_and_the_bytes_stay(marked):
    assert bits(marked) == ({"qmpsnap:vm:vda:20261122T165057123Z", "--a b, c"}, False)
    assert len(await qemu_img.strip_bitmaps(marked)) == 2
    assert bits(marked) == (set(), False)
    assert await qemu_img.check(marked, "qcow2") == qemu_img.Health()
    assert "Pattern verification failed" not in qemu(
        "qemu-io", "-f", "qcow2", "-r", "-c", "read -q -P 7 1M 1M", marked
    )
    assert await qemu_img.strip_bitmaps(marked) == []


async def test_bitmaps_that_were_in_use_are_stripped_from_the_copy_and_not_from_the_image(marked):
    copy = marked.with_name("copy")
    user = await asyncio.create_subprocess_exec(
        "qemu-io", "-f", "qcow2", marked, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert user.stdin is not None
    assert user.stdout is not None
    user.stdin.write(b"write 3M 64k\nflush\nmap\n")
    await user.stdin.drain()
    while b"bytes" not in await user.stdout.readline():
        pass
    shutil.copyfile(marked, copy)
    with pytest.raises(LocalFailed, match="another process using the image"):
        await qemu_img.strip_bitmaps(marked)
    user.kill()
    await user.wait()
    assert bits(copy)[1]
    assert len(await qemu_img.strip_bitmaps(copy)) == 2
    assert bits(copy) == (set(), False)
    assert await qemu_img.check(copy, "qcow2") == qemu_img.Health()
    assert len(bits(marked)[0]) == 2


async def test_convert_compressed_and_paced(tmp_path):
    plain = tmp_path / "plain.raw"
    plain.write_bytes(b"words " * (SIZE // 6) + bytes(SIZE % 6))
    await qemu_img.convert(plain, "raw", tmp_path / "small", "qcow2", compress=True)
    assert (tmp_path / "small").stat().st_size < SIZE / 8
    begun = time.monotonic()
    await qemu_img.convert(plain, "raw", tmp_path / "slow", "qcow2", rate=SIZE)
    assert time.monotonic() - begun > 0.5
    assert await qemu_img.same(tmp_path / "small", tmp_path / "slow", "qcow2")


async def test_convert_the_top_layer_only_and_put_it_on_another_file(base, tmp_path):
    top, twin = tmp_path / "top.qcow2", tmp_path / "twin.raw"
    await qemu_img.create_overlay(top, base, "raw", SIZE)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 1M 64k", top)
    (tmp_path / "vm").mkdir()
    copy = tmp_path / "vm/copy.qcow2"
    await qemu_img.convert(
        top, "qcow2", copy, "qcow2", compress=True, backing=(f"../{base.name}", "raw")
    )
    header = await qemu_img.info(copy, "qcow2")
    assert (header.backing_as_written, header.backing_format) == (f"../{base.name}", "raw")
    assert copy.stat().st_size < 512 << 10  # base has 1 MiB of noise
    assert await qemu_img.same(top, copy, "qcow2")
    shutil.copyfile(base, twin)
    qemu("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "../twin.raw", "-F", "raw", copy)
    assert [Path(one.filename).name for one in await qemu_img.chain(copy, "qcow2")] == [
        "copy.qcow2",
        "twin.raw",
    ]
    assert await qemu_img.same(top, copy, "qcow2")


async def test_rebased_an_image_reads_as_before(base, tmp_path):
    middle, top = tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    await qemu_img.create_overlay(middle, base, "raw", SIZE)
    write = ["qemu-io", "-c", "write -P 7 512k 1M", "-c", "write -z 0 64k", str(middle)]
    process = await asyncio.create_subprocess_exec(*write, stdout=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0
    await qemu_img.create_overlay(top, middle, "qcow2", SIZE)
    empty = tmp_path / "empty.qcow2"
    await qemu_img.create_overlay(empty, base, "raw", SIZE)
    assert await qemu_img.same(top, middle, "qcow2")
    assert not await qemu_img.same(top, empty, "qcow2")
    heard: list[float] = []
    await qemu_img.rebase(top, f"./{base.name}", "raw", heard.append)
    assert heard[-1] == 1.0
    assert (await qemu_img.info(top, "qcow2")).backing_as_written == f"./{base.name}"
    assert await qemu_img.same(top, middle, "qcow2")
    assert await qemu_img.check(top, "qcow2") == qemu_img.Health()
    with pytest.raises(LocalFailed, match="qemu-img compare"):
        await qemu_img.same(top, tmp_path / "none", "qcow2")
