"""Damage: found, named, and never restored from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Level, RamChoice, Wishes
from qmpsnap.errors import BaseChanged, DamagedData, StoreError, Unsigned
from qmpsnap.store import digests
from qmpsnap.store.layout import LocalRoot
from tests.rig.chained import GONE, INC, KEPT, MERGED, REVISION, SIZE, Chain
from tests.rig.graph import status
from tests.rig.guest import agrees, back, booted

pytestmark = pytest.mark.guest


@contextmanager
def harmed(path: Path, harm: Callable[[Path], None]) -> Iterator[None]:
    """*path* is harmed for the block, and as it was afterwards, to the nanosecond."""
    content, times = path.read_bytes(), path.stat()
    harm(path)
    try:
        yield
    finally:
        with path.open("r+b" if path.exists() else "xb") as file:
            file.write(content)
            file.truncate()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def spoil(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 512)


def touch(path: Path) -> None:
    os.utime(path)


def header(path: Path) -> None:
    """Another content, and the times of before: only the header's digest tells."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(600)
        file.write(b"?")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def flipped(offset: int) -> Callable[[Path], None]:
    """One bit of one byte, at *offset* (from the end if negative), and the times of before."""

    def flip(path: Path) -> None:
        content, times = bytearray(path.read_bytes()), path.stat()
        content[offset] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    return flip


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


async def test_damage_is_named_and_nothing_is_restored_from_it(
    qemu72: Path, short: Path, store: Path
) -> None:
    # with page images kept here, what is wrong with the store's RAM would stop no restore
    engine = Engine(short / "local", store, allow_local_store=True, ram_images=0)
    async with booted(qemu72, short) as guest:
        before = await guest.console.witness(within=30)
        machine = Machine("web", guest.qmp, guest.agent)
        made = await engine.create(machine, Wishes(level=Level.OVERLAY, max_pause=30))
        assert await status(guest.qemu.witness) == "running"
    for base in guest.disks:
        for harm in (cut, grow, touch, spoil, header):
            with harmed(base, harm):
                await _named(engine, str(base))
                with pytest.raises(BaseChanged, match=base.name):
                    await engine.prepare_restore("web", Restoration(short / "b"))
                assert not (short / "b").exists()
    half = Path(made.store)
    names = below(half)
    ram = ["vmstate/ram.index", "vmstate/stream.zst"]
    assert names == ["machine.json", "manifest.json", "manifest.sig", "usage.json", *ram]
    packs = [one.blake3 for one in (await engine.show("web")).manifest.packs]
    assert packs
    for name in [*names, *packs]:
        for harm in (spoil, cut, Path.unlink) if name in names else (spoil,):
            with harmed(half.parent / "shared" / name if name in packs else half / name, harm):
                await _named(engine, name)
                if name != "usage.json":  # it tells nothing that a restore needs
                    await _not_restored(engine, short / "b", name)
    with harmed(half / "manifest.json", lambda path: os.truncate(path, 100)):
        (entry,) = await engine.list("web")
        assert entry.state == "damaged"
        assert "manifest.json" in entry.why
    sealed = Path(made.local) / "storage.json"
    for harm in (spoil, cut):
        with harmed(sealed, harm):
            assert [entry.state for entry in await engine.list("web")] == ["damaged"]
            await _named(engine, "")
            with pytest.raises(DamagedData):
                await engine.prepare_restore("web", Restoration(short / "b"), made.id)
    # and with nothing wrong any more all is well: it was the damage that was found
    assert (await engine.verify("web")).findings == []
    await agrees(engine, "web", Restoration(short / "b"), before)


async def _named(engine: Engine, name: str) -> None:
    (entry,) = await engine.list("web")
    found = (await engine.verify("web", entry.id)).findings
    assert any(name in f"{one.where} {one.what}" for one in found), found


async def _not_restored(engine: Engine, to: Path, name: str) -> None:
    (entry,) = await engine.list("web")
    with pytest.raises((DamagedData, Unsigned)):
        async with back(engine, "web", Restoration(to), entry.id):
            pytest.fail(f"restored in spite of a harmed {name}")
    assert below(to) == []


