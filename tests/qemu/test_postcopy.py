"""A machine runs before its RAM is there: what it touches comes first, and in the end all of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from qmpsnap.errors import DamagedData, GuestLacksPages, LocalFailed, MonitorLost
from qmpsnap.hypervisor.guest import runstate
from qmpsnap.hypervisor.monitor import Monitor, connect
from qmpsnap.hypervisor.vmstate import migration
from qmpsnap.hypervisor.vmstate.postcopy import huge, trouble
from qmpsnap.hypervisor.vmstate.split import Split, split
from tests.rig.qemu import Running, binary, running
from tests.rig.sourced import postcopy, resume
from tests.rig.wire import Witness, witness

_MEMORY = 64  # MiB
_OURS = range(16 << 20, 40 << 20)  # what we put there the firmware leaves alone
_HOLE = (640 << 10, 1 << 20)  # a PC has its screen and its ROMs there
_LINE = ["-M", "pc", "-m", str(_MEMORY), "-nodefaults", "-vga", "std", "-device", "virtio-serial"]
_WAITS = ["-incoming", "defer", "-S"]


@dataclass(slots=True)
class Source:
    """Page images, of which only what QEMU asks for is there until *open*, if *waits*."""

    images: dict[str, Path]
    waits: bool = False
    open: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[tuple[int, int]] = field(default_factory=list)
    breaks: bool = False

    async def ready(self, block: str, start: int, length: int) -> None:
        assert 0 < length <= self.images[block].stat().st_size - start
        if self.breaks and length == 4096:
            raise LocalFailed("the store has gone")
        self.asked.append((start, length))
        if length > 65536 and self.waits:
            await self.open.wait()

    @property
    def requests(self) -> int:
        return sum(length == 4096 for _, length in self.asked)


def _source(parts: Split, *, waits: bool = False) -> Source:
    return Source({image.block: image.path for image in parts.images}, waits)


async def _taken(qemu: Path, home: Path, *more: str) -> Split:
    """A machine with firmware only, taken apart; half of its RAM has known content, and holes."""
    async with running(qemu, *_LINE, *more) as process, connect(process.qmp) as monitor:
        await monitor.execute("stop")
        reading, writing = os.pipe()
        try:
            await monitor.send_fd(writing)
            await monitor.execute("getfd", {"fdname": "out"})
            os.close(writing)
            await monitor.execute("migrate", {"uri": "fd:out"})
            parts = await asyncio.to_thread(split, reading, home)
        finally:
            os.close(reading)
    if more:
        return parts
    with parts.images[0].path.open("r+b") as file:
        for at in range(
            _OURS.start, _OURS.stop, 3 << 16
        ):  # a hole behind each, of twice its length
            content = np.random.default_rng(at).bytes(60 << 10)
            file.seek(at)
            file.write(content)
    return parts


@contextlib.asynccontextmanager
async def _waiting(qemu: Path, *more: str) -> AsyncIterator[tuple[Running, Monitor, Witness]]:
    async with running(qemu, *_LINE, *more, *_WAITS) as process, connect(process.qmp) as monitor:
        with witness(process.witness) as eye:
            yield process, monitor, eye


def _ram(eye: Witness, home: Path) -> bytes:
    """All RAM as the guest sees it, with zeros for its hole."""
    found, path = b"", home / "ram"
    for start, end in ((0, _HOLE[0]), (_HOLE[1], _MEMORY << 20)):
        eye.ask("pmemsave", val=start, size=end - start, filename=str(path))
        found = found.ljust(start, b"\0") + path.read_bytes()
        path.unlink()
    return found


def _same(eye: Witness, parts: Split, home: Path, *, ran: bool) -> None:
    """Every page is that of the image, but for those that a running firmware writes."""
    found = np.frombuffer(_ram(eye, home), np.uint8).reshape(-1, 4096)
    image = np.fromfile(parts.images[0].path, np.uint8).reshape(-1, 4096)
    other = np.flatnonzero((found != image).any(axis=1))
    other = other[(other < _HOLE[0] >> 12) | (other >= _HOLE[1] >> 12)]
    assert not len(other) or ran
    assert ((other < _OURS.start >> 12) | (other >= _OURS.stop >> 12)).all(), other
    assert len(other) < 100
    assert image[_OURS.start >> 12 : _OURS.stop >> 12].any(axis=1).sum() > 1000


async def test_a_guest_runs_on_pages_that_it_asks_for(
    qemu: Path, short: Path, tmp_path: Path
) -> None:
    parts = await _taken(qemu, tmp_path)
    source, told = _source(parts, waits=True), []
    image = np.fromfile(parts.images[0].path, np.uint64)
    async with _waiting(qemu) as (_, monitor, eye):
        assert await trouble(monitor) == ""

        async def run() -> None:
            assert await runstate.query(monitor) is runstate.RunState.PAUSED
            assert (await monitor.execute("query-migrate"))["status"] == "postcopy-active"
            await runstate.let_run(monitor)
            # nothing is pushed yet: what the monitor touches has to be asked for
            for at in _OURS[:: 1 << 18]:
                line = {"command-line": f"xp /1xg {at}"}
                said = await monitor.execute("human-monitor-command", line)
                assert int(said.split()[1], 16) == image[at >> 3], said
            assert source.requests >= 96
            assert not source.open.is_set()
            source.open.set()

        def tell(done: int, of: int) -> None:
            told.append((done, of))

        await postcopy(monitor, parts.stream, source, on_running=run, on_progress=tell)
        assert told[-1] == (_MEMORY << 20, _MEMORY << 20)
        assert eye.ask("query-migrate")["status"] == "completed"
        assert eye.status == "running"
        eye.ask("stop")
        _same(eye, parts, tmp_path, ran=True)
        eye.ask("cont")
        # its RAM is QEMU's own again: a background save takes it
        async with migration.tuned(monitor, {"background-snapshot"}, {}):
            with monitor.listen("MIGRATION") as events:
                await monitor.execute("stop")
                await monitor.execute("migrate", {"uri": "exec:cat >/dev/null"})
                await migration.reach(monitor, events, "completed")
        on = [one["capability"] for one in eye.ask("query-migrate-capabilities") if one["state"]]
        assert "postcopy-ram" not in on


async def test_a_guest_that_lost_its_source_waits_and_takes_a_new_one(
    qemu: Path, short: Path, tmp_path: Path
) -> None:
    parts = await _taken(qemu, tmp_path)
    image = np.fromfile(parts.images[0].path, np.uint64)
    source, at = _source(parts, waits=True), _OURS.stop - (1 << 18)
    look = {"command-line": f"xp /1xg {at}"}
    async with _waiting(qemu) as (process, monitor, eye):
        touched: list[asyncio.Future[str]] = []

        async def run() -> None:
            await runstate.let_run(monitor)
            source.breaks = True
            # QEMU's main loop itself stands at the missing page, and its monitor with it
            asking = asyncio.to_thread(eye.ask, "human-monitor-command", **look)
            touched.append(asyncio.ensure_future(asking))

        with pytest.raises(GuestLacksPages, match="the store has gone"):
            await postcopy(monitor, parts.stream, source, on_running=run)
        assert not touched[0].done()
        whole = _source(parts)
        await resume(monitor, parts.stream, whole, meeting=short / "again")
        assert int((await touched[0]).split()[1], 16) == image[at >> 3]
        assert whole.requests > 0
        assert not (short / "again").exists()
        assert eye.ask("query-migrate")["status"] == "completed"
        assert eye.status == "running"
        eye.ask("stop")
        _same(eye, parts, tmp_path, ran=True)
        assert "postcopy" in process.log.read_text()  # that it paused


async def test_blocks_of_other_backends_come_too(qemu72: Path, tmp_path: Path) -> None:
    """As NUMA nodes have them; one is shared memory, as vhost-user wants it."""
    kinds, size = ("memory-backend-ram", "memory-backend-memfd,share=on"), 32 << 20
    line = ["-smp", "2"]
    for number, kind in enumerate(kinds):
        line += ["-object", f"{kind},id=m{number},size={size}"]
        line += ["-numa", f"node,nodeid={number},memdev=m{number},cpus={number}"]
    parts = await _taken(qemu72, tmp_path, *line)
    source, whole = _source(parts, waits=True), b""
    for image in parts.images:
        with image.path.open("r+b") as file:
            file.seek(16 << 20)
            file.write(image.block.encode() * (4 << 20))
        whole += image.path.read_bytes()
    async with _waiting(qemu72, *line) as (_, monitor, eye):

        async def run() -> None:
            for at in (20 << 20, size + (20 << 20), 21 << 20):
                look = {"command-line": f"xp /1xg {at}"}
                await monitor.execute("human-monitor-command", look)
            assert source.requests >= 3
            source.open.set()

        await postcopy(monitor, parts.stream, source, on_running=run)
        assert list(source.images) == ["m0", "m1"]
        found = _ram(eye, tmp_path)
    assert found[_HOLE[1] :] == whole[_HOLE[1] :]


async def test_another_session_takes_over_from_one_that_was_cut(
    short: Path, tmp_path: Path
) -> None:
    """As when the engine is killed: its ends of the wire and of the monitor close."""
    qemu = binary("11.1")
    parts = await _taken(qemu, tmp_path)
    source, loaded = _source(parts, waits=True), asyncio.Event()

    async def run() -> None:
        loaded.set()

    async with running(qemu, *_LINE, *_WAITS) as process:
        with witness(process.witness) as eye:
            async with connect(process.qmp) as monitor:
                going = postcopy(monitor, parts.stream, source, on_running=run)
                task = asyncio.ensure_future(going)
                await loaded.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            eye.until(lambda: eye.ask("query-migrate")["status"] == "postcopy-paused", within=20)
            source.waits = False
            async with connect(process.qmp) as monitor:
                await resume(monitor, parts.stream, source, meeting=short / "again")
            assert eye.status == "paused"
            _same(eye, parts, tmp_path, ran=False)


async def test_a_qemu_that_ends_is_not_one_that_waits(qemu: Path, tmp_path: Path) -> None:
    parts = await _taken(qemu, tmp_path)
    async with _waiting(qemu) as (process, monitor, _):

        async def run() -> None:
            process.kill()
            await asyncio.Event().wait()

        with pytest.raises(MonitorLost):
            await postcopy(monitor, parts.stream, _source(parts, waits=True), on_running=run)


async def test_what_cannot_be_is_refused_before_anything_is_loaded(
    qemu72: Path, tmp_path: Path
) -> None:
    parts = await _taken(qemu72, tmp_path)
    source, image = _source(parts), parts.images[0].path

    async def never() -> None:
        raise AssertionError

    async with _waiting(qemu72) as (_, monitor, eye):
        os.truncate(image, (_MEMORY << 20) - 4096)
        with pytest.raises(DamagedData, match="bytes, and its RAM block"):
            await postcopy(monitor, parts.stream, source, on_running=never)
        os.truncate(image, _MEMORY << 20)
        with pytest.raises(DamagedData, match=r"0 pages of RAM block pc\.ram"):
            await postcopy(monitor, parts.stream, Source({}), on_running=never)
        with pytest.raises(DamagedData, match="no RAM block m1"):
            await postcopy(monitor, parts.stream, Source({"m1": image}), on_running=never)
        assert eye.status == "inmigrate"
        # nothing of this spoiled it; an unwilling caller has the last word
        with pytest.raises(LocalFailed, match="not now"):
            await postcopy(monitor, parts.stream, source, on_running=_unwilling)
    async with _waiting(qemu72, "-M", "q35") as (process, monitor, _):
        with pytest.raises(MonitorLost):
            await postcopy(monitor, parts.stream, source, on_running=never)
        assert "pc-i440fx" in process.log.read_text()


async def _unwilling() -> None:
    raise LocalFailed("not now")


def _as_nobody(qemu: Path) -> tuple[str, str]:
    said = subprocess.run([qemu, "-help"], capture_output=True, text=True, check=True).stdout
    return ("-runas", "nobody") if "-runas" in said else ("-run-with", "user=nobody")


async def test_a_qemu_that_cannot_says_so_first(qemu: Path, tmp_path: Path) -> None:
    file = f"memory-backend-file,id=m0,size=64M,share=off,mem-path={tmp_path}/ram"
    # nobody may not have a userfaultfd for what the kernel touches
    for line, told in (
        (_as_nobody(qemu), "ostcopy is not supported"),
        (("-object", file), "m0 is a file"),
    ):
        async with _waiting(qemu, *line) as (_, monitor, eye):
            assert told in await trouble(monitor)
            assert eye.status == "inmigrate"
            look = eye.ask("query-migrate-capabilities")
            assert [one["capability"] for one in look if one["state"]] == []


def test_huge_pages_are_named() -> None:
    text = "Block Name    PSize   Offset\n  pc.ram    4 KiB  0x0 0x1 0x1\n m0  2 MiB  0x0 0x2 0x2\n"
    assert huge(text.splitlines()) == "RAM block m0 is made of pages of 2 MiB"
