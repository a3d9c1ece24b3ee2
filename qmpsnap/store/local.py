"""The local half: the only place that seals it, and that tells what there is of it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qmpsnap.errors import DamagedData, HalfMissing, LocalFailed, ManifestError, SnapError
from qmpsnap.ids import SnapshotId, is_snapshot_id
from qmpsnap.store import signature
from qmpsnap.store.files import (
    digest_bytes,
    make_folders,
    publish,
    read_small,
    replace,
    told,
)
from qmpsnap.store.layout import KEPT, MANIFEST, PROTECTED, SIGNATURE, STORAGE, Id, LocalRoot
from qmpsnap.store.manifest import Manifest, Paired, Storage, decode, encode
from qmpsnap.store.signature import Signed, Trust


class LocalFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a host has of one snapshot; *storage* None: not sealed; *problem*: what is damaged.

    *spool* tells that a spool folder is there, *spooled* is its manifest once it is sealed;
    *signed*: what its signature says, where that was asked for.
    """

    vm: str
    id: str
    storage: Storage | None = None
    storage_blake3: str | None = None
    paired: Paired | None = None
    spool: bool = False
    spooled: Manifest | None = None
    spooled_blake3: str | None = None
    signed: Signed | None = None
    protected: bool = False
    problem: str | None = None


def seal(root: LocalRoot, vm: str, storage: Storage) -> str:
    """Write `storage.json`, the last file of a local half; its BLAKE3 is returned.

    To seal once more with the same words does nothing. Raises LocalFailed, also when the half is
    sealed with other words, and ManifestError when *storage* is not the snapshot of *vm*.
    """
    if storage.vm != vm:
        raise ManifestError(f"a snapshot of {storage.vm} is no local half of {vm}")
    path, content = root.point(vm, storage.point) / STORAGE, encode(storage)
    make_folders(path.parent, _existing(root), side=LocalFailed)
    publish(path, content, side=LocalFailed)
    return digest_bytes(content)


def read_storage(root: LocalRoot, vm: str, id: Id) -> Storage:
    """What the local half says. Raises HalfMissing, ManifestError, LocalFailed."""
    return _storage(root, vm, id)[0]


def storage_digest(root: LocalRoot, vm: str, id: Id) -> str:
    """The BLAKE3 of `storage.json`, which the store half names. Raises as `read_storage`."""
    return _storage(root, vm, id)[1]


def mark_paired(root: LocalRoot, vm: str, paired: Paired) -> None:
    """Note that the store half is sealed. Only the first note of one store half is kept.

    Raises LocalFailed, ManifestError for a note that cannot be read, and DamagedData when another
    store half was noted already.
    """
    noted = read_paired(root, vm, paired.id)
    if noted is None:
        publish(root.paired(vm, paired.id), encode(paired), side=LocalFailed)
    elif noted.manifest_blake3 != paired.manifest_blake3:
        raise DamagedData(f"{root.paired(vm, paired.id)}: names another store half")


def read_paired(root: LocalRoot, vm: str, id: Id) -> Paired | None:
    """The note on the store half, if there is one. Raises ManifestError, LocalFailed."""
    path = root.paired(vm, id)
    content = _read(path)
    if content is None:
        return None
    paired = decode(content, Paired, path)
    if paired.id != str(id):
        raise ManifestError(f"{path}: is the note of {paired.id}")
    return paired


def give_id(root: LocalRoot, vm: str, id: SnapshotId) -> None:
    """Remember that *id* was given, whatever becomes of the snapshot. Raises LocalFailed."""
    path = root.last(vm)
    make_folders(path.parent, _existing(root), side=LocalFailed)
    replace(path, f"{id}\n".encode(), side=LocalFailed)


def last_id(root: LocalRoot, vm: str) -> list[SnapshotId]:
    """What `give_id` remembers, if anything. Raises LocalFailed."""
    content = _read(root.last(vm)) or b""
    text = content.decode(errors="replace").strip()
    return [SnapshotId(text)] if is_snapshot_id(text) else []


def survey(
    root: LocalRoot, vm: str | None = None, *, trust: Trust | None = None
) -> list[LocalFacts]:
    """The local halves of *vm*, or of all VMs, oldest first; a damaged one says what is wrong.

    With *trust* it is also judged who has signed what is in spools.

    Raises LocalFailed only when the folders themselves cannot be read.
    """
    with told(root.path, LocalFailed):
        names = root.vms() if vm is None else [vm]
        found = [(name, id) for name in names for id in root.ids(name) if _listed(root, name, id)]
    return [_facts(root, name, str(id), trust) for name, id in found]


def read_spooled(
    root: LocalRoot, vm: str, id: Id, trust: Trust | None
) -> tuple[Manifest, str, Signed | None]:
    """The manifest of a half that is in the spool, its BLAKE3, and who vouches for it.

    Raises as `signature.checked`, before any of it is looked at; ManifestError, LocalFailed.
    """
    path = root.spool(vm, id) / MANIFEST
    beside = path.with_name(SIGNATURE)
    content = read_small(path, side=LocalFailed)
    signed = signature.checked(content, _read(beside), trust, beside) if trust else None
    return decode(content, Manifest, path), digest_bytes(content), signed


def _listed(root: LocalRoot, vm: str, id: SnapshotId) -> bool:
    """Not one that was deleted, and whose images are kept for others."""
    return root.storage(vm, id).exists() or not (root.snapshot(vm, id) / KEPT).exists()


def _facts(root: LocalRoot, vm: str, id: str, trust: Trust | None) -> LocalFacts:
    facts = LocalFacts(
        vm=vm,
        id=id,
        spool=root.spool(vm, id).is_dir(),
        protected=(root.snapshot(vm, id) / PROTECTED).exists(),
    )
    try:
        if _read(root.storage(vm, id)) is not None:
            storage, digest = _storage(root, vm, id)
            facts = msgspec.structs.replace(facts, storage=storage, storage_blake3=digest)
        facts = msgspec.structs.replace(facts, paired=read_paired(root, vm, id))
        path = root.spool(vm, id) / MANIFEST
        content = _read(path)
        if content is not None:
            if trust is not None:
                beside = path.with_name(SIGNATURE)
                signed = signature.judged(content, _read(beside), trust, beside)
                facts = msgspec.structs.replace(facts, signed=signed)
            spooled = decode(content, Manifest, path)
            facts = msgspec.structs.replace(
                facts, spooled=spooled, spooled_blake3=digest_bytes(content)
            )
    except SnapError as wrong:
        return msgspec.structs.replace(facts, problem=str(wrong))
    return facts


def _storage(root: LocalRoot, vm: str, id: Id) -> tuple[Storage, str]:
    path = root.storage(vm, id)
    content = _read(path)
    if content is None:
        raise HalfMissing(f"{path}: there is no sealed local half")
    storage = decode(content, Storage, path)
    if (storage.vm, storage.id) != (vm, str(id)):
        raise ManifestError(f"{path}: is the local half of {storage.vm} {storage.id}")
    return storage, digest_bytes(content)


def _read(path: Path) -> bytes | None:
    with told(path, LocalFailed):
        there = path.is_symlink() or path.exists()
    return read_small(path, side=LocalFailed) if there else None


def _existing(root: LocalRoot) -> Path:
    with told(root.path, LocalFailed):
        root.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return root.path
