"""Who vouches for a snapshot, on real ones: what is altered, unsigned or foreign is not touched."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Level, RamChoice, Wishes
from qmpsnap.errors import Blocked, SnapError, StoreRefused, UsageError
from qmpsnap.store import keyfile
from qmpsnap.store.files import digest_bytes
from qmpsnap.store.keyring import Keyring
from qmpsnap.store.layout import MANIFEST, SIGNATURE
from qmpsnap.store.manifest import Manifest, Paired, decode, encode
from tests.faults.bench import options
from tests.rig.graph import status
from tests.rig.qemu import binary, running

WISHES = Wishes(level=Level.FULL, ram=RamChoice.PAUSED, max_pause=20)
KEY = Path("key")


@dataclass
class Host:
    """A host with keys of its own, and a store that it may share."""

    dir: Path
    store: Path
    keys: Path | None = None

    def engine(self, **other: object) -> Engine:
        # page images would bring back RAM that the store is not asked for
        how = {"allow_local_store": True, "ram_images": 0, "keys": self.keys, **other}
        return Engine(self.dir / "local", self.store, **how)  # type: ignore[arg-type]

    @property
    def ring(self) -> Keyring:
        return self.engine().roots.keyring

    def half(self, id: str) -> Path:
        return self.store / "vm" / id

    def paired(self, id: str, manifest: bytes) -> None:
        """The local half says that this is what was shipped: no digest is in the way."""
        path = self.dir / "local/vm" / id / "paired.json"
        noted = decode(path.read_bytes(), Paired, path)
        path.write_bytes(
            encode(msgspec.structs.replace(noted, manifest_blake3=digest_bytes(manifest)))
        )

    def files(self) -> set[Path]:
        return {path for root in (self.dir, self.store) for path in root.rglob("*")}

    async def refused(self, id: str, code: set[str], **how: object) -> None:
        """By everything that would read of it, before anything is made or started."""
        before, engine, to = self.files(), self.engine(**how), self.dir / "back"

        wish = Restoration(to)
        verbs = {
            "show": lambda: engine.show("vm", id),
            "captured": lambda: engine.captured("vm", id),
            "vmstate": lambda: engine.vmstate("vm", id),
            "usage": lambda: engine.usage("vm", id),
            "check": lambda: engine.check("vm", wish, id),
            "restore": lambda: engine.prepare_restore("vm", wish, id),
            "cold": lambda: engine.prepare_restore("vm", Restoration(to, cold=True), id),
            "clones": lambda: engine.prepare_clones("vm", wish, 2, id),
        }
        # who is refused for one reason is for any: all verbs are asked of one only
        for name in verbs if "unsigned" in code else ("show", "restore"):
            verb = verbs[name]
            with pytest.raises(SnapError) as refused:
                await verb()
            assert refused.value.code in code, name
            assert id in str(refused.value), name
            if name == "clones":
                to.rmdir()  # it is there, and empty
        if not code & {"half-missing"}:
            with pytest.raises(SnapError) as refused:
                async with engine.exported("vm", "vd0", id):
                    pytest.fail("served")
            assert refused.value.code in code
        (entry,) = [one for one in await engine.list("vm") if one.id == id]
        assert entry.state in {"untrusted", "damaged"}
        assert entry.why
        found = await engine.verify("vm", id)
        assert found.findings
        assert found.untrusted == (not code & {"half-missing"})
        assert self.files() == before
        assert not to.exists()

    async def comes_back(self, id: str, **how: object) -> str:
        """Restored, running; what the result says of who vouches for it."""
        engine, to = self.engine(**how), self.dir / f"back-{id}"
        wish = Restoration(to)
        if how:
            # what nobody vouches for does not say which program is run
            with pytest.raises(Blocked, match="is named by a snapshot that nobody trusted"):
                await engine.prepare_restore("vm", wish, id)
            assert not to.exists()
            wish = Restoration(to, qemu=binary("7.2"))
        ready = await engine.prepare_restore("vm", wish, id)
        async with engine.restored(ready) as back:
            assert back.machine.qmp is not None
            assert await status(back.machine.qmp) == "running"
            said = back.shown()["signature"]
        shutil.rmtree(to)
        assert isinstance(said, str)
        warned = [one for one in ready.warnings if one.startswith("signature: ")]
        assert bool(warned) == (said != "trusted")
        return said


def _altered(host: Host, id: str, other: str) -> None:
    path = host.half(id) / MANIFEST
    manifest = decode(path.read_bytes(), Manifest, path)
    content = encode(msgspec.structs.replace(manifest, note="altered"))
    path.write_bytes(content)
    host.paired(id, content)


def _swapped(host: Host, id: str, other: str) -> None:
    shutil.copy(host.half(other) / SIGNATURE, host.half(id) / SIGNATURE)


def _another(host: Host, id: str, other: str) -> None:
    for name in (MANIFEST, SIGNATURE):
        shutil.copy(host.half(other) / name, host.half(id) / name)
    host.paired(id, (host.half(id) / MANIFEST).read_bytes())


def _unsigned(host: Host, id: str, other: str) -> None:
    (host.half(id) / SIGNATURE).unlink()


def _foreign(host: Host, id: str, other: str) -> None:
    stranger = Keyring(host.dir / "stranger", "elsewhere")
    content = (host.half(id) / MANIFEST).read_bytes()
    (host.half(id) / SIGNATURE).write_bytes(stranger.sign(content))


HARMS: dict[Callable[[Host, str, str], None], set[str]] = {
    # whose signature is wrong is damaged, and nothing takes it
    _altered: {"half-missing"},
    _swapped: {"half-missing"},
    _another: {"half-missing"},
    _unsigned: {"unsigned"},
    _foreign: {"foreign"},
}


async def test_what_nobody_vouches_for_is_not_used(qemu72: Path, short: Path, store: Path) -> None:
    ours = Host(short, store)
    engine, (line, _) = ours.engine(), options(short)
    async with running(qemu72, *line, directory=short) as process:
        vm = Machine("vm", process.qmp)
        first = (await engine.create(vm, WISHES)).id
        second = (await engine.create(vm, WISHES)).id
        key = ours.ring.ready()
        for entry in await engine.list("vm"):
            assert entry.state == "paired"
            assert entry.signature is not None
            assert (entry.signature.verdict, entry.signature.key) == ("trusted", key)
        found = await engine.verify("vm", first)
        assert found.findings == []
        assert found.signature is not None
        assert await ours.comes_back(first) == "trusted"

        for harm, codes in HARMS.items():
            touched = [ours.half(second) / name for name in (MANIFEST, SIGNATURE)]
            touched.append(short / "local/vm" / second / "paired.json")
            kept = {path: path.read_bytes() for path in touched}
            harm(ours, second, first)
            # also by who accepts everything else
            await ours.refused(second, codes, insecure=sorted({"unsigned", "foreign"} - codes))
            if codes != {"half-missing"}:
                # what would be the newest is refused, and not passed over for an older one
                with pytest.raises(SnapError) as refused:
                    await engine.show("vm")
                assert refused.value.code in codes
                (reason,) = codes
                assert await ours.comes_back(second, insecure=[reason]) == reason
                tolerant = ours.engine(insecure=[reason])
                assert (await tolerant.verify("vm", second)).findings == []
                assert (await tolerant.list("vm"))[-1].state == "paired"
            for path, content in kept.items():
                path.write_bytes(content)
        shutil.rmtree(short / "stranger")

        # a key that is retired still vouches for what it has signed
        new, old = ours.ring.rotate()
        third = (await engine.create(vm, WISHES)).id
        assert [one.signature.key for one in await engine.list("vm") if one.signature] == [
            old.key, old.key, new.key,
        ]  # fmt: skip
        for id in (first, third):
            assert await ours.comes_back(id) == "trusted"
        ours.ring.forget(old.key)
        await ours.refused(first, {"foreign"})
        # what is not trusted can still be removed
        await engine.delete(vm, first)
        assert [one.id for one in await engine.list("vm")] == [second, third]


async def test_two_hosts_and_one_store(qemu72: Path, short: Path, store: Path) -> None:
    # the local half was carried over, to where it was: who took it is known by the keys alone
    ours, theirs = Host(short, store, short / "a"), Host(short, store, short / "b")
    line, _ = options(short)
    async with running(qemu72, *line, directory=short) as process:
        made = await ours.engine().create(Machine("vm", process.qmp), WISHES)
        assert not (short / "local/.keys").exists()
        theirs.ring.ready()
        await theirs.refused(made.id, {"foreign"})
        key = theirs.ring.imported(keyfile.encode(ours.ring.public()), KEY)
        assert key.key == ours.ring.ready()
        assert await theirs.comes_back(made.id) == "trusted"
        found = await theirs.engine().verify("vm", made.id)
        assert (found.findings, found.untrusted) == ([], False)

        # and what they take is a stranger's here
        other = await theirs.engine().create(Machine("other", process.qmp), WISHES)
    shutil.rmtree(short / "local/other")
    (seen,) = await ours.engine().list("other")
    assert (seen.id, seen.state) == (other.id, "store only")
    assert "not trusted here" in seen.why


async def test_a_key_that_cannot_be_used_is_told_before_the_guest_is_touched(
    qemu72: Path, short: Path, store: Path
) -> None:
    ours = Host(short, store)
    ours.ring.ready()
    (ours.ring.folder / "signing.json").chmod(0o644)
    line, _ = options(short)
    async with running(qemu72, *line, directory=short) as process:
        with pytest.raises(SnapError, match="others may read the secret key") as refused:
            await ours.engine().create(Machine("vm", process.qmp), WISHES)
        assert (refused.value.code, refused.value.exit_code) == ("key-refused", 3)
        assert await status(process.witness) == "running"
    assert [path.name for path in (short / "local/vm").iterdir()] in ([], ["lock"])


@pytest.mark.parametrize("place", ["", "keys", "vm/../keys"])
def test_keys_are_not_kept_on_the_store(short: Path, store: Path, place: str) -> None:
    with pytest.raises(StoreRefused, match="would lie on the store"):
        Engine(short / "local", store, keys=store / place)
    (short / "link").symlink_to(store)
    with pytest.raises(StoreRefused, match="would lie on the store"):
        Engine(short / "local", store, keys=short / "link" / place)


def test_a_reason_that_is_none_is_refused(short: Path, store: Path) -> None:
    with pytest.raises(UsageError, match="insecure: not one of unsigned, foreign: 'damaged'"):
        Engine(short / "local", store, insecure=["damaged"])
