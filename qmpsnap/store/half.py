"""The store half as files: the only place that reads and writes below the store root.

Everything here may block for as long as the store does; it runs in the worker.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from qmpsnap.errors import (
    DamagedData,
    DigestMismatch,
    HalfMissing,
    KeyMissing,
    LocalFailed,
    SnapError,
    StoreError,
    Untrusted,
    UsageError,
)
from qmpsnap.ids import is_snapshot_id, is_vm_name
from qmpsnap.store import contents, ramhalf, shared, signature, sweeping, wire
from qmpsnap.store.files import (
    Progress,
    Side,
    copy_verified,
    digest_bytes,
    expect,
    expect_size,
    make_folders,
    partial,
    publish,
    read_small,
    sync_folder,
    told,
)
from qmpsnap.store.filling import Filled
from qmpsnap.store.layout import LEASE, MANIFEST, SHARED, SIGNATURE, StoreRoot, aside
from qmpsnap.store.manifest import FileEntry, Manifest, decode
from qmpsnap.store.packcheck import Checked
from qmpsnap.store.ramindex import Index, Named
from qmpsnap.store.secret import Keys, none
from qmpsnap.store.shelf import Shelf
from qmpsnap.store.signature import Signed, Trust
from qmpsnap.store.sources import Sources

_SMALL = 16 << 20
_GONE = "the store half is not sealed, or not there"


def _unguarded() -> None:
    """Nobody else is to be kept out."""


def ship(
    root: StoreRoot,
    request: wire.Ship,
    progress: Progress,
    guard: Callable[[], None] = _unguarded,
    keys: Keys = none,
) -> wire.Shipped:
    """Copy the sealed spool to the store, its manifest last. What is there already stays.

    *guard*, here and below, raises when the VM is no longer ours: then no more is written.

    The signature comes just before the manifest: what is sealed on the store is signed. A run that
    was broken off anywhere is made good by the next one.

    Raises HalfMissing, ManifestError or DigestMismatch when the spool is not what it should be,
    what `signature.checked` does for it, and StoreError, also when another half is sealed under
    this ID.
    """
    spool = Path(request.spool)
    path = root.manifest(request.vm, request.id)
    content, manifest = _manifest(spool / MANIFEST, request, side=LocalFailed)
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
    if (signed := _signature(spool, side=LocalFailed)) is not None:
        publish(path.with_name(SIGNATURE), signed, side=StoreError)
    publish(path, content, side=StoreError)
    _deliver(
        root, request, manifest, progress, keys
    )  # what was aside before our folder could be seen
    brought = [*manifest.files, *(pack.entry for pack in manifest.packs if pack.fresh)]
    size = sum(entry.bytes for entry in brought) + len(content) + len(signed or b"")
    return wire.Shipped(manifest_blake3=digest_bytes(content), bytes=size)


def catalogue(
    root: StoreRoot, vm: str | None, progress: Progress, trust: Trust | None = None
) -> wire.Listing:
    """All snapshot folders, of *vm* or of all VMs; what is not ours is named, and left alone.

    With *trust* each manifest comes with what its signature says. Raises StoreError when the root
    itself cannot be read.
    """
    found: list[wire.Found] = []
    foreign: list[str] = []
    there = _entries(root.path)  # also for one VM: on a store that is not there, nothing is gone
    names = there if vm is None else [vm] if vm in there else []
    for name in names:
        if not (is_vm_name(name) and _is_folder(root.path / name)):
            foreign.append(name)
            continue
        for id in _entries(root.vm(name)):
            if is_snapshot_id(id) and _is_folder(root.vm(name) / id):
                found.append(_found(root, name, id, trust))
                progress(len(found), 0, f"looking at {name}")
            elif id not in {SHARED, LEASE}:
                foreign.append(f"{name}/{id}")
    return wire.Listing(found=found, foreign=foreign)


def verify(
    root: StoreRoot,
    request: wire.Verify,
    progress: Progress,
    checked: Checked | None = None,
    keys: Keys = none,
) -> list[wire.Problem]:
    """Read all of a store half, and name each file that is not as it was sealed.

    What is encrypted is decrypted, too, where the key is here. Packs that *checked* has read for
    another snapshot are not read again.
    """
    folder = root.snapshot(request.vm, request.id)
    try:
        _, manifest = _sealed(root, request)
    except (DamagedData, StoreError, Untrusted) as failed:
        return [wire.Problem(file=MANIFEST, what=str(failed))]
    problems = []
    for entry in _plain(manifest):
        try:
            path = _path(root, request, entry)
            expect(path, entry, side=StoreError, on_progress=progress)
            with suppress(KeyMissing):
                contents.check(manifest, entry, path, keys, progress=progress)
        except (DamagedData, StoreError) as failed:
            problems.append(wire.Problem(file=entry.name, what=str(failed)))
    if manifest.ram.index is not None:
        with _shelf(root, request, None) as shelf:
            index = folder / manifest.ram.index
            read = checked or Checked()
            problems += ramhalf.verify(manifest, index, shelf, progress, read, keys)
    with suppress(KeyMissing):
        try:
            contents.unsealed(manifest, keys, folder / MANIFEST)
        except DamagedData as failed:
            problems.append(wire.Problem(file=MANIFEST, what=str(failed)))
    listed = {MANIFEST, SIGNATURE, *(entry.name for entry in manifest.files)}
    extra = sorted(set(_walk(folder, folder)) - listed)
    return problems + [wire.Problem(file=name, what=wire.EXTRA) for name in extra]


def glance(
    root: StoreRoot, request: wire.Glance, progress: Progress, keys: Keys = none
) -> wire.Glanced:
    """The small files that are wanted, and whether all others are there, of the right size.

    Raises StoreError, DamagedData for the manifest, KeyMissing.
    """
    _, manifest = _sealed(root, request)
    texts, troubles = {}, {}
    with _shelf(root, request, None) as shelf:
        for name, failed in ramhalf.troubles(manifest, shelf):
            troubles[name] = wire.trouble(failed)
    for entry in _plain(manifest):
        try:
            path = _path(root, request, entry)
            if entry.name in request.texts:
                texts[entry.name] = _text(path, manifest, entry, keys)
            elif entry.name in request.whole:
                expect(path, entry, side=StoreError, on_progress=progress)
            else:
                expect_size(path, entry, side=StoreError)
        except (DamagedData, StoreError) as failed:
            troubles[entry.name] = wire.trouble(failed)
    return wire.Glanced(texts=texts, troubles=troubles)


def read(root: StoreRoot, request: wire.Read, keys: Keys = none) -> str:
    """The text of a small file, checked. Raises StoreError, DamagedData, KeyMissing."""
    content, manifest = _sealed(root, request)
    if request.name == MANIFEST:
        return content.decode()  # it was JSON
    entry = _entry(manifest, request.name)
    return _text(_path(root, request, entry), manifest, entry, keys)


def _text(path: Path, manifest: Manifest, entry: FileEntry, keys: Keys) -> str:
    if entry.bytes > _SMALL:
        raise StoreError(f"{path}: too large to be read at once ({entry.bytes} bytes)")
    content = read_small(path, side=StoreError, limit=entry.bytes + 1)
    if (len(content), digest_bytes(content)) != (entry.bytes, entry.blake3):
        raise DigestMismatch(f"{path}: the content is not what the manifest says (BLAKE3)")
    content = contents.content(manifest, entry, content, keys, path)
    try:
        return content.decode()
    except UnicodeDecodeError as failed:
        raise DamagedData(f"{path}: is no text: {failed}") from failed


def load(root: StoreRoot, request: wire.Load, progress: Progress, keys: Keys = none) -> int:
    """Write a file, decrypted and unpacked, into the descriptor; the bytes written are returned.

    The file is read once, whole, and checked before the first byte of it is passed on.

    Raises StoreError, DamagedData, KeyMissing, and LocalFailed when the descriptor takes no more.
    """
    _, manifest = _sealed(root, request)
    entry = _entry(manifest, request.name)
    path = _path(root, request, entry)
    expect(path, entry, side=StoreError, on_progress=progress)
    return contents.load(manifest, entry, path, request.fd, keys, progress=progress)


def fetch(root: StoreRoot, request: wire.Fetch, progress: Progress, keys: Keys = none) -> None:
    """Publish a checked copy of a file at a local path, decrypted, and unpacked if so asked.

    Raises StoreError, DamagedData, KeyMissing, and LocalFailed, also when the path exists with
    another content.
    """
    _, manifest = _sealed(root, request)
    entry, to = _entry(manifest, request.name), Path(request.to)
    path = _path(root, request, entry)
    if not request.unpack and manifest.key is not None:
        expect(path, entry, side=StoreError, on_progress=progress)
        contents.copy(manifest, entry, path, to, keys, progress=progress)
        return
    if not request.unpack:
        copy_verified(path, to, entry, progress, source=StoreError, target=LocalFailed)
        return
    expect(path, entry, side=StoreError, on_progress=progress)
    with partial(to, LocalFailed) as descriptor:
        contents.load(manifest, entry, path, descriptor, keys, progress=progress)


def remove(
    root: StoreRoot,
    request: wire.Remove,
    progress: Progress,
    guard: Callable[[], None] = _unguarded,
    keys: Keys = none,
) -> None:
    """Delete a store half: unsealed first, so that what is left after a crash never looks whole.

    What it shared with others goes when it was the last that needed it, if a *sweep* is asked for.
    Nothing to delete is as good. Raises StoreError.
    """
    folder = root.snapshot(request.vm, request.id)
    with told(folder, StoreError):
        if os.path.lexists(folder):
            if not (_is_folder(folder.parent) and _is_folder(folder)):
                raise StoreError(f"{folder}: not a folder of ours")
            guard()
            with suppress(FileNotFoundError):
                (folder / MANIFEST).unlink()
                sync_folder(folder)
            shutil.rmtree(folder)
            sync_folder(folder.parent)
            progress(1, 0, f"removing {request.vm} {request.id}")
    if request.sweep:
        sweep(root, request.vm, progress, request.waiting, guard, keys)


def sign(root: StoreRoot, request: wire.Sign, guard: Callable[[], None] = _unguarded) -> None:
    """Put a signature beside a manifest that has none; done twice is as good.

    Raises what `signature.checked` does for both of them, StoreError, DamagedData.
    """
    content, _ = _sealed(root, request)
    path, made = root.snapshot(request.vm, request.id) / SIGNATURE, request.signature.encode()
    if request.trust is not None:
        signature.checked(content, made, request.trust, path)
    guard()
    publish(path, made, side=StoreError)


def sweep(
    root: StoreRoot,
    vm: str,
    progress: Progress,
    waiting: Sequence[str] = (),
    guard: Callable[[], None] = _unguarded,
    keys: Keys = none,
) -> None:
    """Delete what snapshots of *vm* shared, and none needs any more. Raises StoreError."""
    with told(root.vm(vm), StoreError):
        there = _is_folder(root.shared(vm))
    if there:
        sweeping.sweep(root, vm, progress, waiting=waiting, guard=guard, keys=keys)


def fill(
    root: StoreRoot,
    request: wire.Fill,
    progress: Progress,
    sources: Sources | None = None,
    keys: Keys = none,
) -> Filled:
    """Make the page images of a snapshot, also of one that is in the spool yet.

    What *sources* has of an earlier request is not looked for again. Raises what `filling.fill`
    does.
    """
    found = sources or Sources()
    return found.fill(request, lambda: _sources(root, request, keys), progress, keys)


def _sources(root: StoreRoot, request: wire.Fill, keys: Keys) -> tuple[Index, Shelf]:
    if request.spool is None:
        _, manifest = _sealed(root, request)
        if manifest.ram.index is None:
            raise UsageError(f"{request.vm} {request.id} has no RAM in packs")
        path = _path(root, request, _entry(manifest, manifest.ram.index))
        return ramhalf.index_of(manifest, path, keys=keys), _shelf(root, request, None)
    spool = Path(request.spool)
    _, manifest = _manifest(spool / MANIFEST, request, side=LocalFailed)
    path = spool / str(manifest.ram.index)
    index = ramhalf.index_of(manifest, path, side=LocalFailed, keys=keys)
    return index, _shelf(root, request, request.shared, manifest)


def packs(
    root: StoreRoot,
    request: wire.Packs,
    progress: Progress,
    checked: Checked | None = None,
    keys: Keys = none,
) -> list[wire.Problem]:
    """What is wrong with the RAM of a half that is in the spool yet; *checked* as for `verify`.

    Raises LocalFailed.
    """
    spool = Path(request.spool)
    _, manifest = _manifest(spool / MANIFEST, request, side=LocalFailed)
    with _shelf(root, request, request.shared, manifest) as shelf:
        found = ramhalf.sizes(manifest, shelf)
        if request.whole:
            index = spool / str(manifest.ram.index)
            read = checked or Checked()
            found = ramhalf.verify(manifest, index, shelf, progress, read, keys)
    return found


def lost(root: StoreRoot, vm: str, packs: Sequence[Named], progress: Progress) -> list[str]:
    """Which of *packs* are not there, nor moved, or not of their size. Raises StoreError."""
    if not packs:
        return []
    _entries(root.path)  # on a store that is not there, nothing is lost
    return ramhalf.lost(root, vm, packs, progress)


def _shelf(
    root: StoreRoot, request: wire.Half, local: str | None, spooled: Manifest | None = None
) -> Shelf:
    """With *spooled* also what other VMs are to give when that is shipped."""
    packs = spooled.packs if spooled is not None else []
    there: list[tuple[Path, Side]] = [(Path(local), LocalFailed)] if local else []
    for vm in dict.fromkeys([request.vm, *(one.origin for one in packs if one.origin)]):
        for folder in (root.vm(vm), root.shared(vm)):
            if os.path.lexists(folder) and not _is_folder(folder):
                raise StoreError(f"{folder}: not a folder of ours")
        there.append((root.shared(vm), StoreError))
    return Shelf(there)


def _sealed(root: StoreRoot, request: wire.Sealed) -> tuple[bytes, Manifest]:
    path = root.manifest(request.vm, request.id)
    return _manifest(path, request, side=StoreError, seal=request.seal)


def _manifest(
    path: Path, request: wire.Half, *, side: Side, seal: str | None = None
) -> tuple[bytes, Manifest]:
    """The manifest, vouched for before a word of it is looked at, let alone what it names."""
    if not os.path.lexists(path):
        raise HalfMissing(f"{path}: {_GONE}")
    content = read_small(path, side=side, limit=_SMALL)
    if seal is not None and digest_bytes(content) != seal:
        raise DigestMismatch(f"{path}: is not the manifest that the local half names (BLAKE3)")
    if request.trust is not None:
        beside = path.with_name(SIGNATURE)
        signature.checked(content, _signature(path.parent, side=side), request.trust, beside)
    manifest = decode(content, Manifest, path)
    if (manifest.vm, manifest.id) != (request.vm, request.id):
        raise DamagedData(f"{path}: is the manifest of {manifest.vm} {manifest.id}")
    return content, manifest


def _signature(folder: Path, *, side: Side) -> bytes | None:
    path = folder / SIGNATURE
    return read_small(path, side=side, limit=_SMALL) if os.path.lexists(path) else None


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


def _plain(manifest: Manifest) -> list[FileEntry]:
    """All but the packs, which may have been moved."""
    packs = {pack.blake3 for pack in manifest.packs}
    return [one for one in manifest.listed if one in manifest.files or one.blake3 not in packs]


def _kept(request: wire.Ship) -> Path:
    if request.shared is None:
        raise LocalFailed(f"{request.vm} {request.id}: where its shared files are was not said")
    return Path(request.shared)


def _entry(manifest: Manifest, name: str) -> FileEntry:
    entry = manifest.entry(name)
    if entry is None:
        raise UsageError(f"the store half of {manifest.vm} {manifest.id} has no file {name!r}")
    return entry


def _path(root: StoreRoot, request: wire.Half, entry: FileEntry) -> Path:
    """Where a listed file lies; never behind a symbolic link, which could lead anywhere."""
    here, parts = root.vm(request.vm), entry.name.split("/")
    for part in parts if parts[0] == SHARED else [request.id, *parts]:
        if not _is_folder(here):
            raise HalfMissing(f"{here}: is missing, or not a folder of ours")
        here = here / part
    if not os.path.lexists(here):
        if parts[0] == SHARED and os.path.lexists(aside(here)):
            return aside(here)  # a sweep that died has left it there
        raise HalfMissing(f"{here}: is missing")
    return here


def _found(root: StoreRoot, vm: str, id: str, trust: Trust | None) -> wire.Found:
    path = root.manifest(vm, id)
    text, digest, problem = None, None, None
    signed: Signed | None = None
    try:
        if os.path.lexists(path):
            content = read_small(path, side=StoreError, limit=_SMALL)
            if trust is not None:
                beside = _signature(path.parent, side=StoreError)
                signed = signature.judged(content, beside, trust, path.with_name(SIGNATURE))
            text, digest = content.decode(), digest_bytes(content)
    except UnicodeDecodeError as failed:
        problem = f"{path}: is no text: {failed}"
    except SnapError as failed:
        problem = str(failed)
    return wire.Found(
        vm=vm, id=id, manifest=text, manifest_blake3=digest, problem=problem, signed=signed
    )


def _walk(folder: Path, top: Path) -> Iterator[str]:
    for name in _entries(folder):
        path = folder / name
        if _is_folder(path):
            yield from _walk(path, top)
        else:
            yield str(path.relative_to(top))


def _entries(folder: Path) -> list[str]:
    with told(folder, StoreError):
        return sorted(path.name for path in folder.iterdir())


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False
