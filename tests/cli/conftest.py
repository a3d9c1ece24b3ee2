"""The console program as a process of its own, and a QEMU for it that boots no guest."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qmpsnap.store.layout import LocalRoot
from qmpsnap.store.manifest import Manifest, decode, encode
from tests.rig.guest import blockdev
from tests.rig.halves import spooled
from tests.rig.qemu import ROOT, Running, running


@dataclass(frozen=True, slots=True)
class Ran:
    """One finished call; no call may ever show a traceback."""

    code: int
    out: str
    err: str

    def __post_init__(self) -> None:
        assert "Traceback" not in self.out + self.err, self.err

    @property
    def record(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        (only,) = self.records
        return only

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> dict[str, str]:
        """What stderr ends with under --json; every line of it is an object."""
        lines = [json.loads(line) for line in self.err.splitlines()]
        error: dict[str, str] = lines[-1]["error"]
        assert set(error) == {"code", "message", "hint"}
        return error


def _hearing() -> None:
    # a test run started with `&` ignores SIGINT, one with nohup SIGHUP, and its children would too
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@dataclass(frozen=True, slots=True)
class Program:
    """`qmpsnap`, with a home, a runtime folder and two roots of its own."""

    dir: Path
    store: Path

    @property
    def local(self) -> Path:
        return self.dir / "local"

    @property
    def roots(self) -> list[str]:
        words = ["--local", str(self.local), "--store", str(self.store)]
        return [*words, "--allow-local-store"]

    def surroundings(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if "QMPSNAP" not in name}
        kept |= {
            "HOME": str(self.dir),
            "PYTHONPATH": str(ROOT),
            "QMPSNAP_RUNTIME_DIR": str(self.dir / "run"),
        }
        return kept | more

    async def start(self, *words: object, **more: str) -> asyncio.subprocess.Process:
        if words and words[0] in {"create", "refresh"} and "--max-pause" not in words:
            words = (*words, "--max-pause", "30s")  # no test of the pause
        return await asyncio.create_subprocess_exec(
            *line(*words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self.dir,
            env=self.surroundings(**more),
            preexec_fn=_hearing,
        )

    async def run(self, *words: object, **more: str) -> Ran:
        return await ended(await self.start(*words, **more))

    async def ok(self, *words: object, **more: str) -> Ran:
        ran = await self.run(*words, **more)
        assert ran.code == 0, ran.err
        return ran


def line(*words: object) -> list[str]:
    return [sys.executable, "-m", "qmpsnap", *map(str, words)]


async def ended(process: asyncio.subprocess.Process, within: float = 120) -> Ran:
    async with asyncio.timeout(within):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


@pytest.fixture
def program(short: Path, store: Path) -> Program:
    return Program(short, store)


def machine(path: Path) -> list[str]:
    """A machine with one disk at *path* and no guest: it runs its firmware."""
    if not path.exists():
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "16M"], check=True)
    return [
        *("-M", "pc", "-m", "32", "-nodefaults", "-accel", "tcg"),
        *blockdev(path, "d0", "qcow2", device="vd0"),
    ]


@contextlib.asynccontextmanager
async def powered(program: Program, qemu: Path) -> AsyncIterator[Running]:
    """A running VM; its QMP socket is `qmp` in the program's folder."""
    async with running(qemu, *machine(program.dir / "d0.qcow2"), directory=program.dir) as vm:
        yield vm


async def shipped(program: Program, note: str = "") -> None:
    """A pair of the VM `web`, whose disks are on no host."""
    path = spooled(LocalRoot(program.local)) / "manifest.json"
    sealed = decode(path.read_bytes(), Manifest, path)
    path.write_bytes(encode(msgspec.structs.replace(sealed, note=note)))
    await program.ok("ship", "web", *program.roots)
