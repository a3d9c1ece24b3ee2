"""What every store must do: run on a folder, and on the NFS mount of the rig where there is one."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from qmpsnap.errors import (
    DamagedData,
    DigestMismatch,
    HalfMissing,
    LocalFailed,
    PacksMissing,
    StoreError,
    StoreRefused,
    StoreStalled,
    UsageError,
)
from qmpsnap.host.filesystem import mount_of
from qmpsnap.store.catalogue import join
from qmpsnap.store.files import digest_bytes
from qmpsnap.store.layout import LocalRoot, StoreRoot
from qmpsnap.store.local import mark_paired, survey
from qmpsnap.store.pack import compress
from qmpsnap.store.remote import Store
from tests.rig.halves import FILES, HOST, ID, LATER, RAM, names, paired, spooled
from tests.rig.packed import IDS, Series
from tests.rig.ram import page

NFS = Path("/mnt/nfs")
SILENT = [sys.executable, "-c", "import sys; sys.stdin.read()"]
ALL = ["machine.json", "manifest.json", "nvram/vars.fd", "vmstate/ram.zst"]


@pytest.fixture(params=["folder", pytest.param("nfs", marks=pytest.mark.nfs)])
def root(request, tmp_path):
    if request.param == "folder":
        path = tmp_path / "store"
    elif NFS.is_mount() and mount_of(NFS).network:
        path = NFS / f"contract-{os.getpid()}"
    else:
        pytest.skip("needs the rig that gives a real NFS mount")
    path.mkdir()
    yield StoreRoot(path)
    shutil.rmtree(path)


@pytest.fixture
def store(root):
    return Store(root, within=20)


@pytest.fixture
def local(tmp_path):
    return LocalRoot(tmp_path / "local")


@pytest.fixture
def spool(local):
    return spooled(local)


@pytest.fixture
async def shipped(store, spool):
    await store.ship(spool, "web", ID)
    return store.root.snapshot("web", ID)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


async def state(store: Store, local: LocalRoot) -> str:
    (entry,) = join(survey(local), await store.catalogue(), host=HOST)
    return entry.state


async def test_examined(store):
    facts = await store.examine()
    assert facts.path == str(store.root.path.resolve())
    assert facts.device == store.root.path.stat().st_dev
    assert names(store.root.path) == []


async def test_a_root_that_is_not_there_is_not_made(root, spool):
    store = Store(StoreRoot(root.path / "none"))
    with pytest.raises(StoreRefused, match="none is not there"):
        await store.examine()
    with pytest.raises(StoreError, match="ENOENT"):
        await store.ship(spool, "web", ID)
    assert names(root.path) == []


async def test_shipped_as_it_was_spooled(store, local, spool):
    heard: list[tuple[int, int, str]] = []
    seal = await store.ship(spool, "web", ID, on_progress=lambda *one: heard.append(one))
    folder = store.root.snapshot("web", ID)
    assert files(folder) == ALL
    assert all((folder / name).read_bytes() == (spool / name).read_bytes() for name in ALL)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*")} == {0o600, 0o700}
    assert seal.manifest_blake3 == digest_bytes((spool / "manifest.json").read_bytes())
    assert seal.bytes == sum((spool / name).stat().st_size for name in ALL)
    assert any(what.startswith("copying vmstate") for _, _, what in heard)
    assert await store.verify("web", ID, seal=seal.manifest_blake3) == []
    assert await store.ship(spool, "web", ID) == seal
    assert await state(store, local) == "shipping"
    mark_paired(local, "web", paired(seal.manifest_blake3))
    shutil.rmtree(spool)
    assert await state(store, local) == "paired"


PROGRESS = 6  # three files, each copied and read back


@pytest.mark.parametrize("at", range(1, PROGRESS + 2))  # one past the end: never killed
async def test_a_shipment_killed_anywhere_is_made_good(store, local, spool, at, children):
    seen = 0

    def kill(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            for child in children():
                child.send_signal(signal.SIGKILL)

    with suppress(StoreError):
        await store.ship(spool, "web", ID, on_progress=kill)
        # not killed, or done before the signal came
        assert files(store.root.snapshot("web", ID)) == ALL
    assert seen == PROGRESS if at > PROGRESS else seen >= at
    assert await state(store, local) == "shipping"
    await store.ship(spool, "web", ID)
    assert await store.verify("web", ID) == []


@pytest.mark.parametrize("left", range(5))
async def test_a_shipment_cut_after_each_file(store, local, spool, left):
    order = [*FILES, "vmstate/ram.zst", "manifest.json"]
    folder = store.root.snapshot("web", ID)
    for name in order[:left]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(spool / name, folder / name)
    if left < len(order):
        (folder / order[left]).parent.mkdir(parents=True, exist_ok=True)
        (folder / (order[left] + ".partial")).write_bytes(b"half")
    assert await state(store, local) == "shipping"
    await store.ship(spool, "web", ID)
    assert files(folder) == ALL
    assert await store.verify("web", ID) == []


@pytest.mark.parametrize("name", [*FILES, "vmstate/ram.zst"])
async def test_a_spoilt_spool_is_not_sealed(store, spool, name):
    content = (spool / name).read_bytes()
    (spool / name).write_bytes(content[:-1] + b"?")
    with pytest.raises(DigestMismatch, match=name):
        await store.ship(spool, "web", ID)
    (spool / name).unlink()
    with pytest.raises(HalfMissing, match=name):
        await store.ship(spool, "web", ID)
    assert not store.root.manifest("web", ID).exists()


async def test_another_half_under_this_id_is_kept(store, shipped, spool, tmp_path):
    other = spooled(LocalRoot(tmp_path / "other"))
    path = other / "manifest.json"
    path.write_text(path.read_text().replace("before the upgrade", "another"))
    before = (shipped / "manifest.json").read_bytes()
    with pytest.raises(StoreError, match="another store half is sealed"):
        await store.ship(other, "web", ID)
    assert (shipped / "manifest.json").read_bytes() == before


async def test_a_store_that_was_unmounted_meanwhile(store, spool):
    with pytest.raises(StoreRefused, match="no longer"):
        await store.ship(spool, "web", ID, device=store.root.path.stat().st_dev + 1)
    assert names(store.root.path) == []
    await store.ship(spool, "web", ID, device=store.root.path.stat().st_dev)


def spoil(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-3] + b"?" + content[-2:])


@pytest.mark.parametrize(
    ("harm", "file", "said"),
    [
        (lambda folder: spoil(folder / "nvram/vars.fd"), "nvram/vars.fd", "BLAKE3"),
        (lambda folder: (folder / "nvram/vars.fd").unlink(), "nvram/vars.fd", "missing"),
        (lambda folder: (folder / "machine.json").write_bytes(b"{}"), "machine.json", "2 bytes"),
        (lambda folder: (folder / "x").touch(), "x", "not in the manifest"),
        (lambda folder: (folder / "nvram/y.partial").touch(), "nvram/y.partial", "not in the"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json", "not sealed"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"{"), "manifest.json", "cut"),
        (lambda folder: spoil(folder / "manifest.json"), "manifest.json", "manifest.json"),
    ],
)
async def test_harm_is_found_and_named(store, shipped, harm, file, said):
    assert await store.verify("web", ID) == []
    harm(shipped)
    (problem,) = await store.verify("web", ID)
    assert problem.file == file
    assert said in problem.what


async def test_a_manifest_that_somebody_replaced(store, shipped):
    seal = digest_bytes((shipped / "manifest.json").read_bytes())
    path = shipped / "manifest.json"
    path.write_text(path.read_text().replace("before the upgrade", "replaced"))
    (problem,) = await store.verify("web", ID, seal=seal)
    assert "the local half names" in problem.what
    with pytest.raises(DigestMismatch):
        await store.read("web", ID, "machine.json", seal=seal)


@pytest.mark.parametrize("planted", ["nvram", "nvram/vars.fd"])
async def test_nothing_is_read_through_a_planted_link(store, shipped, planted, tmp_path):
    path = shipped / planted
    shutil.move(path, tmp_path / "moved")  # the store may be another file system
    path.symlink_to(tmp_path / "moved")
    problems = await store.verify("web", ID)
    assert "nvram/vars.fd" in [problem.file for problem in problems]
    with pytest.raises((StoreError, DamagedData)):
        await store.fetch("web", ID, "nvram/vars.fd", tmp_path / "vars.fd")
    assert not (tmp_path / "vars.fd").exists()


async def test_nothing_is_written_through_a_planted_link(store, spool, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (store.root.path / "web").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="not a folder of ours"):
        await store.ship(spool, "web", ID)
    assert names(tmp_path / "elsewhere") == []


async def test_read(store, shipped):
    assert await store.read("web", ID, "machine.json") == FILES["machine.json"].decode()
    assert json.loads(await store.read("web", ID, "manifest.json"))["vm"] == "web"
    with pytest.raises(UsageError, match="has no file"):
        await store.read("web", ID, "../../x")
    with pytest.raises(HalfMissing):
        await store.read("web", LATER, "machine.json")
    with pytest.raises(DamagedData, match="no text"):
        await store.read("web", ID, "vmstate/ram.zst")


@pytest.mark.parametrize("vm", ["..", "a/b", ""])
async def test_names_that_lead_out_of_the_root(store, vm):
    with pytest.raises(UsageError):
        await store.read(vm, ID, "machine.json")
    with pytest.raises(UsageError):
        await store.remove("web", "..")


async def test_loaded_through_a_pipe(store, shipped):
    reading, writing = os.pipe()

    def drain() -> bytes:
        with os.fdopen(reading, "rb") as pipe:
            return pipe.read()

    reader = asyncio.create_task(asyncio.to_thread(drain))
    assert await store.load("web", ID, "vmstate/ram.zst", writing) == len(RAM)
    os.close(writing)
    assert await reader == RAM


async def test_a_spoilt_vmstate_is_not_loaded_at_all(store, shipped, tmp_path):
    (tmp_path / "other").write_bytes(RAM[:-1] + b"?")
    (shipped / "vmstate/ram.zst").unlink()
    compress(tmp_path / "other", shipped / "vmstate/ram.zst")
    with (tmp_path / "ram").open("wb") as file, pytest.raises(DigestMismatch):
        await store.load("web", ID, "vmstate/ram.zst", file.fileno())
    assert (tmp_path / "ram").stat().st_size == 0


async def test_fetched(store, shipped, tmp_path):
    await store.fetch("web", ID, "nvram/vars.fd", tmp_path / "vars.fd")
    assert (tmp_path / "vars.fd").read_bytes() == FILES["nvram/vars.fd"]
    await store.fetch("web", ID, "vmstate/ram.zst", tmp_path / "ram", unpack=True)
    assert (tmp_path / "ram").read_bytes() == RAM
    with pytest.raises(LocalFailed):
        await store.fetch("web", ID, "machine.json", tmp_path / "ram")
    assert (tmp_path / "ram").read_bytes() == RAM
    spoil(shipped / "vmstate/ram.zst")
    with pytest.raises(DigestMismatch):
        await store.fetch("web", ID, "vmstate/ram.zst", tmp_path / "again", unpack=True)
    assert not (tmp_path / "again").exists()


async def test_removed(store, shipped, spool):
    await store.ship(spooled_as(spool, LATER), "web", LATER)
    await store.remove("web", ID)
    await store.remove("web", ID)
    assert names(store.root.vm("web")) == [LATER]
    assert await store.verify("web", LATER) == []


def spooled_as(spool: Path, id: str) -> Path:
    other = spool.parent / "other"
    shutil.copytree(spool, other)
    path = other / "manifest.json"
    path.write_text(path.read_text().replace(ID, id))
    return other


async def test_a_removal_cut_short_never_looks_whole(store, shipped, local):
    (shipped / "vmstate/ram.zst").rename(shipped / "kept")
    (shipped / "manifest.json").unlink()
    listing = await store.catalogue("web")
    assert [found.manifest for found in listing.found] == [None]
    await store.remove("web", ID)
    assert names(store.root.vm("web")) == []


async def test_catalogue_names_what_is_not_ours(store, shipped):
    (store.root.path / "lost+found").mkdir()
    (store.root.path / "notes.txt").touch()
    (store.root.vm("web") / "x").mkdir()
    (store.root.snapshot("web", LATER)).mkdir()
    (store.root.manifest("web", LATER)).write_bytes(b"\xff")
    listing = await store.catalogue()
    assert listing.foreign == ["lost+found", "notes.txt", "web/x"]
    assert [(one.vm, one.id) for one in listing.found] == [("web", ID), ("web", LATER)]
    assert listing.found[0].problem is None
    assert "no text" in str(listing.found[1].problem)
    assert (await store.catalogue("db")).found == []
    assert (await store.catalogue("web")).found == listing.found


async def test_a_silent_store_is_left(root, spool, children):
    with pytest.raises(StoreStalled, match=r"no progress for 0\.3 s"):
        await Store(root, within=0.3, command=SILENT).ship(spool, "web", ID)
    assert children() == []


async def test_a_store_that_stops_in_the_middle_is_left(root, local, spool, children):
    def stop(*_: object) -> None:
        for child in children():
            child.send_signal(signal.SIGSTOP)

    store = Store(root, within=2.0)
    with suppress(StoreStalled):
        await store.ship(spool, "web", ID, on_progress=stop)
    assert children() == []
    assert await state(store, local) == "shipping"
    await Store(root).ship(spool, "web", ID)
    assert await Store(root).verify("web", ID) == []


async def test_cancelled_at_once(root, spool, children):
    os.mkfifo(root.path / "started")
    script = f"open({str(root.path / 'started')!r}, 'w').close(); import sys; sys.stdin.read()"
    silent = Store(root, within=60, command=[sys.executable, "-c", script])
    task = asyncio.create_task(silent.ship(spool, "web", ID))
    await asyncio.to_thread((root.path / "started").read_bytes)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    assert children() == []


async def test_a_worker_that_breaks_says_so(root):
    broken = [sys.executable, "-c", "raise SystemExit('out of luck')"]
    with pytest.raises(StoreError, match="out of luck"):
        await Store(root, command=broken).examine()


def test_the_worker_does_not_outlive_us(tmp_path, spool):
    """It writes into a pipe that nobody reads when its stdin ends."""
    folder = tmp_path / "store/web"
    folder.mkdir(parents=True)
    shutil.copytree(spool, folder / ID)
    reading, writing = os.pipe()
    request = {"verb": "load", "root": str(tmp_path / "store"), "vm": "web", "id": ID,
               "name": "vmstate/ram.zst", "seal": None, "fd": writing}  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "qmpsnap.store.worker"], stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2], pass_fds=[writing],
    ) as worker:  # fmt: skip
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        worker.stdin.flush()
        os.close(writing)
        assert os.read(reading, 1) == RAM[:1]
        worker.stdin.close()
        assert worker.wait(10) == 1
    os.close(reading)


def test_ram_of_another_vm(root: StoreRoot, tmp_path: Path) -> None:
    """Packs are linked; either may be removed, and what was lost is made again."""
    for name in ("g", "w"):
        (tmp_path / name).mkdir()
    image = {at: page(at) for at in range(48)}
    golden = Series(tmp_path / "g", "golden", root)
    golden.spool(IDS[0], image | {60: page("golden")})
    golden.ship(IDS[0])
    web = Series(tmp_path / "w", "web", root)
    lent = [("golden", golden.known[IDS[0]])]
    made = web.spool(IDS[1], image | {50: page("web")}, lent=lent)
    web.spool(IDS[2], image | {51: page("web")}, lent=lent)
    web.ship(IDS[1])
    (pack,) = (one.blake3 for one in made.packs if one.origin == "golden")
    path = root.shared("web") / pack
    assert path.samefile(root.shared("golden") / pack)
    assert path.stat().st_nlink == 2
    golden.remove(IDS[0])
    assert path.stat().st_nlink == 1
    web.whole(IDS[1])
    web.remove(IDS[1])
    path.unlink(missing_ok=True)
    with pytest.raises(PacksMissing) as lost:
        web.ship(IDS[2])
    web.ship(IDS[2], web.remade(IDS[2], lost.value))
    web.whole(IDS[2])
    web.remove(IDS[2])
    assert names(root.vm("web")) == names(root.vm("golden")) == []
