"""The local root is full, slow, hangs or fails: the copy does too, and the guest feels nothing.

A write of the guest is bounded by _BOUND, whatever the root does: the measured ones go through
QEMU's main loop, so that they would also show a QEMU that waits for the root itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.wishes import Copying, Level, RamChoice
from qmpsnap.errors import Blocked, Failed
from tests.faults.badfs import BadFs, badfs
from tests.faults.bench import Bench, bench, wishes
from tests.rig import graph
from tests.rig.guest import Guest, blockdev, booted, disk
from tests.rig.qemu import binary
from tests.rig.room import filled, room

T = TypeVar("T")
_BOUND = 0.5  # seconds, on a machine that has other work too; 0.02 is usual
_DATA = range(64, 128)  # 4 MiB a disk
_ROOT = 64 << 20


@pytest.fixture
def bad(short: Path) -> Iterator[BadFs]:
    """A local root that fails when told to."""
    with badfs(short / "local", short / "aside") as it:
        yield it


async def _full(it: Bench) -> None:
    it.guest_writes(1, 2, *_DATA)
    await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.FULL))
    it.guest_writes(*_DATA)


async def _an_inc_lacks_nothing(it: Bench, points: set[str]) -> None:
    """Of the copy that failed nothing is left, nothing is owed, and an increment holds all."""
    assert it.owes() == []
    assert set(it.points()) == points
    assert it.chains() == [["d0.qcow2"], ["d1.raw"]]
    await it.all_is_well()
    made = await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.INC))
    assert it.levels(made.id) == {"inc"}
    assert it.holds(made.id) == it.disks_now()
    await it.all_is_well()


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110  # another process and a thread make it so
            await asyncio.sleep(0.01)


async def _until_so(ask: Callable[[], Awaitable[T]], good: Callable[[T], bool]) -> None:
    async with asyncio.timeout(30):
        while not good(await ask()):  # noqa: ASYNC110  # a monitor tells when it is asked
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("version", "level", "how"),
    [
        ("7.2", Level.FULL, "write 0"),
        ("7.2", Level.FULL, "write 2000000"),
        ("7.2", Level.FULL, "fsync 0"),
        ("7.2", Level.INC, "write 2000000"),
        ("7.2", Level.INC, "fsync 0"),
        ("11.1", Level.INC, "write 6000000"),
    ],
)
async def test_a_root_with_io_errors(
    version: str, level: Level, how: str, bad: BadFs, short: Path, store: Path
) -> None:
    async with bench(binary(version), short, store) as it:
        await _full(it)
        points = set(it.points())
        bad.fails(how)
        with it.busy_guest() as took, pytest.raises(Failed, match="put error") as failed:
            await it.engine().create(it.clean, wishes(RamChoice.NONE, level=level))
        assert bad.happened
        bad.fails()
        assert failed.value.exit_code == 4
        assert f"{bad.path}/vm/" in str(failed.value)
        assert len(took) > 3
        assert max(took) < _BOUND
        await _an_inc_lacks_nothing(it, points)


@pytest.mark.parametrize("level", [Level.FULL, Level.INC])
async def test_a_slow_root(
    level: Level, bad: BadFs, qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        await _full(it)
        bad.fails("slow 0.03")
        with it.busy_guest() as took:
            made = await it.engine().create(it.clean, wishes(RamChoice.NONE, level=level))
        assert bad.happened * 0.03 > 1  # that is how long the copy took at least
        bad.fails()
        assert len(took) > 20
        assert max(took) < _BOUND
        assert it.levels(made.id) == {level.value}
        assert made.pause_ms < 500
        await _an_inc_lacks_nothing(it, set(it.points()))


async def test_a_root_that_hangs(bad: BadFs, qemu72: Path, short: Path, store: Path) -> None:
    async with bench(qemu72, short, store) as it:
        await _full(it)
        slow = wishes(RamChoice.NONE, level=Level.INC, copying=Copying(limit=1 << 20))
        with it.busy_guest() as took:
            making = asyncio.create_task(it.engine().create(it.clean, slow))
            await it.copying()
            bad.fails("hang")
            await _until(lambda: bad.happened > 0)
            before = len(took)
            await _until(lambda: len(took) > before + 50)  # it goes on and on
            assert not making.done()
            bad.fails()
            made = await making
        assert max(took) < _BOUND
        assert it.levels(made.id) == {"inc"}
        await _an_inc_lacks_nothing(it, set(it.points()))


async def test_a_root_that_is_full_is_refused_with_both_figures(
    qemu72: Path, short: Path, store: Path
) -> None:
    with room(short / "local", _ROOT):
        async with bench(qemu72, short, store) as it:
            await _full(it)
            points = set(it.points())
            filler = filled(it.local, leave=18 << 20)  # 16 MiB stay free, and there are 8 to copy
            with pytest.raises(Blocked, match=rf"{16 << 20} to spare .* only \d+ are") as refused:
                await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.FULL))
            assert refused.value.exit_code == 3
            assert str(it.local) in str(refused.value)
            filler.unlink()
            await _an_inc_lacks_nothing(it, points)


@pytest.mark.parametrize("level", [Level.FULL, Level.INC])
@pytest.mark.parametrize("leave", [0, 15 << 20], ids=["to the last byte", "into the reserve"])
async def test_a_root_that_somebody_else_fills_up_during_the_copy(
    level: Level, leave: int, qemu72: Path, short: Path, store: Path
) -> None:
    with room(short / "local", _ROOT):
        async with bench(qemu72, short, store) as it:
            await _full(it)
            points = set(it.points())
            slow = wishes(RamChoice.NONE, level=level, copying=Copying(limit=1 << 20))
            with it.busy_guest() as took:
                making = asyncio.create_task(it.engine().create(it.clean, slow))
                await it.copying()
                filler = filled(it.local, leave=leave)
                with pytest.raises(Failed, match=str(it.local)) as failed:
                    await making
            assert failed.value.exit_code == 4
            assert max(took) < _BOUND
            filler.unlink()
            if it.owes():  # a debt that no byte was left for
                await it.engine().recover(it.clean)
            await _an_inc_lacks_nothing(it, points)


async def test_a_guest_without_room_for_its_overlay_is_not_copied(
    qemu72: Path, short: Path, store: Path
) -> None:
    disks = short / "disks"
    with room(disks, _ROOT):
        async with bench(qemu72, short, store, disks=disks) as it:
            filler = filled(disks, leave=20 << 20)  # two disks of 16 MiB could be rewritten
            with pytest.raises(Blocked, match=rf"{32 << 20} bytes have to be free") as refused:
                await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.FULL))
            assert str(disks) in str(refused.value)
            assert "stopped" in refused.value.hint
            assert await it.all_is_well() == set()
            filler.unlink()
            it.guest_writes(1)
            made = await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.FULL))
            assert it.holds(made.id) == it.disks_now()  # the control
            assert await it.all_is_well() == {made.id}


async def test_a_guest_that_lost_the_room_for_its_overlay_runs_again_after_the_copy(
    qemu72: Path, short: Path, store: Path
) -> None:
    disks = short / "disks"
    with room(disks, 300 << 20):
        image = disk(disks / "d0.qcow2", size="128M")
        drive = blockdev(image, "d0", "qcow2", device="vd0")
        async with booted(qemu72, short, disks=drive) as guest:
            engine = Engine(short / "local", store, allow_local_store=True)
            slow = wishes(RamChoice.NONE, level=Level.FULL, copying=Copying(limit=50_000))
            making = asyncio.create_task(engine.create(Machine("vm", guest.qmp), slow))
            await _until(lambda: any(disks.glob(".qmpsnap-*")))
            await _until_so(lambda: _chain(guest), lambda chain: chain[0] != str(image))
            filler = filled(disks, leave=1 << 20)
            write = "dd if=/dev/zero of=/data/0/big bs=1M count=20 conv=fsync"
            writing = asyncio.create_task(guest.console.run(write, within=60))
            await _until_so(
                lambda: graph.status(guest.qemu.witness), lambda state: state == "io-error"
            )
            assert not making.done()
            filler.unlink()
            await making
            assert await graph.status(guest.qemu.witness) == "running"
            await writing
            assert (await guest.console.witness(within=30)).ok
            assert await _chain(guest) == [str(image)]


async def _chain(guest: Guest) -> list[str]:
    return (await graph.chains(guest.qemu.witness))["vd0"]
