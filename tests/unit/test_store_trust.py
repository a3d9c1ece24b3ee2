"""What the store's worker reads of a half that nobody vouches for: nothing, whoever asks."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import msgspec
import pytest

from qmpsnap.engine import ramknown
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import DigestMismatch, Foreign, SignatureWrong, SnapError, StoreError, Unsigned
from qmpsnap.store import half, local, shipping, wire
from qmpsnap.store.catalogue import join
from qmpsnap.store.keyring import Keyring
from qmpsnap.store.layout import MANIFEST, SIGNATURE, LocalRoot
from qmpsnap.store.manifest import Manifest, decode, encode
from qmpsnap.store.remote import Store
from qmpsnap.store.signature import Trust
from tests.rig.halves import HOST
from tests.rig.packed import IDS, Series, changing, quiet

PACKAGE = Path(__file__).resolve().parents[2] / "qmpsnap"
FIRST, SECOND = IDS[:2]


class Host:
    """A series whose spools are signed, the keys that sign them, and those of another host."""

    def __init__(self, path: Path) -> None:
        self.series = Series(path)
        self.ring = Keyring(path / "keys", "here")
        self.other = Keyring(path / "other", "there")
        self.ring.ready()

    def sign(self, folder: Path, ring: Keyring | None = None) -> None:
        content = (ring or self.ring).sign((folder / MANIFEST).read_bytes())
        (folder / SIGNATURE).write_bytes(content)

    def spool(self, id: str) -> Path:
        self.series.spool(id, changing(int(id[7])))
        spool = self.series.local.spool("web", id)
        self.sign(spool)
        return spool

    def shipped(self, id: str) -> Path:
        self.spool(id)
        self.series.ship(id)
        return self.series.store.snapshot("web", id)

    def trust(self, *accepted: str) -> Trust:
        return self.ring.trust(accepted)  # type: ignore[arg-type]


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def _reading(host: Host, id: str, to: Path, trust: Trust):
    """Each verb that reads a store half, as a function."""
    root, of = host.series.store, {"root": str(host.series.store.path), "vm": "web", "id": id}
    of |= {"seal": None, "trust": trust}
    (to / "images").mkdir(parents=True)

    def load() -> None:
        with (to / "loaded").open("wb") as file:
            request = wire.Load(name="machine.json", fd=file.fileno(), **of)
            half.load(root, request, quiet)

    return {
        "glance": lambda: half.glance(root, wire.Glance(texts=["machine.json"], **of), quiet),
        "read": lambda: half.read(root, wire.Read(name="machine.json", **of)),
        "load": load,
        "fetch": lambda: half.fetch(
            root, wire.Fetch(name="machine.json", to=str(to / "f"), unpack=False, **of), quiet
        ),
        "fill": lambda: half.fill(root, wire.Fill(to=str(to / "images"), near=[], **of), quiet),
    }


def _unsigned(host: Host, folder: Path) -> None:
    (folder / SIGNATURE).unlink()


def _foreign(host: Host, folder: Path) -> None:
    host.sign(folder, host.other)


def _altered(host: Host, folder: Path) -> None:
    manifest = decode((folder / MANIFEST).read_bytes(), Manifest, folder)
    altered = encode(msgspec.structs.replace(manifest, note="another"))
    (folder / MANIFEST).write_bytes(altered)


def _swapped(host: Host, folder: Path) -> None:
    other = host.shipped(SECOND)
    shutil.copy(other / SIGNATURE, folder / SIGNATURE)


def _cut(host: Host, folder: Path) -> None:
    (folder / SIGNATURE).write_bytes((folder / SIGNATURE).read_bytes()[:40])


@pytest.mark.parametrize(
    ("spoil", "code", "reason"),
    [
        (_unsigned, "unsigned", "unsigned"),
        (_foreign, "foreign", "foreign"),
        (_altered, "signature-wrong", None),
        (_swapped, "signature-wrong", None),
        (_cut, "manifest-error", None),
    ],
)
def test_every_verb_refuses_before_it_reads_anything_else(host, tmp_path, spoil, code, reason):
    folder = host.shipped(FIRST)
    for name, verb in _reading(host, FIRST, tmp_path / "good", host.trust()).items():
        verb(), name
    spoil(host, folder)
    # nothing of what the manifest names can be read: who tries is seen
    for path in folder.iterdir():
        if path.name not in {MANIFEST, SIGNATURE}:
            path.rename(folder.parent / path.name)
    anything_else = [one for one in ("unsigned", "foreign") if one != reason]
    for name, verb in _reading(host, FIRST, tmp_path / "bad", host.trust(*anything_else)).items():
        with pytest.raises(SnapError) as refused:
            verb()
        assert refused.value.code == code, name
        assert FIRST in str(refused.value)
    # `fetch` and `fill` have made nothing
    assert [path.name for path in (tmp_path / "bad").rglob("*") if path.is_file()] in (
        ["loaded"],
        [],
    )
    request = wire.Verify(
        root=str(host.series.store.path), vm="web", id=FIRST, seal=None,
        trust=host.trust(*anything_else),
    )  # fmt: skip
    (found,) = half.verify(host.series.store, request, quiet)
    assert found.file == MANIFEST

    (listed,) = half.catalogue(host.series.store, "web", quiet, host.trust(*anything_else)).found[
        :1
    ]
    assert (listed.problem is not None) == (reason is None)
    if listed.signed is not None:
        assert (listed.signed.verdict, listed.signed.accepted) == (reason, False)


@pytest.mark.parametrize(("spoil", "reason"), [(_unsigned, "unsigned"), (_foreign, "foreign")])
def test_what_is_accepted_by_name_is_read(host, tmp_path, spoil, reason):
    spoil(host, host.shipped(FIRST))
    trust = host.trust(reason)
    for verb in _reading(host, FIRST, tmp_path / "back", trust).values():
        verb()
    request = wire.Verify(
        root=str(host.series.store.path), vm="web", id=FIRST, seal=None, trust=trust
    )
    assert half.verify(host.series.store, request, quiet) == []
    (found,) = half.catalogue(host.series.store, "web", quiet, trust).found
    assert found.signed is not None
    assert (found.signed.verdict, found.signed.accepted) == (reason, True)


def _ship(host: Host, id: str, **more: object) -> wire.Ship:
    return wire.Ship(
        root=str(host.series.store.path), vm="web", id=id, device=None,
        spool=str(host.series.local.spool("web", id)),
        shared=str(host.series.local.shared("web")), **{"trust": host.trust(), **more},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "error"), [(_unsigned, Unsigned), (_foreign, Foreign), (_altered, SignatureWrong)]
)
def test_a_spool_that_nobody_vouches_for_does_not_reach_the_store(host, spoil, error):
    spoil(host, host.spool(FIRST))
    with pytest.raises(error):
        shipping.ship(host.series.store, _ship(host, FIRST), quiet)
    assert list(host.series.store.path.iterdir()) == []
    of = {"root": str(host.series.store.path), "vm": "web", "id": FIRST, "trust": host.trust()}
    spool, shared = host.series.local.spool("web", FIRST), host.series.local.shared("web")
    with pytest.raises(error):
        half.packs(
            host.series.store,
            wire.Packs(spool=str(spool), shared=str(shared), whole=False, **of),
            quiet,
        )


async def test_a_stranger_lends_no_ram(host, tmp_path, caplog):
    _foreign(host, host.shipped(FIRST))

    def roots(*accepted: str) -> Roots:
        store = Store(host.series.store, 20, trust=lambda: host.trust(*accepted))
        return Roots(LocalRoot(tmp_path / "elsewhere"), store)

    (tmp_path / "elsewhere").mkdir()
    assert (await ramknown.known(roots(), "other", ["web"])).lent == []
    assert "lends no RAM: it is signed with the key" in caplog.text
    ((lender, _),) = (await ramknown.known(roots("foreign"), "other", ["web"])).lent
    assert lender == "web"


class Cut(Exception):
    pass


@pytest.mark.parametrize("step", range(1, 12))
def test_cut_off_anywhere_what_is_sealed_is_signed(host, monkeypatch, step):
    """However often a file is given its name: the manifest never has one before its signature."""
    from qmpsnap.store import files

    host.spool(FIRST)
    folder, settle, count = host.series.store.snapshot("web", FIRST), files._settle, 0

    def cut(part: Path, path: Path) -> None:
        nonlocal count
        count += 1
        if count == step:
            raise Cut
        settle(part, path)

    monkeypatch.setattr(files, "_settle", cut)
    try:
        shipping.ship(host.series.store, _ship(host, FIRST), quiet)
    except Cut:
        assert not (folder / MANIFEST).exists()
    else:
        assert step > count > 4  # the sweep has gone past the end
    monkeypatch.undo()
    shipping.ship(host.series.store, _ship(host, FIRST), quiet)
    request = wire.Verify(
        root=str(host.series.store.path), vm="web", id=FIRST, seal=None, trust=host.trust()
    )
    assert half.verify(host.series.store, request, quiet) == []


def test_shipping_again_brings_back_a_signature_that_is_gone(host):
    host.spool(FIRST)
    shipping.ship(host.series.store, _ship(host, FIRST), quiet)
    signed = host.series.store.snapshot("web", FIRST) / SIGNATURE
    signed.unlink()
    shipping.ship(host.series.store, _ship(host, FIRST), quiet)
    assert signed.exists()
    signed.write_bytes(b"another")
    with pytest.raises(StoreError, match=r"manifest\.sig: exists, with another content"):
        shipping.ship(host.series.store, _ship(host, FIRST), quiet)


def test_the_seal_is_looked_at_besides(host):
    """An older manifest of ours in the place of this one is signed, and is not this one."""
    host.shipped(FIRST)
    request = wire.Read(
        root=str(host.series.store.path), vm="web", id=FIRST, seal="ab" * 32, trust=host.trust(),
        name="machine.json",
    )  # fmt: skip
    with pytest.raises(DigestMismatch, match="local half names"):
        half.read(host.series.store, request)


def test_the_halves_of_another_snapshot_are_none_of_this_one(host):
    first, second = host.shipped(FIRST), host.shipped(SECOND)
    for name in (MANIFEST, SIGNATURE):
        shutil.copy(second / name, first / name)
    request = wire.Read(
        root=str(host.series.store.path), vm="web", id=FIRST, seal=None, trust=host.trust(),
        name="machine.json",
    )  # fmt: skip
    with pytest.raises(SnapError, match=f"is the manifest of web {SECOND}"):
        half.read(host.series.store, request)


@pytest.mark.parametrize(
    ("spoil", "state", "why"),
    [
        (None, "shipping", "waits in the spool"),
        (_unsigned, "shipping", "not signed: `ship` signs it"),
        (_foreign, "untrusted", "not trusted here"),
        (_altered, "damaged", "is not what manifest.sig"),
    ],
)
def test_a_spool_is_listed_as_what_it_is(host, spoil, state, why):
    spool = host.spool(FIRST)
    if spoil is not None:
        spoil(host, spool)
    facts = local.survey(host.series.local, "web", trust=host.trust())
    (entry,) = join(facts, wire.Listing(found=[], foreign=[]), host=HOST)
    assert entry.state == state
    assert why in entry.why


@pytest.mark.parametrize(
    ("spoil", "words"), [(_unsigned, "it is not signed"), (_foreign, "not trusted here")]
)
def test_a_half_of_another_host_says_who_vouches_for_it(host, spoil, words):
    spoil(host, host.shipped(FIRST))
    listing = half.catalogue(host.series.store, "web", quiet, host.trust())
    (entry,) = join([], listing, host=HOST)
    assert entry.state == "store only"
    assert words in entry.why


def _calls(path: Path, name: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def test_no_store_is_made_that_asks_for_no_signature():
    """And no worker is ever told more than public keys."""
    made = {
        path.relative_to(PACKAGE): call
        for path in PACKAGE.rglob("*.py")
        for call in _calls(path, "Store")
    }
    # the engine's, the feeder's, the lasting one, and that of what is to be signed
    assert len(made) == 4
    for path, call in made.items():
        assert "trust" in {word.arg for word in call.keywords}, path
    told = set(msgspec.json.schema(wire.AnyRequest)["$defs"]["Trust"]["properties"])  # type: ignore[arg-type]
    assert told == {"keys", "accepted"}
