"""A swtpm for a test, and the guest's side of it: raw commands to /dev/tpm0."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.rig.console import Console

_OWNER = bytes.fromhex("40000001")
_INDEX = bytes.fromhex("01500016")
_AUTH = bytes.fromhex("00000009 40000009 0000 00 0000")  # the empty password
_PCR = 16  # of those that anybody may extend


def options(socket: Path) -> list[str]:
    return [
        *("-chardev", f"socket,id=tpmc,path={socket}", "-tpmdev", "emulator,id=t0,chardev=tpmc"),
        *("-device", "tpm-tis,tpmdev=t0,id=tis"),
    ]


@contextmanager
def swtpm(folder: Path, *more: str, state: Sequence[str] = ()) -> Iterator[Path]:
    """A TPM 2 in *folder*, its paths relative, as some have it; the socket."""
    if shutil.which("swtpm") is None and not os.environ.get("CI"):
        pytest.skip("needs swtpm")
    (folder / "state").mkdir(parents=True, exist_ok=True)
    words = [
        *("setpriv", "--pdeathsig=KILL", "swtpm", "socket", "--tpm2"),
        *(state or ("--tpmstate", "dir=state")),
        *("--ctrl=type=unixio,path=ctrl.sock", "--terminate", *more),
    ]
    with started(words, cwd=folder):
        yield folder / "ctrl.sock"


@contextmanager
def started(words: Sequence[str], *, cwd: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A program that listens on a unix socket when the block begins, and is no more after it.

    The socket's file is there before anybody listens, and a swtpm ends with its first client.
    """
    process = subprocess.Popen(words, cwd=cwd)
    try:
        while not _listens(process.pid):
            assert process.poll() is None
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.wait()


def _listens(pid: int) -> bool:
    own = set()
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            own.add(str(one.readlink()))
    rows = [row.split() for row in Path("/proc/net/unix").read_text().splitlines()[1:]]
    accepts = "00010000"  # __SO_ACCEPTCON
    return any(row[3] == accepts and f"socket:[{row[6]}]" in own for row in rows)


async def extend(console: Console, byte: int) -> None:
    """The guest extends its register by 32 times *byte*."""
    register = _PCR.to_bytes(4, "big")
    await _command(console, 0x182, register, bytes.fromhex("00000001 000b") + bytes([byte]) * 32)


async def register(console: Console) -> str:
    return await console.run(f"cat /sys/class/tpm/tpm0/pcr-sha256/{_PCR}", within=30)


async def define(console: Console) -> None:
    """Eight bytes of permanent memory."""
    public = _INDEX + bytes.fromhex("000b 02060006 0000 0008")
    await _command(console, 0x12A, _OWNER, b"\0\0" + len(public).to_bytes(2, "big") + public)


async def store(console: Console, text: bytes) -> None:
    """*text*, eight bytes, into what was defined."""
    await _command(console, 0x137, _OWNER + _INDEX, b"\0\x08" + text + b"\0\0")


async def stored(console: Console) -> bytes:
    return (await _command(console, 0x14E, _OWNER + _INDEX, b"\0\x08\0\0"))[16:24]


async def _command(console: Console, code: int, handles: bytes, parameters: bytes) -> bytes:
    rest = code.to_bytes(4, "big") + handles + _AUTH + parameters
    sent = b"\x80\x02" + (6 + len(rest)).to_bytes(4, "big") + rest
    text = "".join(f"\\x{byte:02x}" for byte in sent)
    said = await console.run(
        f"(exec 3<>/dev/tpm0; printf '{text}' >&3; od -An -v -tx1 <&3)", within=60
    )
    answer = bytes.fromhex(said)
    assert answer[6:10] == bytes(4), answer.hex()
    return answer
