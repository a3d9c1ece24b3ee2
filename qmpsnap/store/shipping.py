"""A store half that is being written: from the spool to the store, its manifest last."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from qmpsnap.errors import HalfMissing, LocalFailed, StoreError
from qmpsnap.store import halffiles, ramhalf, shared, signature, wire
from qmpsnap.store.files import (
    Progress,
    copy_verified,
    digest_bytes,
    make_folders,
    publish,
    read_small,
)
from qmpsnap.store.layout import MANIFEST, SIGNATURE, StoreRoot
from qmpsnap.store.manifest import Manifest
from qmpsnap.store.secret import Keys, none


def unguarded() -> None:
    """Nobody else is to be kept out."""


def ship(
    root: StoreRoot,
    request: wire.Ship,
    progress: Progress,
    guard: Callable[[], None] = unguarded,
    keys: Keys = none,
) -> wire.Shipped:
    """Copy the sealed spool to the store, its manifest last. What is there already stays.

    *guard* raises when the VM is no longer ours: then no more is written.

    The signature comes just before the manifest: what is sealed on the store is signed. A run that
    was broken off anywhere is made good by the next one.

    Raises HalfMissing, ManifestError or DigestMismatch when the spool is not what it should be,
    what `signature.checked` does for it, and StoreError, also when another half is sealed under
    this ID.
    """
    spool = Path(request.spool)
    path = root.manifest(request.vm, request.id)
    content, manifest = halffiles.manifest_at(spool / MANIFEST, request, side=LocalFailed)
    if os.path.lexists(path) and read_small(path, side=StoreError) != content:
        raise StoreError(f"{path}: another store half is sealed there")
    make_folders(path.parent, root.path, side=StoreError)
    _deliver(root, request, manifest, progress, keys, request.anew)
    for entry in manifest.files:
        src, dst = spool / entry.name, path.parent / entry.name
        if not os.path.lexists(src):
            raise HalfMissing(f"{src}: is missing")
        make_folders(dst.parent, root.path, side=StoreError)
        copy_verified(src, dst, entry, progress)
    guard()
    if (signed := halffiles.signature_in(spool, side=LocalFailed)) is not None:
        publish(path.with_name(SIGNATURE), signed, side=StoreError)
    publish(path, content, side=StoreError)
    _deliver(
        root, request, manifest, progress, keys
    )  # what was aside before our folder could be seen
    brought = [*manifest.files, *(pack.entry for pack in manifest.packs if pack.fresh)]
    size = sum(entry.bytes for entry in brought) + len(content) + len(signed or b"")
    return wire.Shipped(manifest_blake3=digest_bytes(content), bytes=size)


def sign(root: StoreRoot, request: wire.Sign, guard: Callable[[], None] = unguarded) -> None:
    """Put a signature beside a manifest that has none; done twice is as good.

    Raises what `signature.checked` does for both of them, StoreError, DamagedData.
    """
    content, _ = halffiles.sealed(root, request)
    path, made = root.snapshot(request.vm, request.id) / SIGNATURE, request.signature.encode()
    if request.trust is not None:
        signature.checked(content, made, request.trust, path)
    guard()
    publish(path, made, side=StoreError)


def _deliver(
    root: StoreRoot,
    request: wire.Ship,
    manifest: Manifest,
    progress: Progress,
    keys: Keys,
    anew: Sequence[str] = (),
) -> None:
    for entry in {one.blake3: one.entry for one in manifest.shared}.values():
        shared.deliver(root, request.vm, entry, _kept(request), progress)
    if manifest.packs:
        spool, folder = Path(request.spool), _kept(request)
        ramhalf.deliver(root, manifest, spool, folder, progress, request.instead, anew, keys)


def _kept(request: wire.Ship) -> Path:
    if request.shared is None:
        raise LocalFailed(f"{request.vm} {request.id}: where its shared files are was not said")
    return Path(request.shared)
