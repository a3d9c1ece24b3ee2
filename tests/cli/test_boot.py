"""`verify --boot` on the command line: what it prints, its codes, and what a signal leaves."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from qmpsnap.engine import dependents
from qmpsnap.store.layout import LocalRoot
from tests.cli.conftest import Program, ended, machine
from tests.cli.test_verbs import shaped
from tests.rig.qemu import running

AGENT = [
    *("-device", "virtio-serial-pci", "-chardev", "socket,id=a,path=agent.sock,server=on,wait=off"),
    *("-device", "virtserialport,chardev=a,name=org.qemu.guest_agent.0"),
]


async def test_a_machine_without_an_agent(program: Program, qemu72: Path) -> None:
    options = machine(program.dir / "d0.qcow2")
    async with running(qemu72, *options, directory=program.dir) as vm:
        await program.ok("create", "web", "--socket", vm.qmp, *program.roots)
    ran = await program.ok("verify", "web", *program.roots, "--boot", "--json")
    seen = shaped("verify", ran.record)["boot"]
    assert (seen["ram"], seen["agent"], seen["problem"]) == (True, "absent", "")
    ran = await program.ok("verify", "web", *program.roots, "--boot", "--cold")
    assert "all is well" in ran.out
    assert "booted from revision 0, ran after" in ran.out
    assert "no agent to ask" in ran.out
    ran = await program.ok("verify", "web", *program.roots, "--json")
    assert shaped("verify", ran.record)["boot"] is None
    ran = await program.run("verify", "web", *program.roots, "--boot", "--revision", "3")
    assert ran.code == 3
    assert "no revision 3" in ran.err


async def test_a_boot_that_fails_is_damage(program: Program, qemu72: Path) -> None:
    options = machine(program.dir / "d0.qcow2")
    async with running(qemu72, *options, *AGENT, directory=program.dir) as vm:
        await program.ok("create", "web", "--socket", vm.qmp, *program.roots)
    words = ["verify", "web", *program.roots, "--boot", "--cold", "--boot-within", "500ms"]
    ran = await program.run(*words, "--json")
    assert ran.code == 7
    assert [one["where"] for one in ran.record["findings"]] == ["boot"]
    assert ran.record["boot"]["agent"] == "silent"
    ran = await program.run(*words)
    assert ran.code == 7
    assert "did not answer within 0.5 s" in ran.out
    assert "brought back" not in ran.out


@pytest.mark.parametrize("option", ["--cold", "--boot-within=3s", "--revision=0"])
async def test_options_of_a_boot_alone(program: Program, option: str) -> None:
    ran = await program.run("verify", "web", *program.roots, option)
    assert ran.code == 2
    assert "--boot" in ran.err


async def test_a_machine_that_ends_early_and_is_on_no_network(
    program: Program, qemu72: Path
) -> None:
    options = [*machine(program.dir / "d0.qcow2"), *AGENT, "-nic", "user,model=e1000,id=n"]
    async with running(qemu72, *options, directory=program.dir) as vm:
        await program.ok("create", "web", "--socket", vm.qmp, *program.roots)
        folder = program.local / "web/boot"
        words = ["verify", "web", *program.roots, "--boot", "--cold", "--json"]
        process = await program.start(*words)
        pid = await tried(folder)
        assert b"user,model=e1000,id=n,restrict=on" in command(pid)
        os.kill(int(pid), signal.SIGKILL)
        ran = await ended(process)
    assert ran.code == 7
    (finding,) = ran.record["findings"]
    assert finding["where"] == "boot"
    assert "QEMU" in finding["what"]
    assert not folder.exists()


async def test_a_signal_leaves_nothing(program: Program, qemu72: Path) -> None:
    options = machine(program.dir / "d0.qcow2")
    async with running(qemu72, *options, *AGENT, directory=program.dir) as vm:
        await program.ok("create", "web", "--socket", vm.qmp, *program.roots)
    root = LocalRoot(program.local)
    (id,) = root.ids("web")
    folder = root.vm("web") / "boot"
    words = ["verify", "web", *program.roots, "--boot", "--cold"]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process = await program.start(*words)
        await tried(folder)
        second = await program.run(*words)
        assert second.code == 3
        assert "`verify --boot` of process" in second.err
        process.send_signal(number)
        ran = await ended(process)
        assert ran.code == code, ran.err
        while process_of(folder) is not None:  # SIGKILL: the kernel ends it, a moment later
            assert code == -9
            await asyncio.sleep(0.05)
        assert folder.exists() == (code == -9)
        assert bool(dependents.standing(root, "web", str(id))) == (code == -9)
    # what the killed one left is removed by the next
    assert (await program.run(*words, "--boot-within", "100ms")).code == 7
    assert not folder.exists()
    assert dependents.standing(root, "web", str(id)) == []


async def tried(folder: Path) -> str:
    """The process of the machine in *folder*, once there is one."""
    async with asyncio.timeout(60):
        while (pid := process_of(folder)) is None:  # noqa: ASYNC110 - nobody tells us
            await asyncio.sleep(0.05)
        return pid


def command(pid: str) -> list[bytes]:
    return Path("/proc", pid, "cmdline").read_bytes().split(b"\0")


def process_of(folder: Path) -> str | None:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if b"qemu-system" in words.split(b"\0")[0] and os.fsencode(folder) in words:
            return path.parent.name
    return None
