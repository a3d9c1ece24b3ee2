import asyncio
import os
import re
import select
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from qmpsnap.errors import LaunchFailed
from qmpsnap.hypervisor.machine.cmdline import FLAGS, CommandLine, parse
from qmpsnap.hypervisor.machine.launch import launched
from qmpsnap.hypervisor.machine.relocate import RULES, control
from qmpsnap.hypervisor.monitor import connect
from tests.rig.qemu import VERSIONS, binary


@pytest.fixture(params=VERSIONS)
def qemu(request):
    return binary(request.param)


def none_machine(qemu: Path, directory: Path, *more: str) -> list[str]:
    line = parse([str(qemu), "-machine", "none", "-nodefaults", "-display", "none", *more])
    return line.append(*control(directory / "q.sock")).argv()


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def test_launch_greets_and_ends_with_the_block(qemu, tmp_path):
    argv = none_machine(qemu, tmp_path, "-chardev", "socket,id=c,path=c,server=on,wait=off")
    async with launched(argv, directory=tmp_path, log=tmp_path / "log") as vm:
        assert vm.qmp == tmp_path / "q.sock"
        for name in ("q.sock", "c", "log"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        async with connect(vm.qmp) as one:
            assert (await one.execute("query-status"))["status"] in ("running", "prelaunch")
        async with connect(vm.qmp) as two:
            assert (await two.execute("query-name")) == {}
        assert os.getsid(vm.pid) == vm.pid
    assert not psutil.pid_exists(vm.pid)
    assert not vm.qmp.exists()


async def test_launch_pc_that_quits_by_itself_is_seen(qemu, tmp_path):
    line = parse([str(qemu), "-machine", "pc", "-display", "none", "-S"])
    argv = line.append(*control(tmp_path / "q")).argv()
    async with launched(argv, directory=tmp_path, log=tmp_path / "log") as vm:
        waiting = asyncio.create_task(vm.exited())
        async with connect(vm.qmp) as monitor:
            assert (await monitor.execute("query-status"))["status"] == "prelaunch"
            assert not waiting.done()
            await monitor.execute("quit")
        async with asyncio.timeout(10):
            await waiting
            await vm.exited()


async def test_launch_failure_tells_what_qemu_said(qemu, tmp_path):
    (tmp_path / "log").write_text("what was there before\n")
    argv = none_machine(qemu, tmp_path, "-device", "no-such-thing")
    with pytest.raises(LaunchFailed, match="no-such-thing") as failed:
        async with launched(argv, directory=tmp_path, log=tmp_path / "log"):
            pytest.fail("started")
    assert "was there before" not in str(failed.value)
    assert not (tmp_path / "q.sock").exists()


@pytest.mark.parametrize("lifetime", ["with-us", "detached"])
async def test_launch_failure_of_any_lifetime(tmp_path, lifetime):
    argv = none_machine(binary("7.2"), tmp_path, "-bogus", "x")
    with pytest.raises(LaunchFailed, match="bogus"):
        async with launched(argv, directory=tmp_path, log=tmp_path / "l", lifetime=lifetime):
            pytest.fail("started")


@pytest.mark.parametrize("lifetime", ["with-us", "detached"])
async def test_launch_of_something_mute_ends_it(tmp_path, lifetime):
    # it takes connections, as we listen for it, and says nothing
    mute = tmp_path / "mute"
    mute.write_text("#!/bin/sh\necho $$ >pid\nexec cat /dev/zero >/dev/null\n")
    mute.chmod(0o700)
    argv = none_machine(mute, tmp_path)
    with pytest.raises(LaunchFailed, match="did not answer within"):
        async with launched(
            argv, directory=tmp_path, log=tmp_path / "l", lifetime=lifetime, within=0.5
        ):
            pytest.fail("started")
    pid = int((tmp_path / "pid").read_text())
    assert not alive(pid)
    assert not (tmp_path / "q.sock").exists()


async def test_launch_without_a_binary_or_a_monitor(tmp_path):
    with pytest.raises(LaunchFailed):
        async with launched(
            none_machine(tmp_path / "none", tmp_path), directory=tmp_path, log=tmp_path / "l"
        ):
            pytest.fail("started")
    with pytest.raises(LaunchFailed, match="qmpsnap-qmp"):
        async with launched(["qemu"], directory=tmp_path, log=tmp_path / "l"):
            pytest.fail("started")


async def test_launch_does_not_take_a_socket_that_is_there(tmp_path):
    (tmp_path / "q.sock").write_text("mine")
    with pytest.raises(LaunchFailed, match=r"q\.sock"):
        async with launched(
            none_machine(binary("7.2"), tmp_path), directory=tmp_path, log=tmp_path / "l"
        ):
            pytest.fail("started")
    assert (tmp_path / "q.sock").read_text() == "mine"


async def test_launch_cancelled_at_any_time_leaves_nothing(tmp_path):
    async def hold(number: int) -> None:
        home = tmp_path / str(number)
        home.mkdir()
        async with launched(none_machine(binary("7.2"), home), directory=home, log=home / "l"):
            await asyncio.Event().wait()

    for number, after in enumerate((0, 0.001, 0.01, 0.03, 0.2)):
        task = asyncio.create_task(hold(number))
        await asyncio.wait({task}, timeout=after)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert psutil.Process().children(recursive=True) == []
    assert list(tmp_path.glob("*/q.sock")) == []


async def test_launch_survives_sigterm_that_qemu_ignores(tmp_path):
    async with launched(
        none_machine(binary("7.2"), tmp_path), directory=tmp_path, log=tmp_path / "l"
    ) as vm:
        os.kill(vm.pid, signal.SIGSTOP)  # SIGTERM waits; SIGKILL does not
    assert not psutil.pid_exists(vm.pid)


_OWNER = """
import asyncio, os, sys
from pathlib import Path
from qmpsnap.hypervisor.machine.launch import launched
async def main():
    home = Path(sys.argv[1])
    async with launched(sys.argv[3:], directory=home, log=home / "l", lifetime=sys.argv[2]) as vm:
        print(vm.pid, flush=True)
        if sys.argv[2] == "with-us":
            await asyncio.Event().wait()
asyncio.run(main())
"""


def owner(home: Path, lifetime: str) -> "subprocess.Popen[str]":
    argv = none_machine(binary("7.2"), home)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", _OWNER, str(home), lifetime, *argv],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_launch_with_us_ends_when_we_are_killed(tmp_path):
    with owner(tmp_path, "with-us") as process:
        pidfd = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
        ended, _, _ = select.select([pidfd], [], [], 10)
        os.close(pidfd)
    assert ended


async def test_launch_detached_outlives_us(tmp_path):
    with owner(tmp_path, "detached") as process:
        pid = int(process.stdout.read())
    assert process.returncode == 0
    assert alive(pid)
    async with connect(tmp_path / "q.sock") as monitor:
        await monitor.execute("quit")


def test_cmdline_knows_which_options_take_no_value(qemu):
    told = subprocess.run([qemu, "-help"], capture_output=True, text=True, check=True).stdout
    names = set(re.findall(r"^--?([A-Za-z][\w-]*)", told, re.MULTILINE)) | {"fda", "hdd", "M"}
    assert len(names) > 100
    wrong = []
    for name in sorted(names):
        run = subprocess.run([qemu, "-version", f"-{name}"], capture_output=True, text=True)
        if ("requires an argument" in run.stderr) == (name in FLAGS):
            wrong.append(name)
    assert wrong == []
    assert names - RULES.keys() - {"readconfig", "set", "blockdev"} == set(), (
        "options without a rule for a restore"
    )


def test_cmdline_empty_is_a_value():
    assert CommandLine("q").argv() == ["q"]
