"""A store half that is encrypted: on a real QEMU, from its making to its return, and spoilt."""

from __future__ import annotations

import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.created import Created
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Encrypt, Level, RamChoice, Wishes
from qmpsnap.errors import KeyMissing, NotShipped, SnapError, StoreError
from qmpsnap.hypervisor.monitor import connect
from qmpsnap.store import keyfile, rampack
from tests.faults.bench import options
from tests.rig.guest import built
from tests.rig.qemu import running

# no compressor makes it another one
PATTERN = random.Random(7).randbytes(256 << 10)
WORD = "a-word-of-the-command-line"
AT = 40 << 20


def wishes(encrypt: Encrypt = Encrypt.STORE, ram: RamChoice = RamChoice.PAUSED) -> Wishes:
    return Wishes(level=Level.FULL, ram=ram, max_pause=30, encrypt=encrypt, note="for all to read")


def engine(dir: Path, store: Path, keys: Path | None = None, **other: int) -> Engine:
    # page images would bring back RAM that the store is not asked for
    return Engine(
        dir / "local", store, allow_local_store=True, keys=keys, **({"ram_images": 0} | other)
    )


@asynccontextmanager
async def guest(qemu: Path, short: Path) -> AsyncIterator[Machine]:
    """A machine with a pattern in its RAM, a kernel and an initrd."""
    (short / "pattern").write_bytes(PATTERN)
    (short / WORD).mkdir()
    shutil.copyfile(built() / "vmlinuz", short / WORD / "kernel")
    (short / WORD / "initrd").write_bytes(PATTERN[::-1])
    line, _ = options(short)
    line += ["-kernel", f"{short}/{WORD}/kernel", "-initrd", f"{short}/{WORD}/initrd"]
    line += ["-device", f"loader,file={short}/pattern,addr={AT:#x},force-raw=on"]
    line += ["-boot", "menu=on,splash-time=60000"]  # nothing of the kernel is run
    async with running(qemu, *line, directory=short) as vm:
        yield Machine("vm", vm.qmp)


def lying(store: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}


def clear(store: Path) -> set[bytes]:
    """Which of the words that are secret can be read there."""
    secret = [WORD.encode(), PATTERN[5000:5064], PATTERN[::-1][5000:5064]]
    secret.append((built() / "vmlinuz").read_bytes()[100_000:100_064])
    return {one for one in secret if any(one in content for content in lying(store).values())}


async def brought_back(
    engine: Engine, id: str, to: Path, *, eager: bool = False, keep: bool = False
) -> str:
    """Its way; the pattern is where it was."""
    ready = await engine.prepare_restore("vm", Restoration(to, eager=eager), id)
    async with engine.restored(ready) as back, connect(back.machine.socket) as monitor:
        file = to / "memory"
        await monitor.execute("pmemsave", {"val": AT, "size": len(PATTERN), "filename": str(file)})
        assert file.read_bytes() == PATTERN
        assert back.ram is not None
        way = back.ram.value
    if not keep:
        shutil.rmtree(to)
    return way


@pytest.mark.timeout(180)
async def test_nothing_of_the_machine_is_in_the_clear(
    qemu72: Path, short: Path, store: Path
) -> None:
    ours = engine(short, store)
    async with guest(qemu72, short) as vm:
        first = await ours.create(vm, wishes())
        key = ours.secrets.current().key
        assert first.encryption == key
        assert clear(store) == set()
        second = await ours.create(vm, wishes())
        assert clear(store) == set()
        # the control: all that is looked for would be found
        plain = Engine(short / "other", short / "plain", allow_local_store=True)
        (short / "plain").mkdir()
        await plain.create(vm, wishes(Encrypt.NONE))
        assert len(clear(short / "plain")) == 4
    # what has not changed is there once
    manifest = (await ours.show("vm", second.id)).manifest
    packs = [one for one in manifest.packs if not one.fresh]
    assert sum(one.used_bytes for one in packs) > sum(one.used_bytes for one in manifest.packs) / 2
    assert [one.encryption for one in await ours.list("vm")] == [key, key]
    for one in await verified(ours):
        assert (one.findings, one.encryption, one.decrypted) == ([], key, True)
    assert manifest.shared[0].path == f"{short}/{WORD}/kernel"
    assert manifest.identity.disks
    shutil.rmtree(short / WORD)
    for number, (id, eager) in enumerate([(first.id, True), (second.id, False)]):
        await brought_back(ours, id, short / f"back{number}", eager=eager, keep=True)
        (copy,) = (short / f"back{number}").glob("initrd*")
        assert copy.read_bytes() == PATTERN[::-1]
    # the page images that are kept here have another way, with an index that is encrypted
    await ours.captured("vm")
    await ours.usage("vm")
    await ours.vmstate("vm")


async def verified(engine: Engine) -> list:
    return [one async for one in engine.verify_all("vm")]


