"""What is put together from several files: a VM's folder on either root, and its journal."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from qmpsnap.engine import offline, recover, unkept
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import HalfMissing, ManifestError, SnapError
from qmpsnap.host import journal
from qmpsnap.store import catalogue, half, lease, local, manifest, points, rival, shared, wire
from qmpsnap.store.identity import read_identity
from qmpsnap.store.layout import LocalRoot, StoreRoot
from tests.fuzz import mutation, samples
from tests.fuzz.samples import DIGEST, ID, LATER
from tests.fuzz.surface import Surface
from tests.rig.halves import image, paired, storage
from tests.rig.halves import manifest as good_manifest

VM = "web"
Tree = dict[str, bytes]


def _spoil(dice: Random, seed: Tree) -> Tree:
    """One or two files of *seed* are odd, gone, or another one."""
    made = dict(seed)
    for _ in range(dice.choice((1, 1, 2))):
        name = dice.choice(list(made)) if made else ""
        odds = dice.random()
        if odds < 0.05:
            made.pop(name, None)
        elif odds < 0.1:
            made[name] = seed[dice.choice(list(seed))]
        elif name in made:
            made[name] = mutation.content(dice, made[name], json_too=True)
    return made


def laid(folder: Path, tree: Tree) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _local() -> list[Tree]:
    disk = storage().disks[0]
    increment = msgspec.structs.replace(
        disk, level="inc", parent=ID, overlay=None, means="increment", chain=[image("/x/inc.qcow2")]
    )
    later = storage(id=LATER, level="inc", disks=[increment])
    revision = storage(revision=1, revision_id=LATER, disks=[increment])
    new = {"image": samples.sample(manifest.Image), "instead_of": 2, "parent": ID, "before": None}
    merged = {"format": "qmpsnap-merged", "version": 1, "point": LATER, "disks": {"vda": new}}
    return [
        {
            f"{ID}/storage.json": manifest.encode(storage()),
            f"{ID}/paired.json": manifest.encode(paired(DIGEST)),
            f"{ID}/spool/manifest.json": manifest.encode(good_manifest([], DIGEST)),
            f"{ID}/{LATER}/storage.json": manifest.encode(revision),
            f"{LATER}/storage.json": manifest.encode(later),
            f"{LATER}/merged.json": msgspec.json.encode(merged),
            "identity.json": samples.content(manifest.Identity),
            "shared.json": samples.content(shared.Notes),
            f"shared/{DIGEST}": b"x",
        }
    ]


def _surveyed(given: Tree, scratch: Path) -> object:
    root = LocalRoot(scratch / "local")
    laid(root.path / VM, given)
    facts, found = local.survey(root), points.read(root, VM)
    listing = wire.Listing(found=[], foreign=[])
    words = [
        *(one.problem or "" for one in facts), *found.damaged.values(),
        *(one.why for one in catalogue.join(facts, listing, host="x")),
    ]  # fmt: skip
    assert all(text.isprintable() for text in words), words
    found.needed(set(found.by_name))
    for point in found:
        for disk in point.storage.disks:
            with suppress(ManifestError, HalfMissing):
                found.images(point, disk.label)
    shared.awaited(root, VM)
    return read_identity(root, VM)


def _store() -> list[Tree]:
    entry = manifest.FileEntry(name="machine.json", bytes=2, blake3=DIGEST)
    return [{
        f"{ID}/manifest.json": manifest.encode(good_manifest([entry], DIGEST)),
        f"{ID}/machine.json": b"{}",
        f"shared/{DIGEST}": b"x",
    }]  # fmt: skip


def _asked(given: Tree, scratch: Path) -> object:
    root = StoreRoot(scratch / "store")
    laid(root.path / VM, given)
    listing = half.catalogue(root, None, lambda *_: None)
    joined = catalogue.join([], listing, host="x")
    assert all(one.why.isprintable() for one in joined), joined
    one: dict[str, Any] = {"root": str(root.path), "vm": VM, "id": ID, "seal": None}
    found = half.glance(root, wire.Glance(texts=["machine.json"], **one), lambda *_: None)
    assert all(trouble.message.isprintable() for trouble in found.troubles.values())
    return found, half.verify(root, wire.Verify(**one), lambda *_: None)


def _leases() -> list[Tree]:
    one = samples.content(lease.Lease, holder="other", term_s=60.0, given_up=False)
    return [{f"store/{VM}/lease/00000007.json": one, "rival.json": samples.content(rival.Rival)}]


def _leased(given: Tree, scratch: Path) -> object:
    laid(scratch, given)
    root, seen = StoreRoot(scratch / "store"), str(scratch / "rival.json")
    who = lease.Claimant(holder="us", host="x", term_s=60.0, seen=seen)
    root.path.mkdir(parents=True, exist_ok=True)
    with suppress(SnapError):
        lease.in_words(lease.look(root, VM, who))
    return lease.take(root, VM, who)


def _debts() -> list[bytes]:
    owed = samples.sample(recover.Owed, phase="planned", verb="create", of=None, sockets=None)
    for one in owed["laid"]:
        one.update({key: "/nowhere/x" for key in ("path", "beneath") if key in one})
    lines = [owed, {"phase": "holding"}, {"phase": "captured"}]
    folding = {"phase": "folding", "files": ["/x/a.qcow2"], "process": None}
    gone = [{"verb": "delete", "phase": "planned"}, folding]
    path = owed["laid"][0]["path"] if owed["laid"] else "/nowhere/x"
    back = [*lines, {"fold": "folding", "path": path}, {"ended": 1_790_000_000_000_000_000}]
    some = (lines, gone, back)
    return [b"".join(msgspec.json.encode(one) + b"\n" for one in seed) for seed in some]


def _settled(given: bytes, scratch: Path) -> object:
    root = LocalRoot(scratch / "local")
    laid(root.path / VM, {f"journal/{ID}.jsonl": given})
    roots = Roots(root, None)  # type: ignore[arg-type]
    for record in journal.pending(root.journal(VM)):
        if record.lines:
            recover.understood(record)
        unkept._lines(journal.Journal(root.journal(VM)).reopen(record.id))
    machine = Machine(VM, qmp=scratch / "qmp.sock")
    return asyncio.run(offline.settle_offline(roots, machine))


def _lines(dice: Random, seed: bytes) -> bytes:
    """A line of them spoilt as JSON, or bytes anywhere."""
    lines = seed.split(b"\n")
    at = dice.randrange(len(lines))
    if lines[at] and dice.random() < 0.8:
        lines[at] = mutation.content(dice, lines[at], json_too=True)
        return b"\n".join(lines)
    return mutation.content(dice, seed)


def _read(name: str, seeds: Callable[[], list[Tree]], tried: Callable[..., object]) -> Surface:
    return Surface(name, seeds, tried, _spoil, slow=True)


ALL = [
    _read("local-half", _local, _surveyed),
    _read("store-half", _store, _asked),
    _read("lease", _leases, _leased),
    Surface("journal", _debts, _settled, _lines, slow=True),
]
