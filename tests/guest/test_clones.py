"""Clones of a real guest: each goes on by itself, and all share the pages of one RAM."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from blake3 import blake3

from qmpsnap import Engine, Machine
from qmpsnap.engine.dependents import standing
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import RamChoice, Wishes
from qmpsnap.errors import LaunchFailed
from tests.rig.console import Console
from tests.rig.graph import ask
from tests.rig.guest import agrees, blockdev, booted, disk
from tests.rig.qemu import binary

pytestmark = pytest.mark.guest
COUNT = 3
MAC = "52:54:00:0a:0b:0c"
GUID = "0b8d3f9c-8d3b-4f4c-9a53-8e6d3a1c5b11"
HWCLOCK = "mkdir -p /sbin && ln -s /bin/busybox /sbin/hwclock"  # the agent wants one
ADDRESS = "cat /sys/class/net/eth0/address"


def of_images(pid: int) -> dict[str, int]:
    """What /proc/PID/smaps says of the mapped page images, in KiB."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    of_each = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.M)
    total: dict[str, int] = {}
    for one in of_each:
        if ".pages\n" in one:
            for name, size in re.findall(r"^(\w+): +(\d+) kB$", one, re.M):
                total[name] = total.get(name, 0) + int(size)
    return total


def digests(folder: Path) -> dict[str, str]:
    return {path.name: blake3(path.read_bytes()).hexdigest() for path in folder.glob("*.pages")}


def devices(folder: Path) -> list[str]:
    return [
        *blockdev(disk(folder / "d0.qcow2"), "d0", "qcow2", device="vd0"),
        *("-netdev", "user,id=n0,hostfwd=tcp:127.0.0.1:0-:22"),
        *("-device", f"virtio-net-pci,netdev=n0,mac={MAC}", "-device", f"vmgenid,guid={GUID}"),
    ]


@pytest.mark.timeout(600)
async def test_clones_go_their_own_ways(short: Path, store: Path) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(binary("7.2"), short, disks=devices(short), also="net") as guest:
        for command in ("ip link set dev eth0 up", "date -s '2020-01-01'", HWCLOCK):
            await guest.console.run(command, within=20)
        before = await guest.console.witness(within=60)
        await engine.create(Machine("web", guest.qmp, guest.agent), Wishes(max_pause=60))
    images = engine.roots.local.ram("web", (await engine.list("web"))[0].id)
    was = digests(images)
    assert was

    # pages from the store are made once; one whose socket somebody else has: none is left
    many = short / "c"
    images.rename(short / "away")
    planned = await engine.prepare_clones("web", Restoration(many), COUNT)
    assert digests(many / "ram") == was
    for one in planned:
        assert f"mem-path={many}/ram/0.pages" in " ".join(one.ready.argv)
        assert not (one.ready.wish.to / "ram").exists()
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(many / "2" / "qmp.sock"))
        with pytest.raises(LaunchFailed):
            async with engine.cloned(planned, detach=True):
                pytest.fail("not all of them are up")
    assert list(many.iterdir()) == []
    assert standing(engine.roots.local, "web", planned[0].ready.pair.id) == []
    (short / "away").rename(images)

    planned = await engine.prepare_clones("web", Restoration(many), COUNT)
    async with engine.cloned(planned) as clones, AsyncExitStack() as stack:
        folders = [clone.restored.ready.wish.to for clone in clones]
        assert folders == [many / "1", many / "2", many / "3"]
        consoles = [
            await stack.enter_async_context(Console.open(folder / "console.sock"))
            for folder in folders
        ]
        used = [of_images(clone.restored.process.pid) for clone in clones]
        assert sum(one["Shared_Clean"] for one in used) > sum(one["Rss"] for one in used) / 2
        macs = [(await console.run(ADDRESS, within=30)).strip() for console in consoles]
        assert len({MAC, *macs}) == COUNT + 1
        assert [clone.macs for clone in clones] == [{"eth0": mac} for mac in macs]
        for console, clone in zip(consoles, clones, strict=True):
            assert clone.clock == "set"
            assert int(await console.run("date +%Y", within=30)) > 2020
        guids = [
            (await ask(clone.restored.machine.qmp, "query-vm-generation-id"))["guid"]
            for clone in clones
        ]
        assert len({GUID, *guids}) == COUNT + 1
        # each writes to its disk what the others do not see
        for number, console in enumerate(consoles):
            await console.run(f"echo {number} >/data/0/mine-{number}; sync", within=30)
        for number, console in enumerate(consoles):
            await console.run("echo 3 >/proc/sys/vm/drop_caches", within=30)
            assert (await console.run("ls /data/0 | grep mine", within=30)) == f"mine-{number}"
            found = await console.witness(within=60)
            assert (found.ok, found.nonce) == (True, before.nonce)
            assert found.ram > before.ram
        for console in consoles:
            assert console.alarms == []
    assert digests(images) == was