@pytest.mark.timeout(180)
async def test_the_key_is_not_here(qemu72: Path, short: Path, store: Path) -> None:
    ours, theirs = engine(short, store, short / "a"), engine(short, store, short / "b")
    async with guest(qemu72, short) as vm:
        made = (await ours.create(vm, wishes())).id
    key = ours.secrets.current().key
    theirs.keys.imported(keyfile.encode(ours.keys.public()), Path("key"))
    before, to = lying(short) | lying(store), short / "back"
    for verb in (
        lambda: theirs.prepare_restore("vm", Restoration(to), made),
        lambda: theirs.prepare_restore("vm", Restoration(to, cold=True), made),
        lambda: theirs.captured("vm", made),
        lambda: theirs.vmstate("vm", made),
        lambda: theirs.usage("vm", made),
    ):
        with pytest.raises(KeyMissing, match=key) as refused:
            await verb()
        assert (refused.value.exit_code, "keys import" in refused.value.hint) == (3, True)
    fits = await theirs.check("vm", Restoration(to), made)
    assert [(row.what, row.verdict) for row in fits.rows] == [("encryption", "blocks")]
    assert not fits.fits
    # what lies there can be told from what was stored, and shown, without it
    (found,) = await verified(theirs)
    assert (found.findings, found.encryption, found.decrypted) == ([], key, False)
    assert (await theirs.show("vm", made)).manifest.shared[0].path == ""
    assert lying(short) | lying(store) == before
    assert not to.exists()

    # a file that says that it is this key, and is another one
    file = short / "secret.key"
    ours.export_secret(file)
    assert file.stat().st_mode & 0o777 == 0o600
    spoilt = file.read_bytes().replace(b'"secret_key": "', b'"secret_key": "0000')[:-8]
    wrong = short / "wrong.key"
    wrong.touch(0o600)
    wrong.write_bytes(spoilt)
    with pytest.raises(SnapError, match="not an encryption key"):
        theirs.secrets.imported(wrong)
    theirs.secrets.imported(file)
    assert await brought_back(theirs, made, to)
    (found,) = await verified(theirs)
    assert (found.findings, found.decrypted) == ([], True)


@pytest.mark.timeout(240)
async def test_keys_that_change_and_files_that_do(qemu72: Path, short: Path, store: Path) -> None:
    """In the clear, encrypted, with a new key: side by side, and nothing of the one in another."""
    ours = engine(short, store, ram_images=1)
    made: list[str] = []
    async with guest(qemu72, short) as vm:
        kinds = Encrypt.NONE, Encrypt.STORE, Encrypt.NONE, Encrypt.STORE
        made += [(await ours.create(vm, wishes(one))).id for one in kinds]
        new, old = ours.secrets.rotate()
        made += [(await ours.create(vm, wishes())).id for _ in range(2)]
        entries = await ours.list("vm")
        keys = [None, old.key, None, old.key, new.key, new.key]
        assert [one.encryption for one in entries] == keys
        packs = {}
        for id, key in zip(made, keys, strict=True):
            manifest = (await ours.show("vm", id)).manifest
            packs[id] = {one.blake3 for one in manifest.packs}
            files = [store / "vm/shared" / one for one in packs[id]]
            assert {rampack.key_of(one, side=StoreError) for one in files} == {key}
        assert packs[made[4]] <= packs[made[5]]
        assert [one.findings for one in await verified(ours)] == [[]] * 6
        # mapped from page images that are kept here, with an index that is encrypted; then without
        assert await brought_back(ours, made[5], short / "b5") == "mapped"
        shutil.rmtree(short / "local/vm/ram")
        for id in (made[1], made[2]):
            assert await brought_back(ours, id, short / f"b{id}") == "demand"
        # the newest index is had from the store, then: what it tells of is not stored again
        seventh = (await ours.create(vm, wishes())).id
        shared = [one for one in (await ours.show("vm", seventh)).manifest.packs if not one.fresh]
        assert shared
        # files of two snapshots that were swapped, one that was altered, cut off, or a plain one
        half, other = store / "vm" / made[4], store / "vm" / made[5]
        for harm in (
            lambda path: path.write_bytes((other / path.name).read_bytes()),
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\0"),
            lambda path: path.write_bytes((store / "vm" / made[0] / path.name).read_bytes()),
        ):
            path = half / "machine.json"
            kept = path.read_bytes()
            harm(path)
            found = await ours.verify("vm", made[4])
            assert [one.where for one in found.findings] == ["machine.json"]
            with pytest.raises(SnapError) as refused:
                await ours.prepare_restore("vm", Restoration(short / "no"), made[4])
            assert refused.value.exit_code == 7
            assert not (short / "no").exists()
            path.write_bytes(kept)
        # what nobody needs any more goes, and what is left of packs is moved, key by key
        for id in (made[0], made[1], made[4]):
            await ours.delete(vm, id)
        assert [one.findings for one in await verified(ours)] == [[]] * 4
    for id in (made[3], seventh):
        await brought_back(ours, id, short / f"c{id}", eager=True)


async def test_it_waits_in_the_spool_as_it_will_lie_on_the_store(
    qemu72: Path, short: Path, store: Path
) -> None:
    ours = engine(short, store)
    async with guest(qemu72, short) as vm:
        worker, ours.roots.store.command = ours.roots.store.command, ("false",)
        with pytest.raises(NotShipped) as waiting:
            await ours.create(vm, wishes())
        ours.roots.store.command = worker
    assert isinstance(waiting.value.created, Created)
    id = waiting.value.created.id
    spool = short / "local/vm" / id / "spool"
    assert clear(spool) | clear(short / "local/vm/shared") == set()
    assert (await verified(ours))[0].findings == []
    await brought_back(ours, id, short / "back", eager=True)
    assert (await ours.captured("vm", id)).options
    delivered, failed = await ours.ship("vm")
    assert ([one.id for one in delivered], failed) == ([id], [])
    assert (await verified(ours))[0].findings == []
    assert clear(store) == set()
    await brought_back(ours, id, short / "again")
