"""RAM that is stored once comes back from where it is: kept here, or on the store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import RamChoice, Wishes
from tests.guest.test_damage import flipped, harmed
from tests.rig.graph import status
from tests.rig.guest import agrees, back, booted
from tests.rig.qemu import binary

pytestmark = pytest.mark.guest
PATIENT = Wishes(max_pause=30)  # no test of the pause


async def fresh(engine: Engine, id: str, vm: str = "web") -> int:
    """The bytes of RAM that the snapshot brought, with the index that tells of all of it."""
    manifest = (await engine.show(vm, id)).manifest
    assert manifest.ram.index is not None
    index = next(one for one in manifest.files if one.name == manifest.ram.index)
    return index.bytes + sum(pack.bytes for pack in manifest.packs if pack.fresh)


def _images(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.glob("*/*.pages")}


def _content(image: bytes) -> int:
    """Where there is content, beyond the part that is looked at each time."""
    return next(at for at in range(1 << 20, len(image), 4096) if any(image[at : at + 4096]))


@pytest.mark.timeout(600)
async def test_a_series_shares_its_ram(short: Path, store: Path, memory: Path) -> None:
    engine = Engine(short / "local", store, allow_local_store=True, ram_images_in=memory)
    local = short / "local/web"
    async with booted(binary("11.1"), short) as guest:
        machine = Machine("web", guest.qmp, guest.agent)
        first = await engine.create(machine, PATIENT)
        before = await guest.console.witness(within=60)
        second = await engine.create(machine, PATIENT)
        assert await status(guest.qemu.witness) == "running"
    # an idle guest has changed next to nothing
    whole, part = await fresh(engine, first.id), await fresh(engine, second.id)
    assert part * 20 <= whole, (part, whole)
    # the pages of the newest are here, and only those
    assert [one.name for one in (local / "ram").iterdir()] == [second.id]
    images = _images(memory)
    assert images
    # a page that is not what it was, and nothing else tells of it
    image = max(images, key=lambda path: path.stat().st_blocks)
    with harmed(image, flipped(_content(images[image]))):
        found = (await engine.verify("web")).findings
        assert any(str(image) in one.what for one in found), found
        # who reads all of it takes no such page
        ready = await engine.prepare_restore("web", Restoration(short / "sound", eager=True))
        assert str(image) in ready.memory.lacking
        assert (short / "sound/ram" / image.name).read_bytes() == images[image]
        shutil.rmtree(short / "sound")
    async with back(engine, "web", Restoration(short / "one")) as (one, console):
        assert one.ram == "mapped"
        here = await console.witness(within=60)
        assert here.ok
        # one that came back is a machine as any other, and what it never touched is in its RAM too
        again = Machine("web", one.machine.qmp, one.machine.agent)
        wishes = Wishes(ram=RamChoice.BACKGROUND, max_pause=30, rebind=True)
        third = await engine.create(again, wishes)
    assert third.ram == "background"
    assert await fresh(engine, third.id) * 5 <= whole
    assert {path: path.read_bytes() for path in images if path.exists()} == {}
    # who brought the pages is deleted: the others have what they need of them
    await engine.delete(machine, first.id)
    shutil.rmtree(local / "ram")
    for id, eager, way in (
        (third.id, False, "demand"),
        (second.id, False, "demand"),
        (third.id, True, "stream"),
    ):
        wish = Restoration(short / f"{way}-{id[-4:]}", eager=eager)
        async with back(engine, "web", wish, id) as (restored, console):
            assert restored.ram == way
            found = await console.witness(within=60)
        assert found.ok, found
        assert found.nonce == before.nonce
        assert found.ram >= (before if id == second.id else here).ram
    for entry in await engine.list("web"):
        assert (await engine.verify("web", entry.id)).findings == []
    # with nothing kept here a snapshot still knows what the store has
    async with back(engine, "web", Restoration(short / "last"), third.id) as (last, _):
        again = Machine("web", last.machine.qmp, last.machine.agent)
        fourth = await engine.create(again, Wishes(max_pause=30, rebind=True))
    assert await fresh(engine, fourth.id) * 5 <= whole
    await agrees(engine, "web", Restoration(short / "fourth"), here)


@pytest.mark.timeout(600)
async def test_two_of_one_image_share_their_ram(short: Path, store: Path) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    wish = Wishes(max_pause=30, ram_from=("golden", "nobody"))
    for folder in ("one", "two"):
        (short / folder).mkdir()
    async with booted(binary("11.1"), short / "one") as guest:
        golden = Machine("golden", guest.qmp, guest.agent)
        lent = await engine.create(golden, PATIENT)
    async with booted(binary("11.1"), short / "two") as guest:
        plain = await engine.create(Machine("plain", guest.qmp, guest.agent), PATIENT)
        before = await guest.console.witness(within=60)
        machine = Machine("web", guest.qmp, guest.agent)
        made = await engine.create(machine, wish)
        assert await status(guest.qemu.witness) == "running"
    whole, part = await fresh(engine, plain.id, "plain"), await fresh(engine, made.id)
    manifest = (await engine.show("web", made.id)).manifest
    taken = [one for one in manifest.packs if one.origin == "golden"]
    assert taken
    assert part * 2 <= whole, (part, whole)
    for one in taken:
        path = store / "web/shared" / one.blake3
        assert path.samefile(store / "golden/shared" / one.blake3)
    # a machine of the same image, which the second one came from, is no more
    await engine.delete(golden, lent.id)
    assert [one.name for one in (store / "golden").iterdir()] == ["lease"]
    assert (await engine.verify("web")).findings == []
    shutil.rmtree(short / "local/web/ram")
    for eager in (True, False):
        async with back(engine, "web", Restoration(short / f"back{eager}", eager=eager)) as (_, at):
            found = await at.witness(within=60)
        assert found.ok, found
        assert found.nonce == before.nonce
        assert found.ram >= before.ram
