"""SIGINT, SIGTERM and SIGHUP while the guest is frozen: thawed, running, nothing left behind."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.hypervisor.monitor import connect
from tests.cli.agent import agent
from tests.cli.conftest import Program, ended, line, powered


async def facts(witness: Path) -> tuple[str, set[str]]:
    """The state of the guest, and the nodes that QEMU has, over a monitor of our own."""
    async with connect(witness) as monitor:
        status: dict[str, Any] = await monitor.execute("query-status")
        nodes = await monitor.execute("query-named-block-nodes")
    return status["status"], {node["node-name"] for node in nodes}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
async def test_a_signal_while_frozen(
    program: Program, qemu72: Path, number: signal.Signals, code: int
) -> None:
    path = program.dir / "agent.sock"
    async with powered(program, qemu72) as vm, agent(path) as guest:
        before = await facts(vm.witness)
        words = ["create", "web", "--socket", vm.qmp, "--agent-socket", path, *program.roots]
        metrics = program.dir / "web.prom"
        words += ["--metrics-file", metrics]
        process = await program.start(*words, "--ram", "none", "--quiesce", "agent")
        await asyncio.wait_for(guest.freezing.wait(), 60)
        process.send_signal(number)
        await asyncio.wait_for(guest.thawing.wait(), 30)
        # whoever presses Ctrl-C twice has a thawed guest all the same
        process.send_signal(number)
        assert process.stderr is not None
        told = await asyncio.wait_for(process.stderr.readline(), 30)
        assert b"this ends by itself" in told
        guest.may_thaw.set()
        ran = await ended(process)
        assert ran.code == code
        assert ran.out == ""
        assert f'exit_code{{vm="web",verb="create"}} {code}\n' in metrics.read_text()
        assert f"interrupted by {number.name}" in ran.err
        assert not guest.frozen
        assert await facts(vm.witness) == before
        guest.may_freeze.set()
        listed = await program.ok("list", "web", "--socket", vm.qmp, *program.roots)
        assert listed.out == ""
        assert not [*program.local.glob("web/journal/*.json*")]
        await program.ok("create", "web", "--socket", vm.qmp, *program.roots)


async def test_a_signal_that_is_to_be_ignored_is(program: Program, qemu72: Path) -> None:
    path = program.dir / "agent.sock"
    async with powered(program, qemu72) as vm, agent(path) as guest:
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", "trap '' HUP INT; exec \"$@\"", "sh"),
            *line("create", "web", "--socket", vm.qmp, *program.roots),
            *("--agent-socket", path, "--ram", "none", "--quiesce", "agent"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=program.surroundings(),
        )
        await asyncio.wait_for(guest.freezing.wait(), 60)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        guest.may_thaw.set()
        guest.may_freeze.set()
        ran = await ended(process)
        assert ran.code == 0
