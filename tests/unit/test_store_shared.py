"""What snapshots share: there once, for as long as one of them needs it, whatever is cut off."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3

from qmpsnap.errors import DigestMismatch, LocalFailed, StoreError
from qmpsnap.store import files, removal, shared, shipping, sweeping, wire
from qmpsnap.store.layout import LocalRoot, StoreRoot
from qmpsnap.store.manifest import FileEntry, Manifest, Shared, decode, encode
from qmpsnap.store.remote import Store
from tests.rig.halves import ID, LATER, names, spooled

KERNEL = b"a kernel" * 5000
THIRD = "20261122T165059000Z"
DIGEST = blake3(KERNEL).hexdigest()


@pytest.fixture
def local(tmp_path):
    return LocalRoot(tmp_path / "local")


@pytest.fixture
def store(tmp_path):
    (tmp_path / "store").mkdir()
    return Store(StoreRoot(tmp_path / "store"), within=20)


def waiting(local: LocalRoot, id: str, kernel: Path) -> Path:
    """A sealed spool that shares *kernel* with others."""
    spool = spooled(local, id=id)
    notes, troubles = shared.keep(local, "web", [str(kernel)])
    assert troubles == {}
    path = spool / "manifest.json"
    note = notes[str(kernel)]
    one = Shared(option="kernel", path=str(kernel), bytes=note.bytes, blake3=note.blake3)
    sealed = decode(path.read_bytes(), Manifest, path)
    # twice under one digest: kernel and initrd may well be the same file
    path.write_bytes(encode(msgspec.structs.replace(sealed, shared=[one, one])))
    return spool


@pytest.fixture
def kernel(tmp_path):
    (tmp_path / "real").write_bytes(KERNEL)
    (tmp_path / "vmlinuz").symlink_to("real")
    return tmp_path / "vmlinuz"


async def send(store: Store, local: LocalRoot, id: str, kernel: Path) -> None:
    await store.ship(waiting(local, id, kernel), "web", id, shared=local.shared("web"))


async def test_one_copy_for_all_until_the_last_goes(store, local, kernel):
    await send(store, local, ID, kernel)
    copy = store.root.shared("web") / DIGEST
    first = copy.stat()
    assert first.st_mode & 0o777 == 0o600
    await send(store, local, LATER, kernel)
    assert copy.stat() == first
    assert await store.verify("web", LATER) == []
    assert (await store.catalogue("web")).foreign == []
    await store.remove("web", ID)
    assert copy.stat().st_ino == first.st_ino
    await store.remove("web", LATER)
    assert names(store.root.vm("web")) == []


async def test_a_damaged_one_is_named_by_all_who_need_it(store, local, kernel, tmp_path):
    await send(store, local, ID, kernel)
    copy = store.root.shared("web") / DIGEST
    name = f"shared/{DIGEST}"
    await store.fetch("web", ID, name, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == KERNEL
    copy.write_bytes(KERNEL[:-1] + b"!")
    (problem,) = await store.verify("web", ID)
    assert problem.file == name
    assert (await store.glance("web", ID, [])).troubles == {}
    assert list((await store.glance("web", ID, [], whole=[name])).troubles) == [name]
    copy.write_bytes(KERNEL[:-1])
    assert list((await store.glance("web", ID, [])).troubles) == [name]
    # the next snapshot that needs it puts it right
    await send(store, local, LATER, kernel)
    assert await store.verify("web", ID) == []
    copy.unlink()
    assert [one.file for one in await store.verify("web", ID)] == [name]


def request_for(store: Store, local: LocalRoot, spool: Path, id: str = ID) -> wire.Ship:
    """The worker's request, for what is to go wrong inside it."""
    return wire.Ship(
        root=str(store.root.path),
        vm="web",
        id=id,
        spool=str(spool),
        device=None,
        shared=str(local.shared("web")),
    )


def forgotten(store: Store, id: str) -> None:
    """The snapshot's folder goes, and nothing else."""
    shutil.rmtree(store.root.snapshot("web", id))


def quiet(_done: int, _total: int, _what: str) -> None:
    """Progress that nobody is told of."""