OF_A_CHAIN = [
    *(f"local/web/{MERGED}/{name}" for name in ("storage.json", "merged.json", "digests.json")),
    *(f"local/web/{KEPT}/{name}" for name in ("kept.json", "digests.json")),
    *(f"local/web/{INC}/{name}" for name in ("storage.json", "digests.json")),
    *(f"local/web/{INC}/{REVISION}/{name}" for name in ("storage.json", "digests.json")),
    *(f"local/web/{one}/vda.qcow2" for one in (MERGED, KEPT, INC, f"{INC}/{REVISION}")),
    *(f"store/web/{INC}/{name}" for name in ("machine.json", "usage.json")),
    *(f"store/web/{INC}/{name}" for name in ("manifest.json", "manifest.sig")),
]


@pytest.fixture
async def chain(short: Path, store: Path) -> Engine:
    """An engine whose VM has a snapshot and a revision of it, on two points that are no more."""
    (short / "store").symlink_to(store)
    made = Chain(LocalRoot(short / "local"))
    made.make()
    engine = Engine(short / "local", store, allow_local_store=True)
    delivered, failed = await engine.ship("web")
    assert (len(delivered), failed) == (1, [])
    return engine


async def found(engine: Engine) -> list[str]:
    return [f"{one.where} {one.what}" for one in (await engine.verify("web", INC)).findings]


async def test_a_chain_without_damage(chain: Engine, short: Path) -> None:
    assert await found(chain) == []
    files = {str(path.relative_to(short)) for path in (short / "local").rglob("*.*")}
    there = {name for name in files if name.endswith((".json", ".qcow2", ".raw"))}
    there |= {f"store/{name}" for name in below(short / "store")}
    beside = {f"local/web/{INC}/paired.json", "local/host.json", "local/.keys/signing.json"}
    leases = {name for name in there if name.startswith("store/web/lease/")}
    assert there - set(OF_A_CHAIN) == beside | leases
    assert len(leases) == 1


