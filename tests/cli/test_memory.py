"""An engine that has no memory left, sooner or later: nobody else suffers."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cli.conftest import Program, line, powered
from tests.cli.test_signals import facts
from tests.rig.qemu import ROOT


@pytest.mark.parametrize("mib", [60, 120, 300])
async def test_the_guest_does_not_feel_it(program: Program, qemu72: Path, mib: int) -> None:
    async with powered(program, qemu72) as vm:
        before = await facts(vm.witness)
        create = ["create", "web", "--socket", vm.qmp, *program.roots, "--max-pause", "30s"]
        process = await asyncio.create_subprocess_exec(
            *("prlimit", f"--as={mib << 20}", *line(*create)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=program.dir,
            env=program.surroundings(),
        )
        # Python waits without end for a thread of its own that had no memory to begin
        with suppress(TimeoutError):
            async with asyncio.timeout(60):
                await process.communicate()
        with suppress(ProcessLookupError):
            process.kill()
        assert await process.wait() != 0
        await program.ok("recover", "web", "--socket", vm.qmp, *program.roots)
        assert await facts(vm.witness) == before
        made = (await program.ok(*create, "--json")).record["id"]  # the control
        listed = (await program.ok("list", "web", *program.roots, "--json")).records
        assert [(one["id"], one["state"]) for one in listed] == [(made, "paired")]


@pytest.mark.parametrize("raised", ["MemoryError()", 'RuntimeError("can\'t start new thread")'])
async def test_that_is_what_it_says(program: Program, raised: str) -> None:
    (program.dir / "sitecustomize.py").write_text(
        "import qmpsnap.engine.listing as here\n"
        "async def entries(roots, vm):\n"
        f"    raise {raised}\n"
        "here.entries = entries\n"
    )
    ran = await program.run("list", *program.roots, PYTHONPATH=f"{program.dir}:{ROOT}")
    assert ran.code == 4
    assert ran.err.splitlines()[0] == "qmpsnap: no memory is left for this process"