@pytest.mark.timeout(600)
async def test_clones_of_their_own_memory_and_of_the_disks(short: Path, store: Path) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(binary("10.0"), short, disks=devices(short), also="net") as guest:
        await guest.console.run("ip link set dev eth0 up", within=20)
        before = await guest.console.witness(within=60)
        await engine.create(Machine("web", guest.qmp, guest.agent), Wishes(max_pause=60))
    planned = await engine.prepare_clones("web", Restoration(short / "e", eager=True), 2)
    assert [one.ready.memory.way for one in planned] == ["stream", "stream"]
    async with engine.cloned(planned) as clones:
        assert [clone.restored.ram for clone in clones] == ["stream", "stream"]
        assert all(of_images(clone.restored.process.pid) == {} for clone in clones)
        for clone in clones:
            async with Console.open(clone.restored.ready.wish.to / "console.sock") as console:
                found = await console.witness(within=60)
                mac = (await console.run(ADDRESS, within=30)).strip()
            assert (found.ok, found.nonce) == (True, before.nonce)
            assert clone.macs == {"eth0": mac}
    assert sorted(path.name for path in (short / "e").iterdir()) == ["1", "2"]

    planned = await engine.prepare_clones("web", Restoration(short / "c", cold=True), 2)
    macs = [one.macs[MAC] for one in planned]
    async with engine.cloned(planned) as clones, AsyncExitStack() as stack:
        assert [clone.restored.ram for clone in clones] == [None, None]
        folders = [clone.restored.ready.wish.to for clone in clones]
        consoles = [
            await stack.enter_async_context(Console.open(folder / "console.sock"))
            for folder in folders
        ]
        for console in consoles:
            await console.until("READY", within=120)
        seen = [(await console.run(ADDRESS, within=30)).strip() for console in consoles]
        assert seen == macs
        nonces = {(await console.witness(within=60)).nonce for console in consoles}
        assert len({before.nonce, *nonces}) == 3


@pytest.mark.timeout(600)
async def test_clones_that_stay_in_memory(short: Path, store: Path, memory: Path) -> None:
    """They are detached, their images come from the store, and are put into memory."""
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(binary("11.1"), short, disks=devices(short), also="net") as guest:
        await guest.console.run("ip link set dev eth0 up", within=20)
        before = await guest.console.witness(within=60)
        await engine.create(Machine("web", guest.qmp, guest.agent), Wishes(max_pause=60))
    shutil.rmtree(engine.roots.local.ram("web"))
    wish = Restoration(short / "c", ram_in=memory)
    planned = await engine.prepare_clones("web", wish, 2)
    image = memory / "0.pages"
    assert image.stat().st_blocks * 512 >= image.stat().st_size  # see ramplace
    pids: list[int] = []
    try:
        async with engine.cloned(planned, detach=True) as clones:
            pids += [clone.restored.process.pid for clone in clones]
        assert [clone.restored.ram for clone in clones] == ["mapped", "mapped"]
        for clone in clones:
            async with Console.open(clone.restored.ready.wish.to / "console.sock") as console:
                found = await console.witness(within=60)
                mac = (await console.run(ADDRESS, within=30)).strip()
            assert (found.ok, found.nonce) == (True, before.nonce)
            assert clone.macs == {"eth0": mac}
        again = clones[0].restored.machine
        wishes = Wishes(ram=RamChoice.BACKGROUND, max_pause=60, rebind=True)
        second = await engine.create(Machine("web", again.qmp, again.agent), wishes)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    assert second.ram == "background"
    await agrees(engine, "web", Restoration(short / "again"), before, second.id)
