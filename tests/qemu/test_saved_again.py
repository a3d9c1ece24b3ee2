"""A mapped machine is saved again: in the background where its images are in memory."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration, Restored
from qmpsnap.engine.wishes import RamChoice, Wishes
from qmpsnap.errors import Blocked, LocalFailed
from qmpsnap.hypervisor.monitor import connect
from qmpsnap.hypervisor.vmstate.session import RamMode
from tests.qemu.test_mapping import COUNTER, MIB, NOISE, VERSIONS, counted, counts_on, seen
from tests.rig.qemu import binary, running
from tests.rig.room import room

SIZE = 32 * MIB
# the counter and what it writes, the firmware's clock and stacks
BUSY = {0, 6, 7, *range(0x20, 0x30), *range(0xE0, 0xF0)}
BACKGROUND = Wishes(ram=RamChoice.BACKGROUND, max_pause=30, rebind=True)
LIVE = Wishes(ram=RamChoice.LIVE, max_pause=30, rebind=True)


def touched(pid: int) -> int:
    """Bytes of the mapped page images that the process has read or written."""
    for one in re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.M
    ):
        if ".pages" in one.partition("\n")[0]:
            found = re.search(r"^Rss: +(\d+) kB$", one, re.M)
            assert found is not None
            return int(found[1]) << 10
    raise AssertionError("no image is mapped")


def differing(one: bytes, other: bytes) -> set[int]:
    """The numbers of the pages that are not the same."""
    assert len(one) == len(other) == SIZE
    return {
        at // 4096 for at in range(0, SIZE, 4096) if one[at : at + 4096] != other[at : at + 4096]
    } - BUSY


def there(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def machine(back: Restored) -> Machine:
    return Machine("web", back.machine.qmp)


async def kept(engine: Engine) -> tuple[str, Path]:
    """The newest snapshot, and its page image as QEMU would map it."""
    id = (await engine.list("web"))[-1].id
    folder = engine.roots.local.ram("web", id)
    link = folder / "images"
    return id, (link.readlink() if link.is_symlink() else folder) / "0.pages"


async def fresh(engine: Engine, id: str) -> int:
    packs = (await engine.show("web", id)).manifest.packs
    return sum(pack.bytes for pack in packs if pack.fresh)


def written(folder: Path) -> list[str]:
    """The options of a machine that counts, with noise in its RAM."""
    (folder / "boot").write_bytes((COUNTER.ljust(510, b"\0") + b"\x55\xaa").ljust(MIB, b"\0"))
    (folder / "noise").write_bytes(os.urandom(2 * MIB))
    words = f"-M pc -m 32 -nodefaults {NOISE}{8 * MIB:#x} -drive file=boot,format=raw,if=virtio"
    return words.split()


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_mapped_machine_is_saved_again(
    version: str, short: Path, store: Path, memory: Path
) -> None:
    on_disk = Engine(short / "local", store, allow_local_store=True)
    engine = Engine(short / "local", store, allow_local_store=True, ram_images_in=memory)
    async with running(binary(version), *written(short), directory=short) as vm:
        async with connect(vm.qmp) as monitor:
            await counts_on(monitor, 0)
        first = await on_disk.create(Machine("web", vm.qmp), LIVE)
        async with connect(vm.qmp) as monitor:
            await monitor.execute("stop")
            (was,) = await seen(monitor, [(0, SIZE)], short / "ram")
    assert was[8 * MIB : 10 * MIB] == (short / "noise").read_bytes()

    ready = await on_disk.prepare_restore("web", Restoration(short / "one"))
    async with on_disk.restored(ready) as back:
        assert back.ram == "mapped"
        with pytest.raises(Blocked, match=r"mapped from .*0\.pages, on a disk") as no:
            await engine.plan(machine(back), BACKGROUND)
        assert "ram_images_in" in no.value.hint
        plan = await engine.plan(machine(back), Wishes(rebind=True))
        assert plan.modes == (RamMode.LIVE,)
        assert "mapped from" in plan.why
        second = await engine.create(machine(back), Wishes(max_pause=30, rebind=True))

    # all that QEMU may read is there, and takes no more of the host's memory later
    id, image = await kept(engine)
    assert (id, image.parent.parent) == (second.id, memory)
    assert image.stat().st_blocks * 512 >= SIZE
    assert {path.stat().st_mode & 0o777 for path in (image.parent, image.parent.parent)} == {0o700}
    assert differing(image.read_bytes(), was) == set()
    content = image.read_bytes()
    ready = await engine.prepare_restore("web", Restoration(short / "two"))
    assert f"mem-path={image}" in " ".join(ready.argv)
    async with engine.restored(ready) as back:
        assert back.ram == "mapped"
        assert touched(back.process.pid) < SIZE // 8  # most of it nobody has read before
        plan = await engine.plan(machine(back), Wishes(rebind=True))
        assert plan.modes == ((RamMode.LIVE,) if version == "7.2" else tuple(plan.modes))
        assert (RamMode.BACKGROUND in plan.modes) == (version != "7.2")
        third = await engine.create(machine(back), BACKGROUND)
        assert touched(back.process.pid) == SIZE
        assert image.parent.exists() is False  # the older image gave way, and is still mapped
        async with connect(back.machine.qmp) as monitor:
            await counts_on(monitor, await counted(monitor))
            await monitor.execute("stop")
            (now,) = await seen(monitor, [(0, SIZE)], short / "ram")
    assert differing(now, was) == set()
    id, image = await kept(engine)
    assert id == third.id
    assert differing(image.read_bytes(), was) == set()
    assert content != image.read_bytes()
    whole = await fresh(engine, first.id)
    assert max([await fresh(engine, one.id) for one in (second, third)]) * 8 < whole
    assert there(memory) == [image.parent.name]

    # the host has been started anew: what was in memory is gone
    shutil.rmtree(memory)
    ready = await engine.prepare_restore("web", Restoration(short / "three"))
    async with engine.restored(ready) as back:
        assert back.ram == "demand"
        async with connect(back.machine.qmp) as monitor:
            await monitor.execute("stop")
            (now,) = await seen(monitor, [(0, SIZE)], short / "ram")
            await monitor.execute("cont")
        assert differing(now, was) == set()
        fourth = await engine.create(machine(back), LIVE)
    assert await fresh(engine, fourth.id) * 8 < whole
    assert (await kept(engine))[1].parent.parent == memory
    assert (await engine.verify("web", fourth.id)).findings == []
    await engine.delete(Machine("web"), fourth.id)
    assert there(memory) == []


@pytest.fixture
def small(memory: Path) -> Iterator[Path]:
    """A file system in memory that holds one image, and little more."""
    with room(memory.parent / "small", SIZE + 2 * MIB) as root:
        yield root


def filled(folder: Path) -> None:
    """No page is left there."""
    room = os.statvfs(folder)
    with (folder / str(room.f_bavail)).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize)
    assert os.statvfs(folder).f_bavail == 0


async def test_memory_that_is_full_ends_no_machine(
    short: Path, store: Path, memory: Path, small: Path
) -> None:
    """Who reads a hole of a file in memory takes a page, and is killed when there is none."""
    engine = Engine(short / "local", store, allow_local_store=True, ram_images_in=small / "images")
    async with running(binary("11.1"), *written(short), directory=short) as vm:
        async with connect(vm.qmp) as monitor:
            await counts_on(monitor, 0)
        await engine.create(Machine("web", vm.qmp), LIVE)
    assert (await kept(engine))[1].is_relative_to(small)
    ready = await engine.prepare_restore("web", Restoration(short / "one"))
    async with engine.restored(ready) as back:
        assert back.ram == "mapped"
        filled(small)
        second = await engine.create(machine(back), BACKGROUND)
        async with connect(back.machine.qmp) as monitor:
            await counts_on(monitor, await counted(monitor))
            await monitor.execute("stop")
            (now,) = await seen(monitor, [(0, SIZE)], short / "ram")
    # what does not fit is told before anything starts, and nothing is left of it
    filled(small)
    with pytest.raises(LocalFailed):
        await engine.prepare_restore("web", Restoration(short / "two", ram_in=small / "put"))
    assert there(small / "put") == there(short / "two") == []
    ready = await engine.prepare_restore("web", Restoration(short / "two", ram_in=memory / "put"))
    async with engine.restored(ready) as back:
        assert back.ram == "mapped"
        plan = await engine.plan(machine(back), BACKGROUND)
        assert plan.modes == (RamMode.BACKGROUND,)
    id, image = await kept(engine)
    assert id == second.id
    assert (memory / "put/0.pages").read_bytes() == image.read_bytes()
    assert image.is_relative_to(short)  # the older one gave way, but is mapped still
    assert differing(image.read_bytes(), now) == set()
