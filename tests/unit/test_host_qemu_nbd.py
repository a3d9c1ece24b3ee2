"""qemu-nbd for the length of a block: what is read is what is there, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qmpsnap.errors import LocalFailed
from qmpsnap.host.qemu_nbd import serving
from qmpsnap.hypervisor.nbd.client import Reader, opened
from tests.rig.qemu import ROOT

MIB = 1 << 20


def image(folder: Path, content: bytes, format: str = "qcow2") -> Path:
    """*content* beneath an empty overlay, or as it is when raw."""
    raw = folder / "content,raw"
    raw.write_bytes(content)
    if format == "raw":
        return raw
    path = folder / "over,lay.qcow2"
    made = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", path]
    subprocess.run(made, check=True)
    return path


def run(*command: object) -> str:
    """What *command* complains of, if it fails."""
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    return ran.stderr if ran.returncode else ""


def noise(size: int) -> bytes:
    return random.Random(1).randbytes(size)


@pytest.mark.parametrize("format", ["qcow2", "raw"])
async def test_all_of_it_is_read_back(format: str, short: Path) -> None:
    content = noise(40 * MIB)
    path, at = image(short, content, format), short / "nbd"
    async with serving(path, format, at, name="it"):
        assert stat.S_IMODE(at.stat().st_mode) == 0o600
        async with opened(at, "it") as client:
            assert client.size == len(content)
            assert await client.read(MIB - 7, 30 * MIB) == content[MIB - 7 : 31 * MIB - 7]
        # as fast as it goes, from several clients
        readers = [asyncio.to_thread(_read, at, len(content)) for _ in range(3)]
        assert await asyncio.gather(*readers) == [content] * 3
        copied = short / "copy"
        command = ["nbdcopy", f"nbd+unix:///it?socket={at}", str(copied)]
        copying = await asyncio.create_subprocess_exec(*command)
        assert await copying.wait() == 0
        assert copied.read_bytes() == content
    assert not at.exists()
    assert _servers(at) == []


def _read(at: Path, size: int) -> bytes:
    with Reader(at, "it") as reader:
        return reader.read(0, size)


async def test_extents_tell_what_is_allocated(short: Path) -> None:
    path, at = short / "thin.qcow2", short / "nbd"
    assert not run("qemu-img", "create", "-q", "-f", "qcow2", path, "8G")
    assert not run("qemu-io", "-f", "qcow2", "-c", "write 3M 1M", "-c", "write 7G 64k", path)
    async with serving(path, "qcow2", at), opened(at, "", "base:allocation") as client:
        found = [one for one in await client.extents("base:allocation") if not one.flags & 1]
    assert [(one.start, one.length) for one in found] == [(3 * MIB, MIB), (7 << 30, 65536)]


async def test_no_lock_is_taken_from_a_vm(short: Path) -> None:
    """The file stays writable for a QEMU, and may be open in one for writing."""
    path, at = short / "disk.qcow2", short / "nbd"
    assert not run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    write = ["qemu-io", "-f", "qcow2", "-c", "write 0 64k", path]
    async with serving(path, "qcow2", at):
        assert not run(*write)
    async with serving(path, "qcow2", at, force_share=False):
        assert "lock" in run(*write)


async def test_what_qemu_nbd_says_is_told(short: Path) -> None:
    path, at = short / "no.qcow2", short / "nbd"
    path.write_bytes(bytes(MIB))
    with pytest.raises(LocalFailed, match="not in qcow2 format"):
        async with serving(path, "qcow2", at):
            pass
    with pytest.raises(LocalFailed, match="No such file"):
        async with serving(short / "none", "raw", at):
            pass
    with pytest.raises(LocalFailed, match="is missing"):
        async with serving(path, "raw", at, binary="qemu-nbd-of-nowhere"):
            pass
    with pytest.raises(LocalFailed, match="nowhere/nbd"):
        async with serving(path, "raw", short / "nowhere/nbd"):
            pass
    assert not at.exists()


async def test_a_socket_of_somebody_else_stays(short: Path) -> None:
    path, at = image(short, bytes(MIB), "raw"), short / "nbd"
    async with serving(path, "raw", at):
        with pytest.raises(LocalFailed, match="listens there already"):
            async with serving(path, "raw", at):
                pass
        async with opened(at, "") as client:
            assert client.size == MIB
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(at))
    async with serving(path, "raw", at), opened(at, "") as client:
        assert client.size == MIB
    at.write_text("precious")
    with pytest.raises(LocalFailed, match="is no socket"):
        async with serving(path, "raw", at):
            pass
    assert at.read_text() == "precious"


async def test_its_end_is_noticed(short: Path) -> None:
    path, at = image(short, bytes(MIB), "raw"), short / "nbd"
    async with serving(path, "raw", at) as server:
        (pid,) = _servers(at)
        os.kill(pid, signal.SIGKILL)
        assert "code -9" in await asyncio.wait_for(server.ended(), 10)
    assert not at.exists()


async def test_cancelled_at_any_moment_it_leaves_nothing(short: Path) -> None:
    path, at = image(short, bytes(MIB), "raw"), short / "nbd"

    async def serve() -> None:
        async with serving(path, "raw", at):
            await asyncio.Event().wait()

    for turns in (1, 2, 5, 10, 40):
        task = asyncio.create_task(serve())
        for _ in range(turns):
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert _servers(at) == []
        assert not at.exists()


_OWNER = """
import asyncio, sys
from pathlib import Path
from qmpsnap.host.qemu_nbd import serving

async def main():
    path, at, binary = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    async with serving(path, "raw", at, binary=binary):
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


_DEAF = """
import os, signal, sys

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.execvp("qemu-nbd", ["qemu-nbd", *sys.argv[1:]])
"""


@pytest.mark.parametrize("deaf", [False, True])
async def test_it_ends_with_us_however_we_end(short: Path, deaf: bool) -> None:
    """One that is *deaf* stands for one that just begins: it forgets a SIGTERM of then."""
    path, at, binary = image(short, bytes(MIB), "raw"), short / "nbd", "qemu-nbd"
    if deaf:
        (short / "deaf").write_text(f"#!{sys.executable}\n{_DEAF}")
        (short / "deaf").chmod(0o700)
        binary = str(short / "deaf")
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _OWNER, str(path), str(at), binary),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert owner.stdout is not None
    assert await owner.stdout.readline() == b"ready\n"
    (pid,) = _servers(at)
    watched = os.pidfd_open(pid)
    try:
        owner.kill()
        await owner.wait()
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(watched, gone.set)
        await asyncio.wait_for(gone.wait(), 10)
        loop.remove_reader(watched)
    finally:
        os.close(watched)
    async with serving(path, "raw", at):  # a socket that it left is in nobody's way
        pass
    assert not at.exists()


def _servers(at: Path) -> list[int]:
    """The processes that were told to serve on *at*."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes()
            if words.startswith(b"qemu-nbd\0") and os.fsencode(at) in words:
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found
