"""`qmpsnap export`: it serves until it is told to end, and leaves nothing, however it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmpsnap.cli.shapes import Exported
from qmpsnap.hypervisor.nbd.client import opened
from tests.cli.conftest import Program, ended, powered
from tests.rig.dirty import CLUSTER, write
from tests.rig.wire import witness

SIZE = 16 << 20
CONTENT = bytes(CLUSTER) + b"\xcd" * CLUSTER + bytes(SIZE - 2 * CLUSTER)  # as qemu-io writes


@asynccontextmanager
async def snapped(program: Program, qemu: Path) -> AsyncIterator[tuple[str, list[object]]]:
    """The ID of a snapshot of a VM that runs on, and how to reach that."""
    async with powered(program, qemu) as vm:
        with witness(vm.witness) as eye:
            write(eye, "vd0", CLUSTER)
            reach: list[object] = ["--socket", vm.qmp]
            words = ["create", "web", "--level", "overlay", "--ram", "none", "--max-pause", "20s"]
            made = await program.ok(*words, *reach, *program.roots, "--json")
            write(eye, "vd0", 0)
            yield made.records[-1]["id"], reach


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
async def test_it_serves_until_a_signal(
    number: signal.Signals, code: int, program: Program, qemu72: Path
) -> None:
    async with snapped(program, qemu72) as (id, reach):
        process = await program.start("export", "web", "latest", "vd0", *program.roots, "--json")
        assert process.stdout is not None
        shown = json.loads(await process.stdout.readline())
        at = Path(shown["socket"])
        assert set(shown) == set(Exported.__struct_fields__)
        assert at.parent == program.dir / "run/web"
        assert shown == {
            "vm": "web",
            "id": id,
            "revision": 0,
            "disk": "vd0",
            "uri": f"nbd+unix:///?socket={at}",
            "socket": str(at),
            "virtual_size_bytes": SIZE,
        }
        assert mode(at) == 0o600
        async with opened(at, "") as reader:  # a client that stays does not keep it
            assert await reader.read(0, SIZE) == CONTENT
            process.send_signal(number)
            ran = await ended(process)
        assert ran.code == code, ran.err
        assert ran.out == ""
        await _ended(at)
        # one that dies with its owner leaves its socket, where nobody listens
        assert at.is_socket() == (number is signal.SIGKILL)  # noqa: ASYNC240 - in memory
        await program.ok("delete", "web", id, *reach, *program.roots)


async def test_the_uri_alone_is_on_stdout(program: Program, qemu72: Path) -> None:
    async with snapped(program, qemu72) as (id, reach):
        at = program.dir / "it.nbd"
        words = ["export", "web", id, "vd0", "--socket-path", at, *program.roots]
        process = await program.start(*words)
        assert process.stdout is not None
        assert (await process.stdout.readline()).decode() == f"nbd+unix:///?socket={at}\n"
        twice = await program.run(*words)
        assert (twice.code, twice.out) == (4, "")
        assert "listens there already" in twice.err
        kept = await program.run("delete", "web", id, *reach, *program.roots)
        assert kept.code == 3
        assert str(at) in kept.err
        (server,) = _servers(at)
        os.kill(server, signal.SIGKILL)
        ran = await ended(process)
        assert ran.code == 4
        assert "qemu-nbd: ended with code -9" in ran.err
        await _ended(at)
        assert not at.is_socket()
        refused = await program.run("export", "web", id, "vdz", *program.roots, "--json")
        assert refused.code == 2
        assert "there are: vd0" in refused.error["message"]
        assert await _completed(program, "export", "web", id, "v") == ["vd0"]
        assert await _completed(program, "export", "web", "latest", "v") == ["vd0"]
        assert await _completed(program, "export", "web", "1999", "v") == []


async def _completed(program: Program, *words: str) -> list[str]:
    (program.dir / "c.toml").write_text(f'local = "{program.local}"\n')
    ran = await program.run(
        _QMPSNAP_COMPLETE="complete_bash",
        COMP_WORDS=" ".join(["qmpsnap", *words]),
        COMP_CWORD=str(len(words)),
        QMPSNAP_CONFIG=str(program.dir / "c.toml"),
    )
    return ran.out.split()


async def _ended(at: Path) -> None:
    """Until the server has ended: where its owner was killed, nobody waits for it."""
    async with asyncio.timeout(10):
        while _servers(at):  # noqa: ASYNC110 - nobody's child
            await asyncio.sleep(0.01)


def _servers(at: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes()
        except OSError:
            continue
        if b"qemu-nbd" in words and os.fsencode(f"--socket={at}") in words.split(b"\0"):
            found.append(int(entry.parent.name))
    return found