@pytest.mark.parametrize("name", OF_A_CHAIN)
async def test_each_file_of_a_chain(chain: Engine, short: Path, name: str) -> None:
    path = short / name
    named = str(path) if name.startswith("local") else path.name
    size = path.stat().st_size
    for offset in sorted({0, min(333, size // 2), min(300_000, size // 2), -1}):
        with harmed(path, flipped(offset)):
            told = await found(chain)
        assert any(named in one for one in told), (offset, told)
    with harmed(path, Path.unlink):
        told = await found(chain)
    folder = path.parent.name
    assert any(named in one or (folder in one and "json" in name) for one in told), told


async def test_a_kept_manifest_that_can_still_be_read_is_told_by_its_name(
    chain: Engine, short: Path
) -> None:
    path = short / f"local/web/{KEPT}/kept.json"
    spoilt = path.read_bytes().replace(b"vda.qcow2", b"vda.qcow3")
    with harmed(path, lambda it: it.write_bytes(spoilt)):
        told = await found(chain)
    assert any(f"{path}: its content" in one for one in told), told


async def test_no_byte_of_a_manifest_is_too_small(chain: Engine, short: Path) -> None:
    """Where no other file tells the digest of a manifest, one beside it does."""
    for name in (f"{INC}/{REVISION}/storage.json", f"{INC}/{REVISION}/digests.json"):
        path = short / "local/web" / name
        for offset in range(7, path.stat().st_size, 197):
            with harmed(path, flipped(offset)):
                told = await found(chain)
            assert any(str(path) in one for one in told), (offset, told)


_HANGS = """
import time
from qmpsnap.store import half, worker
half.verify = lambda *_: time.sleep(600)
worker.main()
"""


async def test_damage_here_is_told_though_the_store_hangs(chain: Engine, short: Path) -> None:
    there = chain.roots.store
    assert await found(chain) == []  # the control
    there.command = (sys.executable, "-P", "-c", _HANGS)
    there.within = 3.0
    with pytest.raises(StoreError, match="no progress"):
        await found(chain)
    path = short / f"local/web/{INC}/vda.qcow2"
    with harmed(path, flipped(-1)):
        told = await found(chain)
    assert any(str(path) in one for one in told), told
    assert "store could not be read" in told[-1]


def _on_another(chain: Chain) -> str:
    other = chain.written(GONE, None)
    rebase = ["rebase", "-u", "-f", "qcow2", "-b", str(other), "-F", "qcow2"]
    subprocess.run(["qemu-img", *rebase, chain.image(INC)], check=True)
    chain.sealed(INC, MERGED)
    return f"stands on {other}, not on {chain.image(MERGED)}"


def _on_nothing(chain: Chain) -> str:
    chain.sealed(INC, None)
    return f"stands on {chain.image(INC).parent}/../{MERGED}/vda.qcow2, not on nothing"


def _of_another_size(chain: Chain) -> str:
    chain.sealed(INC, MERGED, size=2 * SIZE)
    return f"is of {SIZE} bytes, not {2 * SIZE}"


def _of_another_format(chain: Chain) -> str:
    rebase = ["rebase", "-u", "-f", "qcow2", "-b", f"../{MERGED}/vda.qcow2", "-F", "raw"]
    subprocess.run(["qemu-img", *rebase, chain.image(INC)], check=True)
    chain.sealed(INC, MERGED)
    return "for raw, not qcow2"


def _unsound(chain: Chain) -> str:
    with chain.image(INC).open("r+b") as file:
        file.seek(2 * 65536)  # the first refcount block
        file.write(b"\0\0")
    chain.sealed(INC, MERGED)
    return "qemu-img check"


def _on_what_is_gone(chain: Chain) -> str:
    chain.sealed(INC, GONE)
    return f"stands on {GONE}, which is gone"


def _never_hashed(chain: Chain) -> str:
    chain.sealed(INC, MERGED)
    (chain.folder(MERGED) / "digests.json").unlink()
    return f"{chain.folder(MERGED)}: was never hashed"


@pytest.mark.parametrize(
    "wrong",
    [_on_another, _on_nothing, _of_another_size, _of_another_format, _unsound, _on_what_is_gone,
     _never_hashed],
)  # fmt: skip
async def test_what_was_sealed_wrong(
    short: Path, store: Path, wrong: Callable[[Chain], str]
) -> None:
    """The manifests agree with the files, and the files do not agree with one another."""
    made = Chain(LocalRoot(short / "local"))
    made.written(MERGED, None)
    made.sealed(MERGED, None)
    made.written(INC, MERGED)
    digests.take(made.folder(MERGED), MERGED, ["vda.qcow2"])
    expected = wrong(made)
    digests.take(made.folder(INC), INC, ["vda.qcow2"])
    made.spooled(INC)
    engine = Engine(short / "local", store, allow_local_store=True)
    await engine.ship("web")
    told = await found(engine)
    assert len(told) == 1, told
    assert expected in told[0]


@pytest.mark.timeout(400)
async def test_each_file_of_what_was_really_taken(qemu72: Path, short: Path, store: Path) -> None:
    """A full, an increment on it, and a revision of that: whatever is harmed is named."""
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(qemu72, short) as guest:
        machine = Machine("web", guest.qmp, guest.agent)
        full = await engine.create(machine, Wishes(level=Level.FULL, max_pause=30))
        await guest.console.run("dd if=/dev/urandom of=/data/0/x bs=64k count=8; sync", within=30)
        made = await engine.create(
            machine, Wishes(level=Level.INC, ram=RamChoice.NONE, max_pause=30)
        )
        await guest.console.run("dd if=/dev/urandom of=/data/0/y bs=64k count=8; sync", within=30)
        refreshed = await engine.refresh(machine, made.id)
    assert (await engine.verify("web", made.id)).findings == []
    folders = [Path(full.local), Path(made.local), Path(made.local) / refreshed.revision_id]
    paths = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    assert len([path for path in paths if path.suffix in {".qcow2", ".raw"}]) == 6
    for path in paths:
        if path.name == "paired.json":
            continue
        for offset in (path.stat().st_size // 2, -1):
            with harmed(path, flipped(offset)):
                found = (await engine.verify("web", made.id)).findings
            assert any(str(path) in one.what for one in found), (path, offset, found)
    assert (await engine.verify("web", made.id)).findings == []
