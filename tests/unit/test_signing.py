"""What was shipped unsigned is signed later, if this host has taken it and it is as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from qmpsnap import Engine
from qmpsnap.errors import DigestMismatch, Foreign, SignatureWrong, SnapshotUnknown
from qmpsnap.store import lease, local, shipping, wire
from qmpsnap.store.files import digest_bytes
from qmpsnap.store.keyring import Keyring
from qmpsnap.store.layout import MANIFEST, SIGNATURE, LocalRoot, StoreRoot
from qmpsnap.store.lease import Claimant
from qmpsnap.store.manifest import Manifest, Paired, decode, encode
from qmpsnap.store.signature import Trust
from tests.rig.halves import ID, LATER, MOMENT, spooled

THIRD = "20261122T165059000Z"


class Host:
    """A host that has shipped for `web`, before there were signatures."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.root, self.path, self.store = LocalRoot(folder / "local"), folder, StoreRoot(store)

    def engine(self, *insecure: str) -> Engine:
        return Engine(
            self.root.path, self.store.path, allow_local_store=True, insecure=insecure, lease=60
        )

    @property
    def ring(self) -> Keyring:
        return self.engine().keys

    def shipped(self, id: str) -> Path:
        spool, to = spooled(self.root, "web", id), self.store.snapshot("web", id)
        shutil.copytree(spool, to)
        shutil.rmtree(spool)
        digest = digest_bytes((to / MANIFEST).read_bytes())
        note = Paired(id=id, manifest_blake3=digest, store="/mnt", shipped_at=MOMENT)
        local.mark_paired(self.root, "web", note)
        return to

    async def states(self) -> list[str]:
        return [one.state for one in await self.engine().list("web")]

    async def refused(self, code: str, exit_code: int, *insecure: str) -> str:
        """Why the first one is not signed; nothing is written."""
        before = [path for path in self.store.path.rglob("*") if "lease" not in path.parts]
        done, (why,) = await self.engine(*insecure).sign("web", [ID])
        assert (done, why.code, why.exit_code) == ([], code, exit_code)
        after = [path for path in self.store.path.rglob("*") if "lease" not in path.parts]
        assert sorted(after) == sorted(before)
        return str(why)


@pytest.fixture
def host(short: Path, store: Path) -> Host:
    return Host(short, store)


async def test_all_that_this_host_has_shipped(host: Host) -> None:
    folders = [host.shipped(id) for id in (ID, LATER)]
    assert await host.states() == ["untrusted", "untrusted"]
    done, refused = await host.engine().sign("web", dry_run=True)
    assert ([one.outcome for one in done], refused) == (["would be signed"] * 2, [])
    assert await host.states() == ["untrusted", "untrusted"]
    done, refused = await host.engine().sign("web", [LATER])
    assert [(one.id, one.outcome, one.vouched) for one in done] == [(LATER, "signed", "local half")]
    assert await host.states() == ["untrusted", "paired"]
    assert done[0].key == host.ring.ready()
    done, refused = await host.engine().sign("web")
    assert ([one.id for one in done], refused) == ([ID], [])
    assert await host.states() == ["paired", "paired"]
    assert await host.engine().sign("web") == ([], [])
    done, refused = await host.engine().sign("web", [ID[:18], "latest"])
    assert [one.outcome for one in done] == ["was signed", "was signed"]
    for folder in folders:
        content = host.ring.sign((folder / MANIFEST).read_bytes())
        assert (folder / SIGNATURE).read_bytes() == content
        assert (folder / SIGNATURE).stat().st_mode & 0o777 == 0o600
    with pytest.raises(SnapshotUnknown):
        await host.engine().sign("web", ["2025"])


async def test_what_no_local_half_here_names(host: Host, short: Path) -> None:
    host.shipped(ID)
    shutil.rmtree(host.root.snapshot("web", ID))
    assert "no local half on this host" in await host.refused("unsigned", 3)
    done, refused = await host.engine("unsigned").sign("web", [ID])
    assert ([one.vouched for one in done], refused) == (["insecure"], [])
    (entry,) = await host.engine().list("web")
    assert entry.signature is not None
    assert entry.signature.verdict == "trusted"


