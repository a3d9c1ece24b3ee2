"""docs/recovery.md is true: its commands, as they stand, bring a guest back without the engine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.created import Created
from qmpsnap.engine.wishes import Level, RamChoice, Wishes
from tests.rig.console import Console, Witness
from tests.rig.guest import booted
from tests.rig.qemu import ROOT

pytestmark = pytest.mark.guest
PAGE = (ROOT / "docs/recovery.md").read_text()


def commands(heading: str) -> str:
    """The shell commands of one section of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S)
    assert blocks
    return "\n".join(["set -eu", *blocks])


@contextlib.contextmanager
def shell(script: str, **variables: object) -> Iterator[str]:
    """Run *script* to its end; what it left in the background lives as long as the block."""
    surroundings = os.environ | {name: str(value) for name, value in variables.items()}
    out = Path(str(variables["LOCAL"])).parent / "out"
    with out.open("wb") as file:
        process = subprocess.Popen(
            ["bash", "-c", script],
            env=surroundings,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        assert process.wait(120) == 0, out.read_text()
        yield out.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


async def taken(
    qemu: Path, short: Path, store: Path, ram: RamChoice, level: Level = Level.AUTO
) -> tuple[Created, Witness, Witness]:
    """A snapshot of a guest that is gone afterwards; its witness before, and at its end."""
    engine = Engine(short / "local", store, allow_local_store=True)
    (short / "vm").mkdir()
    async with booted(qemu, short / "vm") as guest:
        await guest.console.run("busy ram=16 rate=20 disk=512", within=10)
        before = await guest.console.witness(within=20)
        made = await engine.create(
            Machine("web", guest.qmp, guest.agent), Wishes(ram=ram, level=level, max_pause=30)
        )
        await guest.console.run("sleep 1", within=20)
        return made, before, await guest.console.witness(within=20)


@pytest.mark.parametrize(
    ("ram", "level"),
    [(RamChoice.LIVE, Level.OVERLAY), (RamChoice.BACKGROUND, Level.FULL)],
)
async def test_the_two_halves_bring_the_guest_back_by_hand(
    qemu: Path, short: Path, store: Path, ram: RamChoice, level: Level
) -> None:
    made, before, _ = await taken(qemu, short, store, ram, level)
    places = {"LOCAL": short / "local", "STORE": store, "VM": "web", "ID": made.id}
    script = commands("A VM from its two halves")
    with shell(script, TO=short / "back", **places):
        async with Console.open(short / "back/console.sock") as console:
            await console.until("^W ", within=60)  # what is typed before it runs is lost
            found = await console.witness(within=30)
    assert found.ok
    assert found.nonce == before.nonce
    assert found.ram >= before.ram


async def test_the_disks_alone_boot_as_after_a_power_cut(
    qemu72: Path, short: Path, store: Path
) -> None:
    made, before, _ = await taken(qemu72, short, store, RamChoice.LIVE)
    places = {"LOCAL": short / "local", "STORE": store, "VM": "web", "ID": made.id}
    script = commands("A VM from its two halves").partition('sh "$TO/command" &')[0]
    # with a monitor that nobody uses, only to see when the console may be opened
    script += 'echo "-S -monitor unix:$TO/monitor,server=on,wait=off" >>"$TO/cold"\n'
    script += 'sh "$TO/cold" &\nuntil [ -S "$TO/monitor" ]; do sleep 0.01; done\n'
    with shell(script, TO=short / "back", **places):
        async with Console.open(short / "back/console.sock") as console:
            cont(short / "back/monitor")
            seen = await console.until(r"^PREV disk0=(\w+) (\d+) disk1=(\w+) (\d+)\n", within=120)
    assert {seen[1], seen[3]} == {before.nonce}
    assert int(seen[2]) - int(seen[4]) in {0, 1}
    assert int(seen[4]) >= before.ram - 1


def cont(path: Path) -> None:
    """Say `cont` to a human monitor, and see that it was heard."""
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(str(path))
        monitor.settimeout(20)
        monitor.sendall(b"cont\n")
        text = b""
        while text.count(b"(qemu)") < 2:
            text += monitor.recv(4096)


def recorded(image: Path, raw: Path) -> tuple[str, int]:
    """Nonce and counter in an image that nobody has open."""
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    replay = ["/usr/sbin/e2fsck", "-p", "-E", "journal_only", raw]
    subprocess.run(replay, stdout=subprocess.DEVNULL)
    command = ["/usr/sbin/debugfs", "-R", "cat /witness", str(raw)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.match(r"W (\w{16}) (\d{20})", text)
    assert found
    return found[1], int(found[2])


async def test_the_newest_overlays_hold_what_came_after_the_snapshot(
    qemu72: Path, short: Path, store: Path
) -> None:
    _, before, last = await taken(qemu72, short, store, RamChoice.LIVE, Level.OVERLAY)
    assert last.ram > before.ram
    script = commands("The VM itself must be started again")
    with shell(script, LOCAL=short / "local", VM="web") as told:
        disks = dict(line.split() for line in told.splitlines())
    assert set(disks) == {"d0", "d1"}
    for overlay in disks.values():
        nonce, count = recorded(Path(overlay), short / "raw")
        assert nonce == last.nonce
        assert count >= last.ram - 1
