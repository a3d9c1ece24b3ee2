"""Copies of disks that are encrypted: on a real QEMU, from their making to their return."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.created import Created
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Copying, Encrypt, Level, RamChoice, Wishes
from qmpsnap.errors import BaseChanged, Blocked, KeyMissing, NotAuthentic, UsageError
from qmpsnap.hypervisor.monitor import connect
from qmpsnap.store import box, keyfile
from qmpsnap.store.envelope import Role
from tests.faults.bench import options
from tests.rig.qemu import Running, running
from tests.rig.wire import Witness, witness

SIZE, CLUSTER = 16 << 20, 1 << 16
FIRMWARE = Path("/usr/share/seabios/bios-256k.bin")
DISKS = {"vd0": "d0", "vd1": "d1"}


@dataclass(slots=True)
class Vm:
    """A running VM, what its disks hold, and what of that is known to nobody else."""

    process: Running
    eye: Witness
    dir: Path
    model: dict[str, bytearray] = field(
        default_factory=lambda: {name: bytearray(SIZE) for name in DISKS}
    )
    marks: list[bytes] = field(default_factory=list)
    _number: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def machine(self) -> Machine:
        return Machine("web", self.process.qmp)

    def write(self, *clusters: int, zeros: bool = False) -> dict[str, bytes]:
        """Fill *clusters* with what no compressor makes less; all that the disks hold now."""
        for disk, content in self.model.items():
            for cluster in clusters:
                new = random.Random(f"{next(self._number)}").randbytes(CLUSTER)
                if zeros:
                    new = bytes(CLUSTER)
                else:
                    self.marks.append(new[777:809])
                pattern = self.dir / "pattern"
                pattern.write_bytes(new)
                self._ask(disk, f"write -s {pattern} {cluster * CLUSTER} {CLUSTER}")
                content[cluster * CLUSTER : (cluster + 1) * CLUSTER] = new
        return self.now

    @property
    def now(self) -> dict[str, bytes]:
        return {disk: bytes(content) for disk, content in self.model.items()}

    def clear(self, folder: Path) -> set[Path]:
        """The files below *folder* in which something that the guest has written can be read."""
        files = {one: one.read_bytes() for one in folder.rglob("*") if one.is_file()}
        return {one for one, content in files.items() if any(it in content for it in self.marks)}

    def _ask(self, disk: str, words: str) -> None:
        line = f'qemu-io -d /machine/peripheral/{disk}/virtio-backend "{words}"'
        said = self.eye.ask("human-monitor-command", **{"command-line": line})
        assert "error" not in said.lower(), said


@asynccontextmanager
async def guest(qemu: Path, short: Path) -> AsyncIterator[Vm]:
    line, _ = options(short)
    async with running(qemu, *line, directory=short) as process:
        with witness(process.witness) as eye:
            yield Vm(process, eye, short)


def engine(short: Path, store: Path, keys: Path | None = None) -> Engine:
    return Engine(short / "local", store, allow_local_store=True, keys=keys, ram_images=0)


def wishes(
    level: Level = Level.AUTO, encrypt: Encrypt = Encrypt.ALL, *, compress: bool = False
) -> Wishes:
    return Wishes(
        level=level,
        ram=RamChoice.NONE,
        max_pause=30,
        encrypt=encrypt,
        copying=Copying(compress=compress),
    )


def levels(made: Created) -> set[str]:
    return {one.level for one in made.disks.values()}


def formats(short: Path, id: str) -> set[str]:
    return {path.suffix for path in (short / "local/web" / id).glob("vd*")}


def qemu_img(*words: str | Path) -> str:
    ran = subprocess.run(["qemu-img", *words], check=True, capture_output=True, text=True)
    return ran.stdout


def content(image: Path) -> bytes:
    """What a qcow2 reads as; it is sound, and stands on nothing."""
    assert "backing" not in qemu_img("info", "-U", image)
    raw = image.with_suffix(".raw")
    qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", image, raw)
    found = raw.read_bytes()
    raw.unlink()
    return found


async def brought_back(engine: Engine, id: str, to: Path, **how: Any) -> dict[str, bytes]:
    """What the disks of a snapshot hold, as qemu-img reads them off what a restore has built."""
    await engine.prepare_restore("web", Restoration(to, cold=True, **how), id)
    for disk in DISKS:
        qemu_img("check", "-q", "-f", "qcow2", to / f"{disk}.qcow2")
    found = {disk: content(to / f"{disk}.qcow2") for disk in DISKS}
    shutil.rmtree(to)
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("compress", [False, True])
async def test_a_series_comes_back_and_lies_nowhere_in_the_clear(
    qemu: Path, short: Path, store: Path, compress: bool
) -> None:
    ours, states = engine(short, store), dict[str, dict[str, bytes]]()
    async with guest(qemu, short) as vm:
        vm.write(0, 1, 2, 9, 100, 255)
        for number, level in enumerate(("full", "inc", "inc")):
            made = await ours.create(vm.machine, wishes(compress=compress))
            assert levels(made) == {level}
            assert formats(short, made.id) == {".sealed"}
            states[made.id] = vm.now
            vm.write(number, 100 + number, 201)
            vm.write(9 + number, zeros=True)
        made = await ours.create(vm.machine, wishes(Level.DIFF, compress=compress))
        assert levels(made) == {"diff"}
        states[made.id] = vm.now
        vm.write(77)
        revised = await ours.refresh(vm.machine, made.id, copying=Copying(compress=compress))
        assert set(revised.levels.values()) == {"inc"}
        assert vm.clear(short / "local") == set()
        assert vm.clear(store) == set()
        # the witness sees: the guest's own disks have it
        assert {path.name for path in vm.clear(short)} >= {"d0.qcow2", "d1.raw"}
        secret = ours.secrets.current().content
        for path in (one for one in (short / "local").rglob("*") if one.is_file()):
            if path.parent.name != ".keys":
                found = path.read_bytes()
                assert secret not in found, path
                assert secret.hex().encode() not in found, path
        last, revision = made.id, vm.now
        verified = [one async for one in ours.verify_all("web")]
        key = ours.secrets.current().key
        told = [(one.findings, one.disk_keys, one.missing_keys) for one in verified]
        assert told == [([], [key], [])] * 4
    for id, state in states.items():
        assert await brought_back(ours, id, short / "back", revision=0) == state
        standalone = await brought_back(ours, id, short / "back", revision=0, standalone=True)
        assert standalone == state
    assert await brought_back(ours, last, short / "back") == revision
    # what was built stands on nothing: the snapshots can go
    async with guest(qemu, short) as vm:
        for id in states:
            await ours.delete(vm.machine, id)
    assert not (short / "local/web" / last).exists()


@pytest.mark.timeout(120)
async def test_a_machine_goes_on_on_a_disk_that_was_encrypted(
    qemu72: Path, short: Path, store: Path
) -> None:
    ours = engine(short, store)
    async with guest(qemu72, short) as vm:
        state = vm.write(3, 4)
        wish = wishes(Level.FULL)
        warm = Wishes(level=Level.FULL, ram=RamChoice.PAUSED, max_pause=30, encrypt=wish.encrypt)
        made = await ours.create(vm.machine, warm)
        vm.write(3)
    fits = await ours.check("web", Restoration(short / "back"), made.id)
    assert fits.fits
    ready = await ours.prepare_restore("web", Restoration(short / "back"), made.id)
    async with ours.restored(ready) as back, connect(back.machine.socket) as monitor:
        said = await monitor.execute("query-named-block-nodes", {"flat": True})
        assert isinstance(said, list)
        names = {one["file"] for one in said}
        assert str(short / "back/vd0.qcow2") in names
        assert not [name for name in names if ".sealed" in name]
        assert {disk: content(short / "back" / f"{disk}.qcow2") for disk in DISKS} == state


@pytest.mark.timeout(120)
async def test_without_it_they_lie_in_the_clear(qemu72: Path, short: Path, store: Path) -> None:
    """The control: what is looked for would be found."""
    ours = engine(short, store)
    async with guest(qemu72, short) as vm:
        vm.write(5)
        for encrypt in (Encrypt.NONE, Encrypt.STORE):
            made = await ours.create(vm.machine, wishes(Level.FULL, encrypt))
            assert formats(short, made.id) == {".qcow2", ".raw"}
            found = vm.clear(short / "local/web" / made.id)
            assert {path.name for path in found} == {"vd0.qcow2", "vd1.raw"}
        assert '"version": 1' in (short / "local/web" / made.id / "storage.json").read_text()


@pytest.mark.timeout(180)
async def test_what_is_encrypted_stands_on_what_is(qemu72: Path, short: Path, store: Path) -> None:
    ours, states = engine(short, store), dict[str, dict[str, bytes]]()

    async def create(level: Level, encrypt: Encrypt) -> str:
        made = await ours.create(vm.machine, wishes(level, encrypt))
        states[made.id] = vm.now
        vm.write(len(states))
        return f"{made.level} {next(iter(formats(short, made.id)))}"

    async with guest(qemu72, short) as vm:
        vm.write(40)
        assert "full .sealed" not in await create(Level.FULL, Encrypt.STORE)
        for level in (Level.INC, Level.DIFF):
            with pytest.raises(Blocked, match="is not encrypted, and this one is to be"):
                await create(level, Encrypt.ALL)
        assert await create(Level.AUTO, Encrypt.ALL) == "full .sealed"
        assert await create(Level.INC, Encrypt.ALL) == "inc .sealed"
        # a new key: each file has its own, and stands on those of the other
        old, new = reversed(ours.secrets.rotate())
        assert await create(Level.INC, Encrypt.ALL) == "inc .sealed"
        third = list(states)[-1]
        with pytest.raises(Blocked, match="is encrypted, and this one is not to be"):
            await create(Level.INC, Encrypt.NONE)
        (found,) = [one async for one in ours.verify_all("web") if one.id == third]
        assert (found.findings, sorted(found.disk_keys)) == ([], sorted([old.key, new.key]))
        # without the old one nothing more is to stand on it
        away = short / "local/.keys" / f"encryption-{old.key}.json"
        away.rename(short / "away")
        ours = engine(short, store, None)
        ours.secrets._known.clear()
        with pytest.raises(Blocked, match=f"with the key {old.key}, which is not here"):
            await create(Level.INC, Encrypt.ALL)
        fourth = await create(Level.AUTO, Encrypt.ALL)
        assert fourth == "full .sealed"
        (short / "away").rename(away)
        assert "full .sealed" not in await create(Level.AUTO, Encrypt.NONE)
        found_all = [one async for one in ours.verify_all("web")]
        assert [one.findings for one in found_all] == [[]] * len(states)
        with pytest.raises(Blocked, match="is encrypted, and is not served") as refused:
            async with ours.exported("web", "vd0", third):
                pass
        assert "--to FILE" in refused.value.hint
    text = [(short / "local/web" / id / "storage.json").read_text() for id in states]
    assert ['"version": 2' in one for one in text] == [False, True, True, True, True, False]
    for id in list(states)[1:5]:
        assert await brought_back(ours, id, short / "back") == states[id]
    # a disk alone, without the store: of each kind
    shutil.rmtree(store / "web")
    for id in (next(iter(states)), third):
        made = await ours.extract("web", "vd1", short / "out.qcow2", id)
        assert (made.disk, made.virtual_size_bytes) == ("vd1", SIZE)
        assert content(short / "out.qcow2") == states[id]["vd1"]
        with pytest.raises(UsageError, match="is there already"):
            await ours.extract("web", "vd1", short / "out.qcow2", id)
        (short / "out.qcow2").unlink()
    ours.secrets._known.clear()
    shutil.rmtree(short / "local/.keys")
    with pytest.raises(KeyMissing):
        await ours.extract("web", "vd1", short / "out.qcow2", third)
    assert not (short / "out.qcow2").exists()


@pytest.mark.timeout(180)
async def test_the_key_is_not_here_or_the_file_is_not_what_it_was(
    qemu72: Path, short: Path, store: Path
) -> None:
    ours = engine(short, store, short / "a")
    async with guest(qemu72, short) as vm:
        vm.write(1, 2, 3, 4, 5, 6, 7, 8)
        ids = [(await ours.create(vm.machine, wishes())).id]
        vm.write(2, 9)
        ids.append((await ours.create(vm.machine, wishes())).id)
        state = vm.now
        # the disks of a revision alone are encrypted: their store half is not
        ids.append((await ours.create(vm.machine, wishes(encrypt=Encrypt.NONE))).id)
        revised = await ours.refresh(vm.machine, ids[2], encrypt=True)
        assert set(revised.levels.values()) == {"full"}
        assert revised.encryption == ours.secrets.current().key
        again = await ours.refresh(vm.machine, ids[2])
        assert set(again.levels.values()) == {"inc"}
    key, to = ours.secrets.current().key, short / "back"
    theirs = engine(short, store, short / "b")
    theirs.keys.imported(keyfile.encode(ours.keys.public()), Path("key"))
    for id in ids[1:]:
        with pytest.raises(KeyMissing, match=key) as refused:
            await theirs.prepare_restore("web", Restoration(to, cold=True), id)
        assert refused.value.exit_code == 3
        assert not to.exists()
    fits = await theirs.check("web", Restoration(to, cold=True), ids[2])
    rows = {row.what: row.verdict for row in fits.rows}
    assert (rows["encryption of disks"], "encryption" in rows, fits.fits) == (
        "blocks",
        False,
        False,
    )
    fits = await ours.check("web", Restoration(to, cold=True), ids[2])
    rows = {row.what: row.verdict for row in fits.rows}
    assert (rows["encryption of disks"], fits.fits) == ("ok", True)
    (found,) = [one async for one in theirs.verify_all("web") if one.id == ids[1]]
    assert (found.findings, found.disk_keys, found.missing_keys) == ([], [key], [key])
    full, inc = (short / "local/web" / id / "vd0.sealed" for id in ids[:2])
    other = inc.with_name("vd1.sealed")
    for path, harm, kind, why in (
        (full, lambda it: it[:300_000] + b"\0" + it[300_001:], NotAuthentic, "decrypted at"),
        (inc, lambda it: it[:-30] + b"\0" + it[-29:], NotAuthentic, "decrypted at"),
        (inc, lambda it: it[:-1], BaseChanged, "bytes, and has"),
        (inc, lambda _: other.read_bytes(), BaseChanged, "another header"),
    ):
        kept, status = path.read_bytes(), path.stat()
        path.write_bytes(harm(kept))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # it looks untouched
        (found,) = [one async for one in ours.verify_all("web") if one.id == ids[1]]
        assert any("decrypt" in one.what or why in one.what for one in found.findings)
        with pytest.raises(kind, match=why) as spoilt:
            await ours.prepare_restore("web", Restoration(to, cold=True), ids[1])
        assert spoilt.value.exit_code == 7
        assert not to.exists() or not any(to.iterdir())
        path.write_bytes(kept)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert await brought_back(ours, ids[1], to) == state


@pytest.mark.timeout(180)
async def test_firmware_variables_are_never_in_the_clear(
    qemu72: Path, short: Path, store: Path
) -> None:
    """They are read for the store half off the copy, which is encrypted by then."""
    code = "driver=raw,node-name=code,read-only=on,file.driver=file,file.filename="
    variables, line = short / "vars.fd", ["-M", "pc,pflash0=code,pflash1=vars", "-nodefaults"]
    line += ["-blockdev", f"{code}{FIRMWARE}"]
    line += ["-blockdev", f"driver=raw,node-name=vars,file.driver=file,file.filename={variables}"]
    first, other = (random.Random(seed).randbytes(CLUSTER) for seed in (1, 2))
    states = first + other, other + other
    variables.write_bytes(states[0])
    ours = engine(short, store)
    async with running(qemu72, *line, directory=short) as process:
        machine = Machine("web", process.qmp)
        with witness(process.witness) as eye:
            ids = []
            for now in states:
                (short / "pattern").write_bytes(now[:CLUSTER])
                words = f'qemu-io vars "write -s {short / "pattern"} 0 64k"'
                said = eye.ask("human-monitor-command", **{"command-line": words})
                assert "error" not in said.lower(), said
                made = await ours.create(machine, wishes())
                assert levels(made) == ({"inc"} if ids else {"full"})
                ids.append(made.id)
    for id, was in zip(ids, states, strict=True):
        pair = await ours.show("web", id)
        (flash,) = pair.storage.disks
        assert (flash.role, flash.chain[0].format) == ("pflash", "sealed")
        name = f"nvram/{flash.label}.raw"
        path = store / "web" / id / name
        with path.open("rb", buffering=0) as file:
            assert box.Reader(file, ours.secrets, path, role=Role("web", id, name)).read() == was
        await ours.prepare_restore("web", Restoration(short / id, cold=True), id)
        assert content(short / id / f"{flash.label}.qcow2") == was
    for folder in (short / "local", store):
        for path in (one for one in folder.rglob("*") if one.is_file()):
            assert first[100:132] not in path.read_bytes(), path
            assert other[100:132] not in path.read_bytes(), path
    assert [one.findings async for one in ours.verify_all("web")] == [[], []]
