"""The QEMUs that the tests run on, and a machine that lives for the length of a block."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("7.2", "10.0", "11.1")


def binaries() -> dict[str, Path]:
    """The binary of each version; it need not exist."""
    built = Path(os.environ.get("QEMU_DIR", ROOT / "build/qemu"))
    newer = {version: built / version / "bin/qemu-system-x86_64" for version in VERSIONS[1:]}
    return {"7.2": Path("/usr/bin/qemu-system-x86_64"), **newer}


def binary(version: str) -> Path:
    """The binary of *version*; without it the test is skipped, or fails where CI is set."""
    path = binaries()[version]
    if not path.exists():
        told = f"no QEMU {version} at {path}: scripts/qemu gets it"
        if os.environ.get("CI"):
            pytest.fail(told)
        pytest.skip(told)
    return path


@dataclass(frozen=True, slots=True)
class Running:
    """A QEMU with two monitors: *qmp* for what is tested, *witness* to look on."""

    pid: int
    qmp: Path
    witness: Path
    dir: Path
    argv: list[str]
    log: Path

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def running(
    qemu: Path, *arguments: str, directory: Path | None = None
) -> AsyncIterator[Running]:
    """*qemu* with *arguments*, a `-machine none` without any, its two monitors listening.

    Its files are in *directory*, or in one of its own that goes with it.
    """
    with contextlib.ExitStack() as stack:
        home = directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="q")))
        given = list(arguments) or ["-machine", "none", "-nodefaults"]
        argv = [str(qemu), *given, "-display", "none"]
        for name in ("qmp", "witness"):
            argv += ["-chardev", f"socket,id=rig-{name},path={home / name},server=on,wait=off"]
            argv += ["-mon", f"chardev=rig-{name},mode=control"]
        log = home / "stderr"
        stderr = stack.enter_context(log.open("wb"))
        process = _started(argv, home, stderr)
        try:
            await _listening(process, home / "witness", log)
            yield Running(process.pid, home / "qmp", home / "witness", home, argv, log)
        finally:
            process.kill()
            process.wait()


def _started(argv: list[str], home: Path, out: IO[bytes]) -> subprocess.Popen[bytes]:
    # a test run that is killed takes its machines along
    argv = ["setpriv", "--pdeathsig=KILL", *argv]
    return subprocess.Popen(argv, cwd=home, stdin=subprocess.DEVNULL, stdout=out, stderr=out)


def _complaint(log: Path) -> RuntimeError:
    return RuntimeError(f"QEMU ended: {log.read_text()}")


async def _listening(process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    # QEMU makes the sockets in the order of its command line, the witness last
    async with asyncio.timeout(60):
        while True:
            if process.poll() is not None:
                raise _complaint(log)
            with contextlib.suppress(FileNotFoundError, ConnectionError, TimeoutError):
                if await _answers(socket):
                    return
            await asyncio.sleep(0.005)


async def _answers(socket: Path) -> bool:
    reader, writer = await asyncio.open_unix_connection(socket)
    try:
        async with asyncio.timeout(5):  # one of thousands never answers on its first connection
            await reader.readline()
            writer.write(b'{"execute": "qmp_capabilities"}')
            return bool(await reader.readline())  # unlike the greeting, it waits for the machine
    finally:
        writer.close()
        await writer.wait_closed()
