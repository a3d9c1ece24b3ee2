"""`qmpsnap run`: a QEMU under its name, with our terminal, ending as it should."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
from pathlib import Path

import pytest

from tests.cli.conftest import Program, ended, line, machine
from tests.cli.test_verbs import quit_qemu, shaped


def words(program: Program, qemu: Path, *more: str) -> list[str]:
    disk = program.dir / "d0.qcow2"
    return ["run", "--name", "web", *more, "--", str(qemu), "-display", "none", *machine(disk)]


async def gone(pid: int) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return
            await asyncio.sleep(0.01)


async def test_detached_it_is_found_by_its_name(program: Program, qemu72: Path) -> None:
    ran = await program.ok(*words(program, qemu72, "--detach", "--json"))
    started = shaped("run", ran.record)
    try:
        info = (await program.ok("info", "web", "--json")).record
        assert info["pid"] == started["pid"]
        made = await program.ok("create", "web", *program.roots, "--json")
        assert made.record["state"] == "paired"
        again = await program.run(*words(program, qemu72, "--json"))
        assert again.code == 3
        assert "runs already" in again.error["message"]
    finally:
        os.kill(started["pid"], signal.SIGKILL)
    await gone(started["pid"])
    # the name, and the socket that it left, are free
    ran = await program.ok(*words(program, qemu72, "--detach", "--json"))
    await quit_qemu(Path(ran.record["qmp"]))
    await gone(ran.record["pid"])
    assert (await program.run("info", "web")).code == 3


async def test_a_copy_that_was_cut_off_is_settled_before_the_next_start(
    program: Program, qemu72: Path
) -> None:
    config = program.dir / "qmpsnap.toml"
    config.write_text(
        f'local = "{program.local}"\nstore = "{program.store}"\nallow_local_store = true\n'
    )
    known = {"QMPSNAP_CONFIG": str(config)}
    start = words(program, qemu72, "--detach", "--json")
    first = (await program.ok(*start, **known)).record
    copying = await program.start(
        *("create", "web", "--level", "full", "--ram", "none", "--speed-limit", "64K"),
        *("--max-pause", "20s"),
        **known,
    )
    async with asyncio.timeout(60):
        while not list(program.local.glob("web/*/*.partial")):
            assert copying.returncode is None
            await asyncio.sleep(0.01)
    assert list(program.dir.glob(".qmpsnap-*"))
    copying.kill()
    os.kill(first["pid"], signal.SIGKILL)
    await copying.communicate()
    await gone(first["pid"])
    assert list(program.dir.glob(".qmpsnap-*"))
    second = await program.ok(*start, **known)
    try:
        assert not list(program.dir.glob(".qmpsnap-*"))
        assert "nothing was left to do" in second.err
        again = ["create", "web", "--ram", "none", "--max-pause", "20s", "--json"]
        assert (await program.ok(*again, **known)).record["level"] == "full"
    finally:
        os.kill(second.record["pid"], signal.SIGKILL)
        await gone(second.record["pid"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_signal_stops_it(
    program: Program, qemu72: Path, number: signal.Signals, code: int
) -> None:
    process = await program.start(*words(program, qemu72, "--json"))
    assert process.stderr is not None
    told = json.loads(await asyncio.wait_for(process.stderr.readline(), 60))["notice"]
    pid = int(told.split("process ")[1].split(";")[0])
    other = await program.run(*words(program, qemu72, "--json"))
    assert (other.code, other.error["code"]) == (3, "vm-busy")
    process.send_signal(number)
    assert (await ended(process)).code == code
    await gone(pid)
    assert (await program.run("info", "web")).code == 3


async def test_the_exit_code_is_that_of_qemu(program: Program, qemu72: Path) -> None:
    qmp = program.dir / "run/web/qmp.sock"
    process = await program.start(*words(program, qemu72))
    assert process.stderr is not None
    await asyncio.wait_for(process.stderr.readline(), 60)
    await quit_qemu(qmp)
    assert (await ended(process)).code == 0
    process = await program.start(*words(program, qemu72))
    assert process.stderr is not None
    told = await asyncio.wait_for(process.stderr.readline(), 60)
    os.kill(int(told.split(b"process ")[1].split(b";")[0]), signal.SIGKILL)
    ran = await ended(process)
    assert ran.code == 128 + 9
    assert "QEMU ended with 137" in ran.err


async def test_a_qemu_that_does_not_start(program: Program, qemu72: Path) -> None:
    ran = await program.run("run", "--name", "web", "--json", "--", qemu72, "-machine", "nosuch")
    assert ran.code == 4
    assert "unsupported machine type" in ran.error["message"]
    ran = await program.run("run", "--name", "web", "--json", "--", "no-such-qemu", "-m", "64")
    assert ran.code == 4
    assert "no-such-qemu" in ran.error["message"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "the machine has no name"),
        (["--name", "../up"], "not a name"),
        (["--name", "web", "-daemonize"], "no such option"),
        (["--name", "web", "--", "qemu", "-daemonize"], "would leave our hands"),
    ],
)
async def test_lines_that_cannot_be(program: Program, given: list[str], told: str) -> None:
    tail = [] if "--" in given else ["qemu", "-m", "64"]
    ran = await program.run("run", *given, *tail)
    assert ran.code == 2
    assert told in ran.err.lower()


async def test_ctrl_c_on_a_terminal(program: Program, qemu72: Path) -> None:
    """The terminal's own Ctrl-C reaches QEMU as well as us: both end, and the bar was drawn."""
    master, slave = pty.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            *line(*words(program, qemu72)),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=program.dir,
            env=program.surroundings(TERM="xterm", COLUMNS="100"),
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        seen = b""
        while b"Ctrl-C stops it" not in seen:
            seen += await asyncio.to_thread(os.read, master, 4096)
        os.write(master, b"\x03")
        code = await asyncio.wait_for(process.wait(), 30)
    finally:
        os.close(master)
    assert code in {0, 130}  # QEMU may end before we hear of it: it ended well
    assert (await program.run("info", "web")).code == 3


def _own_terminal() -> None:
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
