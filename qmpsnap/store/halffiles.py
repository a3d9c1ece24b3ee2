"""The files of a store half: its manifest, vouched for, and where lies what it lists.

Everything here may block for as long as the store does; it runs in the worker.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from qmpsnap.errors import (
    DamagedData,
    DigestMismatch,
    HalfMissing,
    LocalFailed,
    StoreError,
    UsageError,
)
from qmpsnap.store import signature, wire
from qmpsnap.store.files import Side, digest_bytes, read_small, told
from qmpsnap.store.layout import SHARED, SIGNATURE, StoreRoot, aside
from qmpsnap.store.manifest import FileEntry, Manifest, decode
from qmpsnap.store.shelf import Shelf

SMALL = 16 << 20
"""Bytes that a file may have which is read at once."""
_GONE = "the store half is not sealed, or not there"


def sealed(root: StoreRoot, request: wire.Sealed) -> tuple[bytes, Manifest]:
    """The manifest of a half on the store, as it lies there and decoded; as `manifest_at`."""
    path = root.manifest(request.vm, request.id)
    return manifest_at(path, request, side=StoreError, seal=request.seal)


def manifest_at(
    path: Path, request: wire.Half, *, side: Side, seal: str | None = None
) -> tuple[bytes, Manifest]:
    """The manifest, vouched for before a word of it is looked at, let alone what it names."""
    if not os.path.lexists(path):
        raise HalfMissing(f"{path}: {_GONE}")
    content = read_small(path, side=side, limit=SMALL)
    if seal is not None and digest_bytes(content) != seal:
        raise DigestMismatch(f"{path}: is not the manifest that the local half names (BLAKE3)")
    if request.trust is not None:
        beside = path.with_name(SIGNATURE)
        signature.checked(content, signature_in(path.parent, side=side), request.trust, beside)
    manifest = decode(content, Manifest, path)
    if (manifest.vm, manifest.id) != (request.vm, request.id):
        raise DamagedData(f"{path}: is the manifest of {manifest.vm} {manifest.id}")
    return content, manifest


def signature_in(folder: Path, *, side: Side) -> bytes | None:
    """The signature of what is in *folder*, if there is one. Raises *side*."""
    path = folder / SIGNATURE
    return read_small(path, side=side, limit=SMALL) if os.path.lexists(path) else None


def entry_of(manifest: Manifest, name: str) -> FileEntry:
    """What is listed as *name*. Raises UsageError."""
    entry = manifest.entry(name)
    if entry is None:
        raise UsageError(f"the store half of {manifest.vm} {manifest.id} has no file {name!r}")
    return entry


def path_of(root: StoreRoot, request: wire.Half, entry: FileEntry) -> Path:
    """Where a listed file lies; never behind a symbolic link, which could lead anywhere."""
    here, parts = root.vm(request.vm), entry.name.split("/")
    for part in parts if parts[0] == SHARED else [request.id, *parts]:
        if not is_folder(here):
            raise HalfMissing(f"{here}: is missing, or not a folder of ours")
        here = here / part
    if not os.path.lexists(here):
        if parts[0] == SHARED and os.path.lexists(aside(here)):
            return aside(here)  # a sweep that died has left it there
        raise HalfMissing(f"{here}: is missing")
    return here


def plain(manifest: Manifest) -> list[FileEntry]:
    """All but the packs, which may have been moved."""
    packs = {pack.blake3 for pack in manifest.packs}
    return [one for one in manifest.listed if one in manifest.files or one.blake3 not in packs]


def shelf_of(
    root: StoreRoot, request: wire.Half, local: str | None, spooled: Manifest | None = None
) -> Shelf:
    """With *spooled* also what other VMs are to give when that is shipped."""
    packs = spooled.packs if spooled is not None else []
    there: list[tuple[Path, Side]] = [(Path(local), LocalFailed)] if local else []
    for vm in dict.fromkeys([request.vm, *(one.origin for one in packs if one.origin)]):
        for folder in (root.vm(vm), root.shared(vm)):
            if os.path.lexists(folder) and not is_folder(folder):
                raise StoreError(f"{folder}: not a folder of ours")
        there.append((root.shared(vm), StoreError))
    return Shelf(there)


def walk(folder: Path, top: Path) -> Iterator[str]:
    """All files below *folder*, as paths from *top*. Raises StoreError."""
    for name in entries(folder):
        path = folder / name
        if is_folder(path):
            yield from walk(path, top)
        else:
            yield str(path.relative_to(top))


def entries(folder: Path) -> list[str]:
    """The names in *folder*, sorted. Raises StoreError."""
    with told(folder, StoreError):
        return sorted(path.name for path in folder.iterdir())


def is_folder(path: Path) -> bool:
    """Whether it is one itself, and no link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False