@pytest.mark.parametrize("trouble", ["damaged here", "no room there"])
async def test_what_older_snapshots_need_stays_when_a_delivery_fails(
    store, local, kernel, monkeypatch, trouble
):
    await send(store, local, ID, kernel)
    copy = store.root.shared("web") / DIGEST
    spool = waiting(local, LATER, kernel)
    openly, write = files.opened, files.write_all

    def failing(path, side):
        if path == copy:
            raise StoreError(f"{path}: input/output error (EIO)")
        return openly(path, side)

    def full(descriptor, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "opened", failing)
        if trouble == "damaged here":
            (local.shared("web") / DIGEST).write_bytes(KERNEL.upper())
        else:
            patch.setattr(files, "write_all", full)
        with pytest.raises((StoreError, DigestMismatch)):
            shipping.ship(store.root, request_for(store, local, spool, LATER), quiet)
        assert names(store.root.shared("web")) == [DIGEST]
        assert copy.read_bytes() == KERNEL
        # as soon as there is a good copy, a new one takes the place of what cannot be opened
        patch.setattr(files, "write_all", write)
        (local.shared("web") / DIGEST).write_bytes(KERNEL)
        heard: list[str] = []
        request = request_for(store, local, spool, LATER)
        shipping.ship(store.root, request, lambda _done, _total, what: heard.append(what))
        assert f"copying shared/{DIGEST}" in heard
    assert await store.verify("web", ID) == []
    assert names(store.root.shared("web")) == [DIGEST]


def test_two_hosts_deliver_the_same_one(store, local, kernel):
    """The second starts while the first is writing, and is done before it."""
    request = request_for(store, local, waiting(local, ID, kernel))
    other = request_for(store, local, waiting(local, LATER, kernel), LATER)
    heard = []

    def meanwhile(_done: int, _total: int, what: str) -> None:
        if what == f"copying shared/{DIGEST}" and not heard:
            heard.append(what)
            shipping.ship(store.root, other, quiet)

    shipping.ship(store.root, request, meanwhile)
    assert heard
    assert names(store.root.shared("web")) == [DIGEST]
    assert (store.root.shared("web") / DIGEST).read_bytes() == KERNEL


async def test_what_cannot_be_judged_is_not_removed(store, local, kernel):
    await send(store, local, ID, kernel)
    folder = store.root.shared("web")
    (folder / "none's").touch()
    other = store.root.snapshot("web", LATER)
    other.mkdir()  # as of one that is just being shipped
    sweeping.sweep(store.root, "web")
    assert names(folder) == sorted([DIGEST, "none's"])
    (other / "manifest.json").write_text("{")
    sweeping.sweep(store.root, "web")
    assert names(folder) == sorted([DIGEST, "none's"])
    (other / "manifest.json").unlink()
    other.rmdir()
    sweeping.sweep(store.root, "web")
    assert names(folder) == [DIGEST]


