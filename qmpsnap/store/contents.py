"""What the files of a store half say, encrypted or not: the only place that tells them apart.

Sizes and digests of a manifest are those of the files as they lie; they were compared before.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from io import BytesIO, FileIO
from pathlib import Path

import msgspec
from msgspec import Struct

from qmpsnap.errors import LocalFailed, ManifestError, StoreError
from qmpsnap.store import box
from qmpsnap.store.box import Role, Source
from qmpsnap.store.files import Progress, Side, copy_to_fd, opened, partial, told, write_all
from qmpsnap.store.head import readable
from qmpsnap.store.layout import MANIFEST
from qmpsnap.store.manifest import (
    ENCRYPTED,
    Binding,
    Encryption,
    FileEntry,
    Manifest,
    Plain,
    Shared,
)
from qmpsnap.store.pack import unpack_to_fd
from qmpsnap.store.secret import Keys, Secret


class Boot(Struct, frozen=True, kw_only=True):
    """What is not told in the clear of a shared file."""

    path: str
    plain: Plain


class Private(Struct, frozen=True, kw_only=True):
    """What a manifest whose files are encrypted does not say in the clear; *boot* as `shared`."""

    identity: Binding
    boot: list[Boot]


def role(manifest: Manifest, entry: FileEntry) -> Role:
    """What a file of *manifest* has to be for, if it is encrypted."""
    if entry in manifest.files:
        return Role(manifest.vm, manifest.id, entry.name)
    return shared_role(manifest.vm)


def shared_role(vm: str) -> Role:
    """Of files that the snapshots of *vm* share."""
    return Role(vm, "", "shared")


def sealed(manifest: Manifest, secret: Secret) -> Manifest:
    """*manifest*, whose files are encrypted, with nothing in the clear that they keep secret."""
    boot = [Boot(path=one.path, plain=one.plain) for one in manifest.shared if one.plain]
    told = msgspec.json.encode(Private(identity=manifest.identity, boot=boot))
    content = box.sealed_bytes(told, secret, Role(manifest.vm, manifest.id, MANIFEST))
    replace = msgspec.structs.replace
    return replace(
        manifest,
        version=ENCRYPTED,
        identity=Binding(uuid=None, disks=[]),
        ram=replace(manifest.ram, raw_blake3=None),
        shared=[replace(one, path="", plain=None) for one in manifest.shared],
        encryption=Encryption(key=secret.key, sealed=base64.b64encode(content).decode()),
    )


def unsealed(manifest: Manifest, keys: Keys, path: Path | str = MANIFEST) -> Manifest:
    """*manifest* with what it has sealed in its place. Raises KeyMissing, DamagedData."""
    if manifest.encryption is None:
        return manifest
    try:
        content = base64.b64decode(manifest.encryption.sealed, validate=True)
    except (binascii.Error, ValueError) as odd:
        raise ManifestError(f"{path}: what it has sealed is not base64") from odd
    place = Role(manifest.vm, manifest.id, MANIFEST)
    inside = box.Reader(BytesIO(content), keys, Path(path), role=place, key=manifest.key).read()
    with readable(inside, path):
        told = msgspec.json.decode(inside, type=Private)
    if len(told.boot) != len(manifest.shared):
        raise ManifestError(f"{path}: has sealed {len(told.boot)} shared files")
    replace = msgspec.structs.replace
    shared: list[Shared] = [
        replace(one, path=other.path, plain=other.plain)
        for one, other in zip(manifest.shared, told.boot, strict=True)
    ]
    return replace(manifest, identity=told.identity, shared=shared)


def content(manifest: Manifest, entry: FileEntry, stored: bytes, keys: Keys, path: Path) -> bytes:
    """What the file *path*, which has *stored*, says. Raises KeyMissing, DamagedData."""
    if manifest.key is None:
        return stored
    return _decrypted(manifest, entry, keys, path)(BytesIO(stored)).read()


def load(
    manifest: Manifest,
    entry: FileEntry,
    path: Path,
    fd: int,
    keys: Keys,
    *,
    side: Side = StoreError,
    progress: Progress | None = None,
) -> int:
    """Write what the file *path* says, unpacked, into *fd*; the bytes written are returned.

    Raises DamagedData, *side*, KeyMissing, and LocalFailed when *fd* takes no more.
    """
    ram = manifest.ram if manifest.ram.file == entry.name else None
    packed = ram.compression == "zstd" if ram else entry.name.endswith(".zst")
    if packed:
        decrypted = _decrypted(manifest, entry, keys, path)
        return unpack_to_fd(
            path,
            fd,
            raw_bytes=ram.raw_bytes if ram else None,
            raw_blake3=ram.raw_blake3 if ram else None,
            side=side,
            decrypted=decrypted if manifest.key is not None else lambda file: file,
            on_progress=progress,
        )
    if manifest.key is None:
        return copy_to_fd(path, fd, entry, side=side, on_progress=progress)
    return _copied(manifest, entry, path, fd, keys, side, progress)


def copy(
    manifest: Manifest,
    entry: FileEntry,
    path: Path,
    to: Path,
    keys: Keys,
    *,
    side: Side = StoreError,
    progress: Progress | None = None,
) -> None:
    """Publish what the encrypted file *path* says at the local path *to*.

    Raises DamagedData, *side*, KeyMissing, and LocalFailed, also when *to* exists.
    """
    with partial(to, LocalFailed) as descriptor:
        _copied(manifest, entry, path, descriptor, keys, side, progress)


def check(
    manifest: Manifest,
    entry: FileEntry,
    path: Path,
    keys: Keys,
    *,
    side: Side = StoreError,
    progress: Progress | None = None,
) -> None:
    """Every byte of the file *path* is what was encrypted, for its place, if it was.

    Raises KeyMissing, NotAuthentic, ManifestError, *side*.
    """
    if manifest.key is not None:
        _copied(manifest, entry, path, None, keys, side, progress)


def _copied(
    manifest: Manifest,
    entry: FileEntry,
    path: Path,
    fd: int | None,
    keys: Keys,
    side: Side,
    progress: Progress | None,
) -> int:
    done = 0
    with (
        opened(path, side) as reading,
        FileIO(reading, "rb", closefd=False) as file,
    ):
        source = _decrypted(manifest, entry, keys, path)(file)
        while piece := source.read(box.FRAME):
            if fd is not None:
                with told(Path(f"/proc/self/fd/{fd}"), LocalFailed):
                    write_all(fd, piece)
            done += len(piece)
            if progress is not None:
                progress(done, entry.bytes, f"reading {entry.name}")
    return done


def _decrypted(
    manifest: Manifest, entry: FileEntry, keys: Keys, path: Path
) -> Callable[[Source], box.Reader]:
    place, key = role(manifest, entry), manifest.key
    return lambda source: box.Reader(source, keys, path, role=place, key=key)