async def test_a_local_half_that_goes_with_another_one(host: Host) -> None:
    """What somebody put in its place is whole, and names our local half: that is no secret."""
    folder = host.shipped(ID)
    path = folder / MANIFEST
    sealed = decode(path.read_bytes(), Manifest, path)
    path.write_bytes(encode(msgspec.structs.replace(sealed, note="another")))
    for insecure in ((), ("unsigned",)):
        why = await host.refused("digest-mismatch", 7, *insecure)
        assert "names another store half" in why
    host.root.paired("web", ID).unlink()
    assert "no local half on this host names it" in await host.refused("unsigned", 3)
    path.write_bytes(encode(msgspec.structs.replace(sealed, storage_blake3="0" * 64)))
    for insecure in ((), ("unsigned",)):
        assert "another local half" in await host.refused("digest-mismatch", 7, *insecure)


@pytest.mark.parametrize("insecure", [(), ("unsigned",)])
async def test_what_is_damaged_is_not_signed(host: Host, insecure: tuple[str, ...]) -> None:
    folder = host.shipped(ID)
    (folder / "machine.json").write_bytes(b'{"cpus": 3}\n')
    assert "machine.json" in await host.refused("damaged-data", 7, *insecure)
    (folder / "machine.json").unlink()
    assert "machine.json" in await host.refused("damaged-data", 7, *insecure)


async def test_files_that_nobody_asked_for_are_no_reason(host: Host) -> None:
    folder = host.shipped(ID)
    (folder / f"{SIGNATURE}.partial").write_bytes(b"cut off")
    (folder / "more").touch()
    done, refused = await host.engine().sign("web", [ID])
    assert ([one.outcome for one in done], refused) == (["signed"], [])


async def test_what_others_have_signed(host: Host, short: Path) -> None:
    folder = host.shipped(ID)
    there = Keyring(short / "there", "there")
    content = (folder / MANIFEST).read_bytes()
    (folder / SIGNATURE).write_bytes(there.sign(content))
    for insecure in ((), ("unsigned",), ("foreign",)):
        assert "not trusted here" in await host.refused("foreign", 3, *insecure)
    (folder / SIGNATURE).write_bytes(host.ring.sign(content + b" "))
    assert "altered" in await host.refused("damaged-data", 7, "unsigned")


async def test_one_that_cannot_be_signed_does_not_keep_the_others(host: Host, short: Path) -> None:
    for id in (ID, LATER, THIRD):
        host.shipped(id)
    (host.store.snapshot("web", LATER) / "machine.json").unlink()
    spooled(host.root, "web", "20261122T165100000Z")  # `ship` signs this one
    done, refused = await host.engine().sign("web")
    assert [one.id for one in done] == [ID, THIRD]
    assert [one.code for one in refused] == ["damaged-data"]
    assert await host.states() == ["paired", "untrusted", "paired", "shipping"]
    _, (waiting,) = await host.engine().sign("web", ["latest"])
    assert (waiting.code, waiting.hint) == ("blocked", "`qmpsnap ship` signs it")


async def test_a_vm_of_another_host(host: Host, short: Path) -> None:
    host.shipped(ID)
    other = Claimant(holder="b", host="elsewhere", term_s=60, seen=str(short / "seen"))
    lease.take(host.store, "web", other)
    why = await host.refused("lease-held", 3)
    assert "elsewhere" in why


def test_the_worker_puts_down_what_is_trusted_only(host: Host, short: Path) -> None:
    folder = host.shipped(ID)
    content = (folder / MANIFEST).read_bytes()
    host.ring.ready()
    trust = Trust(keys=host.ring.trust().keys, accepted=["unsigned"])

    def put(made: bytes, seal: str = digest_bytes(content)) -> None:
        shipping.sign(
            host.store,
            wire.Sign(
                root=str(host.store.path), vm="web", id=ID, trust=trust, seal=seal,
                signature=made.decode(),
            ),
        )  # fmt: skip

    with pytest.raises(Foreign):
        put(Keyring(short / "there", "there").sign(content))
    with pytest.raises(SignatureWrong):
        put(host.ring.sign(content + b" "))
    with pytest.raises(DigestMismatch):
        put(host.ring.sign(content), "0" * 64)
    assert not (folder / SIGNATURE).exists()
    put(host.ring.sign(content))
    put(host.ring.sign(content))