async def test_a_sweep_that_was_cut_off_is_made_good(store, local, kernel):
    await send(store, local, ID, kernel)
    folder = store.root.shared("web")
    (folder / DIGEST).rename(folder / f"{DIGEST}.going")
    (folder / "x.going").touch()
    sweeping.sweep(store.root, "web")
    assert names(folder) == [DIGEST]
    # the snapshot's folder went, and nothing else: who removes it again does the rest
    (folder / f"{DIGEST}.going").touch()
    store.root.manifest("web", ID).unlink()
    for path in sorted(store.root.snapshot("web", ID).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    store.root.snapshot("web", ID).rmdir()
    await store.remove("web", ID)
    assert names(store.root.vm("web")) == []


@pytest.mark.parametrize("taken_back", [False, True])
async def test_a_sweep_that_breaks_off_takes_nothing_away(
    store, local, kernel, monkeypatch, taken_back
):
    """It put the file aside, then another host shipped, then the store had a trouble."""
    folder, look, looks = store.root.shared("web"), sweeping._Look.needed, []
    await send(store, local, ID, kernel)
    spool = waiting(local, LATER, kernel)
    forgotten(store, ID)

    def interrupted(looking):
        looks.append(looking)
        if len(looks) == 2:
            shipping.ship(store.root, request_for(store, local, spool, LATER), quiet)
            if not taken_back:
                (folder / DIGEST).rename(folder / f"{DIGEST}.going")
            raise OSError(errno.ESTALE, "Stale file handle")
        return look(looking)

    with monkeypatch.context() as patch:
        patch.setattr(sweeping._Look, "needed", interrupted)
        with pytest.raises(StoreError, match="ESTALE"):
            sweeping.sweep(store.root, "web")
    assert len(looks) == 2
    assert names(folder) == [DIGEST]
    assert await store.verify("web", LATER) == []


async def test_what_a_killed_sweep_has_put_aside_is_still_there(store, local, kernel, tmp_path):
    await send(store, local, ID, kernel)
    copy, name = store.root.shared("web") / DIGEST, f"shared/{DIGEST}"
    inode = copy.stat().st_ino
    copy.rename(copy.with_name(f"{DIGEST}.going"))
    assert await store.verify("web", ID) == []
    assert (await store.glance("web", ID, [], whole=[name])).troubles == {}
    await store.fetch("web", ID, name, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == KERNEL
    # the next snapshot that needs it takes it back as it is
    await send(store, local, LATER, kernel)
    assert names(copy.parent) == [DIGEST]
    assert copy.stat().st_ino == inode
    # one that is torn is no file to take back
    copy.rename(copy.with_name(f"{DIGEST}.going"))
    copy.with_name(f"{DIGEST}.going").write_bytes(KERNEL[:-1])
    spool = waiting(local, THIRD, kernel)
    shipping.ship(store.root, request_for(store, local, spool, THIRD), quiet)
    assert await store.verify("web", ID) == []
    sweeping.sweep(store.root, "web")
    assert names(copy.parent) == [DIGEST]


async def test_a_removal_tells_how_far_it_is_and_reads_each_manifest_once(
    store, local, kernel, monkeypatch
):
    """However many there are and however slow the store is, it is not taken for one that hangs."""
    for id in (ID, LATER, THIRD):
        await send(store, local, id, kernel)
    read, events = sweeping.read_small, []

    def slowly(path, *, side):
        events.append(path.parent.name)
        return read(path, side=side)

    monkeypatch.setattr(sweeping, "read_small", slowly)
    request = wire.Remove(root=str(store.root.path), vm="web", id=ID)
    removal.remove(store.root, request, lambda *_: events.append("told"))
    assert events == ["told", LATER, "told", THIRD, "told"]


async def test_who_removes_many_sweeps_once(store, local, kernel):
    for id in (ID, LATER):
        await send(store, local, id, kernel)
        await store.remove("web", id, sweep=False)
        assert names(store.root.shared("web")) == [DIGEST]
    await store.sweep("web")
    assert names(store.root.vm("web")) == []
    await store.sweep("web")


@pytest.mark.parametrize("at", [1, 2])
async def test_one_that_is_shipped_meanwhile_keeps_it(store, local, kernel, monkeypatch, at):
    """Another host ships while ours sweeps, after the first look or after the second."""
    await send(store, local, ID, kernel)
    spool = waiting(local, LATER, kernel)
    look, looks = sweeping._Look.needed, []

    def interrupted(looking):
        looks.append(looking)
        found = look(looking)
        if len(looks) == at:
            # its folder, as `ship` makes it before it looks for what is shared
            store.root.snapshot("web", LATER).mkdir()
        return found

    store.root.manifest("web", ID).rename(local.path / "aside")
    for path in sorted(store.root.snapshot("web", ID).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    store.root.snapshot("web", ID).rmdir()
    monkeypatch.setattr(sweeping._Look, "needed", interrupted)
    sweeping.sweep(store.root, "web")
    monkeypatch.undo()
    assert len(looks) == 2
    await store.ship(spool, "web", LATER, shared=local.shared("web"))
    assert await store.verify("web", LATER) == []
    assert names(store.root.shared("web")) == [DIGEST]


def test_what_is_as_it_was_is_not_read_again(local, kernel):
    local.path.mkdir()
    (before, _) = shared.keep(local, "web", [str(kernel)])
    copy = local.shared("web") / DIGEST
    assert names(local.shared("web")) == [DIGEST]
    stamp = copy.stat()
    # were it read, its content would be found to be another
    local.notes("web").write_bytes(
        local.notes("web").read_bytes().replace(DIGEST.encode(), b"ab" * 32)
    )
    copy.rename(copy.with_name("ab" * 32))
    (after, _) = shared.keep(local, "web", [str(kernel)])
    assert after[str(kernel)].blake3 == "ab" * 32
    copy.with_name("ab" * 32).rename(copy)
    (after, _) = shared.keep(local, "web", [str(kernel)])  # without the copy it is
    assert after == before
    assert copy.stat().st_ino == stamp.st_ino
    kernel.write_bytes(KERNEL.upper())
    (after, _) = shared.keep(local, "web", [str(kernel)])
    assert names(local.shared("web")) == [blake3(KERNEL.upper()).hexdigest()]
    assert after != before
    _, troubles = shared.keep(local, "web", ["/nosuch/kernel"])
    assert list(troubles) == ["/nosuch/kernel"]
    assert names(local.shared("web")) == []
    shared.forget(local, "web")
    assert names(local.vm("web")) == []


async def test_a_spool_that_waits_keeps_its_own(store, local, kernel):
    spool = waiting(local, ID, kernel)
    kernel.write_bytes(b"another")
    shared.keep(local, "web", [str(kernel)])
    assert len(names(local.shared("web"))) == 2
    await store.ship(spool, "web", ID, shared=local.shared("web"))
    assert (store.root.shared("web") / DIGEST).read_bytes() == KERNEL
    with pytest.raises(LocalFailed, match="was not said"):
        await store.ship(spool, "web", ID)


@pytest.mark.parametrize("spoilt", ["storage.json", "paired.json", "spool/manifest.json"])
def test_nothing_that_a_damaged_one_may_wait_for_is_removed(local, kernel, spoilt):
    waiting(local, ID, kernel)
    (local.snapshot("web", ID) / spoilt).write_text("{")
    kernel.write_bytes(b"another")
    shared.keep(local, "web", [str(kernel)])
    assert DIGEST in names(local.shared("web"))


def test_notes_that_rotted_are_none(local, kernel):
    local.path.mkdir()
    (before, _) = shared.keep(local, "web", [str(kernel)])
    notes = local.notes("web")
    notes.write_bytes(notes.read_bytes().replace(b"vmlinuz", b"vmlinu\xff"))
    (after, _) = shared.keep(local, "web", [str(kernel)])
    assert after == before


def test_a_path_that_is_no_text(local, tmp_path):
    local.path.mkdir()
    kernel = tmp_path / os.fsdecode(b"vmlinuz-\xff")
    kernel.write_bytes(KERNEL)
    (before, troubles) = shared.keep(local, "web", [str(kernel)])
    assert (list(before), troubles) == ([str(kernel)], {})
    assert names(local.shared("web")) == [DIGEST]
    copy = (local.shared("web") / DIGEST).stat()
    (after, _) = shared.keep(local, "web", [str(kernel)])
    assert after == before
    assert (local.shared("web") / DIGEST).stat() == copy


def test_its_folder_holds_nothing_else():
    entry = FileEntry(name="shared/x", bytes=1, blake3="ab" * 32)
    path = Path("manifest.json")
    with pytest.raises(Exception, match="as one that is shared"):
        decode(_with(entry), Manifest, path)


def _with(entry: FileEntry) -> bytes:
    from tests.rig.halves import manifest

    content = encode(manifest([], "ab" * 32))
    tree = msgspec.json.decode(content)
    tree["files"] = [msgspec.to_builtins(entry)]
    return msgspec.json.encode(tree)


def test_one_that_is_put_aside_while_it_is_shipped_is_there_in_the_end(store, local, kernel):
    """By a sweep that dies then."""
    copy = store.root.shared("web") / DIGEST
    heard = []

    def interrupted(_done: int, _total: int, what: str) -> None:
        heard.append(what)
        if what.startswith("copying machine.json") and copy.exists():
            copy.rename(copy.with_name(f"{DIGEST}.going"))

    spool = waiting(local, ID, kernel)
    shipping.ship(store.root, request_for(store, local, spool), interrupted)
    assert sum("shared" in what for what in heard if what.startswith("copying")) == 1
    assert copy.read_bytes() == KERNEL
    sweeping.sweep(store.root, "web")
    assert names(store.root.shared("web")) == [DIGEST]
