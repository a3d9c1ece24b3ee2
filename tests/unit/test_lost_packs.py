"""Packs that are lost or damaged: nobody relies on them, and what waits for them is made again."""

from __future__ import annotations

import shutil
from contextlib import aclosing

import pytest

from qmpsnap.engine import ramknown, ramstore, verify
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.ship import ship, ship_waiting
from qmpsnap.errors import NotShipped, SnapshotUnknown
from qmpsnap.store import half, hurt, pages, wire
from qmpsnap.store.manifest import Manifest
from qmpsnap.store.packcheck import Checked
from qmpsnap.store.remote import Store
from tests.rig.halves import names
from tests.rig.packed import IDS, Series
from tests.rig.ram import page

IMAGE = {at: page(at) for at in range(48)}


def silent(_what: str, _done: int, _total: int) -> None:
    """A report that nobody reads."""


class Host(Series):
    """A VM of a host with an engine; its snapshots keep their page images."""

    def roots(self, **other: object) -> Roots:
        store = Store(self.store, within=20)
        return Roots(self.local, store, allow_local_store=True, **other)  # type: ignore[arg-type]

    def taken(self, id: str, pages_of: dict[int, bytes], *known: str, **other: object) -> Manifest:
        made = self.spool(id, pages_of, *known, **other)  # type: ignore[arg-type]
        folder = self.local.ram(self.vm, id)
        folder.mkdir(parents=True)
        shutil.copy(self.path / id / "pc.ram", folder / "0.pages")
        (folder / "ram.index").write_bytes(self.known[id].encode())
        pages.seal(folder, id, [("pc.ram", folder / "0.pages", len(pages_of))])
        return made

    async def known_now(self, *lenders: str) -> tuple[list[set[str]], list[tuple[str, set[str]]]]:
        """The packs of all indexes that a snapshot taken now would know."""
        found = await ramknown.known(self.roots(), self.vm, lenders)

        def used(index):
            return {index.pack(row).blake3 for row in range(len(index))}

        return [used(one) for one in found.own], [(vm, used(one)) for vm, one in found.lent]


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def spoil(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


async def test_what_a_spool_lacks_is_made_again(host):
    """Another host's removal took a pack; the pages of the snapshot are still here."""
    (pack,) = host.taken(IDS[0], IMAGE).packs
    await ship(host.roots(), "web", IDS[0], silent)
    host.taken(IDS[1], {at: page(at) for at in range(30)} | {60: page("x")}, IDS[0])
    (host.store.shared("web") / pack.blake3).unlink()
    delivered, failed = await ship_waiting(host.roots(), "web", silent)
    assert [one.id for one in delivered] == [IDS[1]]
    assert failed == []
    host.whole(IDS[1])
    # nothing of it is left here; and the older one says what it lacks
    assert names(host.local.shared("web")) == []
    (problem,) = host.verify(IDS[0])
    assert "lost" in problem.what
    # what is known now is all there, by its old name
    own, _ = await host.known_now()
    assert any(pack.blake3 in one for one in own)


async def test_without_pages_it_waits(host):
    (pack,) = host.taken(IDS[0], IMAGE).packs
    await ship(host.roots(), "web", IDS[0], silent)
    host.taken(IDS[1], IMAGE | {60: page("x")}, IDS[0])
    (host.store.shared("web") / pack.blake3).unlink()
    content = (host.local.ram("web", IDS[1]) / "0.pages").read_bytes()
    shutil.rmtree(host.local.ram("web"))
    before = names(host.local.shared("web"))
    with pytest.raises(NotShipped, match=pack.blake3) as failed:
        await ship(host.roots(), "web", IDS[1], silent)
    assert failed.value.packs == (pack.blake3,)
    assert "page images" in failed.value.hint
    assert names(host.local.shared("web")) == before
    # a page image that is not what it was is none
    folder = host.local.ram("web", IDS[1])
    folder.mkdir(parents=True)
    (folder / "ram.index").write_bytes(host.known[IDS[1]].encode())
    (folder / "0.pages").write_bytes(b"?" + content[1:])
    with pytest.raises(NotShipped):
        await ship(host.roots(), "web", IDS[1], silent)
    (folder / "0.pages").write_bytes(content)
    await ship(host.roots(), "web", IDS[1], silent)
    host.whole(IDS[1])


@pytest.mark.parametrize("aside", [False, True])
async def test_two_that_need_different_parts_of_it(host, aside):
    (pack,) = host.taken(IDS[0], IMAGE).packs
    await ship(host.roots(), "web", IDS[0], silent)
    parts = [range(16), range(8, 32), range(28, 48)]
    for id, part in zip(IDS[1:4], parts, strict=True):
        host.taken(id, {at: page(at) for at in part}, IDS[0])
    folder = host.store.shared("web")
    (folder / pack.blake3).unlink()
    await host.roots().store.remove("web", IDS[0], sweep=False)
    for number, id in enumerate(IDS[1:4], 1):
        await ship(host.roots(ram_images=3), "web", id, silent)
        if aside:  # a sweep that died has left them so
            for one in names(folder):
                (folder / one).rename(folder / (one.removesuffix(".going") + ".going"))
        host.whole(*IDS[1 : number + 1])
    await host.roots().store.sweep("web")
    host.whole(*IDS[1:4])
    left = names(folder)
    assert len([one for one in left if "." not in one]) == 1
    for number, id in enumerate(IDS[1:4], 2):
        host.remove(id)
        host.whole(*IDS[number:4])
    assert names(host.store.vm("web")) == ["lease"]


async def test_a_lost_pack_is_not_relied_on(host):
    first = host.taken(IDS[0], IMAGE).packs[0].blake3
    assert await host.known_now() == ([{first}], [])  # on its way
    await ship(host.roots(), "web", IDS[0], silent)
    second = host.taken(IDS[1], IMAGE | {60: page("x")}, IDS[0]).packs[1].blake3
    await ship(host.roots(), "web", IDS[1], silent)
    assert await host.known_now() == ([{first, second}], [])
    (host.store.shared("web") / first).unlink()
    assert await host.known_now() == ([{second}], [])
    # with no index here, by the store's
    shutil.rmtree(host.local.ram("web"))
    assert await host.known_now() == ([{second}], [])
    path = host.store.shared("web") / second
    path.write_bytes(path.read_bytes()[:-1])
    assert await host.known_now() == ([set()], [])


async def test_a_store_that_is_not_there_loses_nothing(host):
    pack = host.taken(IDS[0], IMAGE).packs[0].blake3
    await ship(host.roots(), "web", IDS[0], silent)
    # one that did not answer before is not asked
    mute = Roots(host.local, Store(host.store, command=("touch", str(host.path / "asked"))))
    index = (await ramknown.known(mute, "web", None)).own[0]
    assert {index.pack(row).blake3 for row in range(len(index))} == {pack}
    assert not (host.path / "asked").exists()
    host.store.path.rename(host.path / "elsewhere")
    assert await host.known_now() == ([{pack}], [])
    assert await host.known_now("web2") == ([{pack}], [])


async def test_all_of_a_vm_read_each_pack_once(host):
    packs = set[str]()
    for step, id in enumerate(IDS[:4]):
        made = host.taken(id, IMAGE | {60: page(step)}, *IDS[max(0, step - 1) : step])
        packs |= {one.blake3 for one in made.packs}
        await ship(host.roots(), "web", id, silent)
    heard: list[str] = []

    def tell(done: int, total: int, what: str) -> None:
        if done == total and what.removeprefix("reading ") in packs:
            heard.append(what)

    checked = Checked()
    for id in IDS[:4]:
        request = wire.Verify(root=str(host.store.path), vm="web", id=id, seal=None)
        assert half.verify(host.store, request, tell, checked) == []
    assert sorted(heard) == sorted(f"reading {one}" for one in packs)
    found = [one async for one in verify.verify_all(host.roots(), "web", silent)]
    assert [one.id for one in found] == IDS[:4]
    assert not any(it.where.startswith("shared") for one in found for it in one.findings)
    # what is damaged is told for each, with what it has lost of it
    spoil(host.store.shared("web") / made.packs[0].blake3)
    async with aclosing(verify.verify_all(host.roots(), "web", silent)) as each:
        told = [[it.what for it in one.findings] async for one in each]
    assert all(any("1 chunks are lost" in what for what in one) for one in told)
    with pytest.raises(SnapshotUnknown):
        await anext(verify.verify_all(host.roots(), "nobody", silent))


async def test_verify_remembers_what_is_damaged(host, tmp_path):
    made = host.taken(IDS[0], IMAGE)
    pack = made.packs[0].blake3
    await ship(host.roots(), "web", IDS[0], silent)
    host.taken(IDS[1], IMAGE | {60: page("x")}, IDS[0])
    await ship(host.roots(), "web", IDS[1], silent)
    found = await verify.verify(host.roots(), "web", IDS[0], silent)
    assert not any(one.where.startswith("shared") for one in found.findings)
    assert found.hint == ""
    # another VM has a link to it
    (tmp_path / "g").mkdir()
    golden = Series(tmp_path / "g", "golden", host.store)
    golden.spool(IDS[4], IMAGE, lent=[("web", host.known[IDS[0]])])
    golden.ship(IDS[4])
    spoil(host.store.shared("web") / pack)
    found = await verify.verify(host.roots(), "web", IDS[0], silent)
    told = [one.what for one in found.findings if one.where == f"shared/{pack}"]
    assert any("chunks are lost" in one for one in told)
    assert any(f"needed by golden {IDS[4]}, {IDS[1]}, too" in one for one in told)
    assert "create" in found.hint
    assert hurt.packs(host.local, "web") == {pack}
    own, _ = await host.known_now()
    assert own == [{one.blake3 for one in host.known[IDS[1]].packs} - {pack}]
    # the same pack comes again, whole: all that need it are as they were
    again = host.taken(IDS[2], IMAGE)
    assert again.packs[0].blake3 == pack
    assert again.packs[0].fresh
    await ship(host.roots(), "web", IDS[2], silent)
    assert hurt.packs(host.local, "web") == set()
    host.whole(*IDS[:3])
    # or somebody has put it right
    hurt.seen(host.local, "web", {pack, "ab" * 32}, ())
    await verify.verify(host.roots(), "web", IDS[1], silent)
    assert hurt.packs(host.local, "web") == {"ab" * 32}


def test_a_note_that_cannot_be_read_is_none(host):
    host.local.path.mkdir()
    hurt.seen(host.local, "web", (), ("ab" * 32,))
    assert not host.local.hurt("web").exists()
    hurt.seen(host.local, "web", ("ab" * 32,), ())
    assert hurt.packs(host.local, "web") == {"ab" * 32}
    host.local.hurt("web").write_text("{")
    assert hurt.packs(host.local, "web") == set()
    for _ in range(2):
        hurt.forget(host.local, "web")
    assert not host.local.hurt("web").exists()


async def test_who_lends(host, tmp_path):
    """Only what is on the store, of the newest pair; known by what is here, else by the store."""
    (tmp_path / "g").mkdir()
    golden = Host(tmp_path / "g", "golden", host.store)
    golden.local = host.local  # two VMs of one host
    first = golden.taken(IDS[0], IMAGE).packs[0].blake3
    assert await host.known_now("golden") == ([], [])  # it is not shipped
    await ship(golden.roots(), "golden", IDS[0], silent)
    assert await host.known_now("golden", "golden", "web", "nobody") == (
        [],
        [("golden", {first})],
    )
    # of another host
    shutil.move(host.local.vm("golden"), tmp_path / "elsewhere")
    assert await host.known_now("golden") == ([], [("golden", {first})])
    (host.store.shared("golden") / first).unlink()
    assert await host.known_now("golden") == ([], [("golden", set())])


async def test_page_images_stay_until_what_is_lent_has_come(host, tmp_path):
    """The store went away between the look and the shipping, and the other VM with its packs."""
    (tmp_path / "g").mkdir()
    golden = Series(tmp_path / "g", "golden", host.store)
    golden.spool(IDS[0], IMAGE | {61: page("golden")})
    golden.ship(IDS[0])
    lent = [("golden", golden.known[IDS[0]])]
    for id in IDS[1:3]:
        host.taken(id, IMAGE | {60: page(id)}, lent=lent)
    # who cannot ask the store does not rely on what it has still to give
    for known in (
        await ramknown.known(host.roots(), "web", None),
        await ramknown.known(Roots(host.local, Store(host.store, command=("false",))), "web", []),
    ):
        assert [len(one) for one in known.own] == [1, 1]
    roots = host.roots(ram_images=0)
    await ramstore.trimmed(roots, "web")
    assert {"0.pages", "pages.json"} <= set(names(host.local.ram("web", IDS[1])))
    golden.remove(IDS[0])
    delivered, failed = await ship_waiting(roots, "web", silent)
    assert [one.id for one in delivered] == IDS[1:3]
    assert failed == []
    host.whole(*IDS[1:3])
    assert names(host.local.ram("web")) == [IDS[2]]
    assert "0.pages" not in names(host.local.ram("web", IDS[2]))
