"""`restore --check`, and the same before each restore, of a real machine on this host."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.comparison import Row
from qmpsnap.engine.configuration import Configuration
from qmpsnap.engine.details import Details
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import RamChoice, Wishes
from qmpsnap.errors import Blocked, ManifestError, NotShipped, SnapError
from qmpsnap.store.files import digest_file
from qmpsnap.store.layout import LocalRoot
from qmpsnap.store.manifest import Manifest, decode, encode
from tests.cli.conftest import Program, Ran, machine, powered
from tests.cli.test_verbs import shaped
from tests.rig.halves import names
from tests.rig.qemu import binaries, running
from tests.rig.room import room

HEAD = ["WHAT", "CAPTURED", "HERE", "VERDICT", "WHY"]


@dataclass(frozen=True, slots=True)
class Kept:
    """A snapshot whose store half waits in the spool, where a test can write another one."""

    engine: Engine
    id: str
    spool: Path
    to: Path
    kernel: Path

    def write(self, name: str, content: bytes | None) -> None:
        """The file *name* says *content* (None: it is gone), and the manifest agrees."""
        path = self.spool / "manifest.json"
        sealed = decode(path.read_bytes(), Manifest, path)
        entries = [one for one in sealed.files if one.name != name]
        (self.spool / name).unlink()
        if content is not None:
            (self.spool / name).write_bytes(content)
            size, digest = digest_file(self.spool / name)
            entry = sealed.entry(name)
            assert entry is not None
            entries.append(msgspec.structs.replace(entry, bytes=size, blake3=digest))
        path.unlink()
        self._seal(encode(msgspec.structs.replace(sealed, files=entries)))

    def _seal(self, manifest: bytes) -> None:
        (self.spool / "manifest.json").write_bytes(manifest)
        signed = self.engine.roots.keyring.sign(manifest)
        (self.spool / "manifest.sig").write_bytes(signed)

    @contextmanager
    def changed(self, name: str, content: bytes | None) -> Iterator[None]:
        before, seal = (self.spool / name).read_bytes(), (self.spool / "manifest.json").read_bytes()
        self.write(name, content)
        try:
            yield
        finally:
            (self.spool / name).write_bytes(before)
            self._seal(seal)

    async def rows(self, **wish: Any) -> dict[str, Row]:
        """Those that are not ok; a restore of what blocks is refused, and leaves nothing."""
        asked = Restoration(self.to, **wish)
        found = await self.engine.check("web", asked, self.id)
        assert not self.to.exists()
        assert found.fits == all(row.verdict != "blocks" for row in found.rows)
        if not found.fits:
            with pytest.raises(SnapError) as refused:
                await self.engine.prepare_restore("web", asked, self.id)
            blocks = [row.why for row in found.rows if row.verdict == "blocks"]
            # how much memory is free is another figure the next moment
            blocking = [why.partition(", and only")[0] for why in blocks]
            assert any(why in str(refused.value) for why in blocking)
            assert not self.to.exists()
        return {row.what: row for row in found.rows if row.verdict != "ok"}


@pytest.fixture
async def kept(qemu72: Path, short: Path, store: Path) -> AsyncIterator[Kept]:
    async with snapped(qemu72, short, store) as it:
        yield it


@asynccontextmanager
async def snapped(qemu: Path, short: Path, store: Path) -> AsyncIterator[Kept]:
    kernel = short / "kernel"
    kernel.write_bytes(b"nothing that boots" + bytes(4096))
    words = [*machine(short / "d0.qcow2"), "-device", f"loader,file={kernel},addr=0x100000"]
    engine = Engine(short / "local", store, allow_local_store=True)
    (store / "web").touch()  # where the VM's folder is to be: it stays in the spool
    async with running(qemu, *words, directory=short) as vm:
        with pytest.raises(NotShipped) as waits:
            await engine.create(Machine("web", vm.qmp), Wishes(ram=RamChoice.PAUSED, max_pause=30))
    made: Any = waits.value.created
    spool = LocalRoot(short / "local").spool("web", made.id)
    yield Kept(engine, made.id, spool, short / "back", kernel)


async def test_a_machine_on_its_own_host(program: Program, qemu72: Path) -> None:
    async with powered(program, qemu72) as vm:
        await program.ok("create", "web", "--socket", vm.qmp, *program.roots)
    words = ["restore", "web", "--to", "back", *program.roots, "--check"]
    ran = await program.ok(*words)
    assert ran.out.splitlines()[0].split() == HEAD
    assert "pc-i440fx-7.2" in ran.out
    found = shaped("restore-check", (await program.ok(*words, "--json")).record)
    assert {row["verdict"] for row in found["rows"]} == {"ok"}
    assert found["fits"]
    assert found["limits"] == []  # none are set without a word
    assert found["qemu"] == str(qemu72)
    told = [row["what"] for row in found["rows"]]
    assert len(told) == len(set(told))
    assert {"disk vd0", "vmstate", "memory", "disk space", "QEMU", "machine type"} <= set(told)
    assert not (program.dir / "back").exists()

    newer = binaries()["11.1"]
    if newer.exists():
        other = await program.ok(*words, "--qemu", newer)
        assert "is newer than 7.2" in other.out
        words = [*words[:-1], "--no-start", "--qemu", newer]
        ran = await program.ok(*words)
        assert "warning: QEMU version: 11.1" in ran.err


async def test_what_blocks_is_named_and_nothing_starts(program: Program, qemu72: Path) -> None:
    async with powered(program, qemu72) as vm:
        ran = await program.ok("create", "web", "--socket", vm.qmp, *program.roots, "--json")
    half = program.store / "web" / ran.record["id"]
    (half / "vmstate/stream.zst").unlink()
    words = ["restore", "web", "--to", "back", *program.roots]
    blocked: Ran = await program.run(*words, "--check", "--json")
    assert blocked.code == 3
    assert blocked.error["code"] == "blocked"
    assert "vmstate" in blocked.error["message"]
    found = shaped("restore-check", blocked.record)
    assert [row["what"] for row in found["rows"] if row["verdict"] == "blocks"] == ["vmstate"]
    refused = await program.run(*words, "--json")
    assert refused.code == 7
    assert "stream.zst" in refused.error["message"]
    assert not (program.dir / "back").exists()
    cold = await program.ok(*words, "--check", "--cold", "--json")
    told = {row["what"]: row["verdict"] for row in cold.record["rows"]}
    assert told["vmstate/stream.zst"] == "differs"


async def test_each_field_of_the_machine_that_is_gone_is_named(kept: Kept) -> None:
    assert await kept.rows() == {}
    tree = json.loads((kept.spool / "machine.json").read_bytes())
    assert set(tree) == set(Configuration.__struct_fields__)
    assert set(tree["details"]) == set(Details.__struct_fields__)
    inner = [(part, key) for part in ("inventory", "details") for key in tree[part]]
    for *parts, key in [*((key,) for key in tree), *inner]:
        other = copy.deepcopy(tree)
        del (other[parts[0]] if parts else other)[key]
        with kept.changed("machine.json", json.dumps(other).encode()):
            found = await kept.rows()
        assert list(found) == ["machine.json"]
        assert f"`{key}`" in found["machine.json"].why or f".{key}`" in found["machine.json"].why


async def test_each_option_of_the_machine_that_is_gone_is_known_by_its_digest(kept: Kept) -> None:
    content = (kept.spool / "machine.json").read_bytes()
    tree = json.loads(content)
    del tree["options"][0]
    path = kept.spool / "machine.json"
    path.write_bytes(json.dumps(tree).encode())
    found = await kept.rows()
    assert list(found) == ["machine.json"]
    assert str(path) in found["machine.json"].why


@pytest.mark.parametrize("harm", ["gone", "cut"])
async def test_each_file_of_the_store_half_that_is_gone_is_named(kept: Kept, harm: str) -> None:
    path = kept.spool / "manifest.json"
    listed = [entry.name for entry in decode(path.read_bytes(), Manifest, path).files]
    ram = ["vmstate/ram.index", "vmstate/stream.zst"]
    assert sorted(listed) == ["machine.json", "usage.json", *ram]
    for name in listed:
        file = kept.spool / name
        content = file.read_bytes()
        file.unlink()
        if harm == "cut":
            file.write_bytes(content[:-1])
        found = await kept.rows()
        (row,) = found.values()
        assert str(file) in row.why
        # without its index the RAM comes from the page images that are kept here
        assert row.verdict == ("differs" if name in {"usage.json", ram[0]} else "blocks")
        file.write_bytes(content)
    assert await kept.rows() == {}
    path.unlink()
    with pytest.raises(SnapError, match="spool"):
        await kept.rows()


async def test_a_machine_of_more_memory_than_is_free(kept: Kept) -> None:
    usage = json.loads((kept.spool / "usage.json").read_bytes())
    assert usage["before"]["memory"]["rss_bytes"] > 1 << 20
    usage["before"]["memory"]["rss_bytes"] = 1 << 50
    with kept.changed("usage.json", json.dumps(usage).encode()):
        found = await kept.rows()
        assert found.pop("memory").verdict == "blocks"
        # where this test itself runs under a limit, that is told as well
        assert all(name.startswith("memory limit of ") for name in found)
        with pytest.raises(Blocked, match=r"memory: the VM used 1024\.0 TiB, and only"):
            await kept.engine.prepare_restore("web", Restoration(kept.to), kept.id)
        assert {row.verdict for row in (await kept.rows(cold=True)).values()} == {"differs"}
    for key in ("format", "version", "before"):
        other = copy.deepcopy(usage)
        del other[key]
        with kept.changed("usage.json", json.dumps(other).encode()):
            found = await kept.rows()
        assert found["usage.json"].verdict == "differs"
        assert key in found["usage.json"].why


Change = Callable[[dict[str, Any]], object]
MACHINES: list[tuple[str, Change, str, str]] = [
    ("exe", lambda it: it.update(exe="/nosuch/qemu-nosuch"), "command line", "qemu-nosuch"),
    ("type", lambda it: it.update(machine_type="pc-q35-99.0"), "machine type", "pc-q35-99.0"),
    ("plug", lambda it: it.update(hotplugged=["nic7"]), "hotplug", "nic7"),
    ("pull", lambda it: it.update(unplugged=["nic8"]), "hotplug", "nic8"),
    (
        "device",
        lambda it: it["options"].append({"option": "device", "keyval": {"driver": "nosuch-dev"}}),
        "devices",
        "nosuch-dev",
    ),
    ("cpu", lambda it: it["options"].append({"option": "cpu", "text": "Z80"}), "CPU model", "Z80"),
    (
        "initrd",
        lambda it: it["options"].append({"option": "initrd", "text": "gone.img"}),
        "file ",
        "gone.img",
    ),
    (
        "bridge",
        lambda it: it["options"].append(
            {"option": "netdev", "keyval": {"type": "bridge", "id": "n", "br": "nosuchbr"}}
        ),
        "netdev n",
        "nosuchbr",
    ),
    (
        "vfio",
        lambda it: it["options"].append({"option": "device", "keyval": {"driver": "vfio-pci"}}),
        "command line",
        "vfio-pci",
    ),
    ("unknown", lambda it: it["options"].append({"option": "nosuch"}), "command line", "-nosuch"),
]


async def test_what_this_host_has_not(kept: Kept) -> None:
    tree = json.loads((kept.spool / "machine.json").read_bytes())
    for name, change, what, told in MACHINES:
        other = copy.deepcopy(tree)
        change(other)
        with kept.changed("machine.json", json.dumps(other).encode()):
            found = await kept.rows()
            blocking = [row for row in found.values() if row.verdict == "blocks"]
            assert len(blocking) == 1, (name, found)
            assert blocking[0].what.startswith(what), name
            assert told in blocking[0].why, name
            cold = await kept.rows(cold=True)
            assert (cold == {}) == (what == "hotplug" or name == "vfio"), (name, cold)


async def test_a_file_that_the_machine_reads(kept: Kept) -> None:
    kept.kernel.rename(kept.kernel.with_name("moved"))
    found = await kept.rows()
    assert list(found) == [f"file {kept.kernel}"]
    assert "is missing" in found[f"file {kept.kernel}"].why


async def test_an_image_that_was_written_to(kept: Kept) -> None:
    image = kept.spool.parent / "vd0.qcow2"
    os.utime(image)
    found = await kept.rows()
    assert list(found) == ["disk vd0"]
    assert "was written to" in found["disk vd0"].why
    image.unlink()
    for wish in ({}, {"cold": True}, {"standalone": True}):
        assert "is missing" in (await kept.rows(**wish))["disk vd0"].why


async def test_wishes_that_cannot_be(kept: Kept, short: Path) -> None:
    assert "no revision 3" in (await kept.rows(revision=3))["revision"].why
    qemu = short / "qemu"
    qemu.write_text("#!/bin/sh\nexit 1\n")
    qemu.chmod(0o755)
    assert str(qemu) in (await kept.rows(qemu=qemu))["QEMU"].why
    deep = short / ("d" * 90) / "qmp"
    assert "107 bytes" in (await kept.rows(qmp=deep))["QMP socket"].why
    other = short / "other"
    other.mkdir()
    (other / "mine").touch()
    found = await kept.engine.check("web", Restoration(other), kept.id)
    assert [row.what for row in found.rows if row.verdict == "blocks"] == ["folder"]
    assert (other / "mine").exists()


@pytest.fixture
def small(short: Path) -> Iterator[Path]:
    """A folder on a file system of its own that holds 128 KiB."""
    with room(short / "small", "128k") as path:
        yield path


async def test_a_folder_without_room(kept: Kept, small: Path) -> None:
    found = await kept.engine.check("web", Restoration(small / "back"), kept.id)
    blocking = [row for row in found.rows if row.verdict == "blocks"]
    assert [row.what for row in blocking] == ["disk space"]
    assert str(small) in blocking[0].why
    with pytest.raises(Blocked, match="disk space"):
        await kept.engine.prepare_restore("web", Restoration(small / "back"), kept.id)
    assert names(small) == []


async def test_a_folder_without_room_for_pages(kept: Kept, tmp_path: Path) -> None:
    """RAM that is not kept here is made there, before the guest runs or while it does."""
    with room(tmp_path / "room", "640k") as path:
        assert (await kept.engine.check("web", Restoration(path / "back"), kept.id)).fits
        shutil.rmtree(kept.spool.parents[1] / "ram")
        found = await kept.engine.check("web", Restoration(path / "back"), kept.id)
    assert [row.what for row in found.rows if row.verdict == "blocks"] == ["disk space"]


async def test_a_machine_of_a_newer_qmpsnap(kept: Kept) -> None:
    tree = json.loads((kept.spool / "machine.json").read_bytes())
    with kept.changed("machine.json", json.dumps(tree | {"version": 99}).encode()):
        assert "version 99" in (await kept.rows())["machine.json"].why
        with pytest.raises(ManifestError, match="version 99"):
            await kept.engine.prepare_restore("web", Restoration(kept.to), kept.id)


async def test_a_machine_of_version_1_comes_back(kept: Kept) -> None:
    tree = json.loads((kept.spool / "machine.json").read_bytes())
    del tree["details"]
    with kept.changed("machine.json", json.dumps(tree | {"version": 1}).encode()):
        assert await kept.rows() == {}
        ready = await kept.engine.prepare_restore("web", Restoration(kept.to), kept.id)
        async with kept.engine.restored(ready) as back:
            assert back.process.pid


Other = Callable[[dict[str, Any]], object]
DETAILS: list[tuple[Other, str, str]] = [
    (lambda it: it["cpu"]["features"].append("nosuch"), "CPU features", "differs"),
    (lambda it: it["firmware"][0].update(blake3="0" * 64), "firmware ", "differs"),
    (lambda it: it["firmware"][0].update(size_bytes=1 << 30), "firmware ", "blocks"),
    (lambda it: it["memory_backends"][0].update(huge_page_bytes=4096), "huge pages", "blocks"),
]


async def test_what_is_not_here_as_it_was_there(kept: Kept) -> None:
    tree = json.loads((kept.spool / "machine.json").read_bytes())
    for change, what, verdict in DETAILS:
        other = copy.deepcopy(tree)
        change(other["details"])
        with kept.changed("machine.json", json.dumps(other).encode()):
            (row,) = (await kept.rows()).values()
        assert row.what.startswith(what)
        assert row.verdict == verdict
