"""The store half as it lies on the store: listed, looked at, checked, read.

Everything here may block for as long as the store does; it runs in the worker.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qmpsnap.errors import (
    DamagedData,
    DigestMismatch,
    KeyMissing,
    LocalFailed,
    SnapError,
    StoreError,
    Untrusted,
    UsageError,
)
from qmpsnap.ids import is_snapshot_id, is_vm_name
from qmpsnap.store import contents, ramhalf, signature, wire
from qmpsnap.store.files import (
    Progress,
    copy_verified,
    digest_bytes,
    expect,
    expect_size,
    partial,
    read_small,
)
from qmpsnap.store.filling import Filled
from qmpsnap.store.halffiles import (
    SMALL,
    entries,
    entry_of,
    is_folder,
    manifest_at,
    path_of,
    plain,
    sealed,
    shelf_of,
    signature_in,
    walk,
)
from qmpsnap.store.layout import LEASE, MANIFEST, SHARED, SIGNATURE, StoreRoot
from qmpsnap.store.manifest import FileEntry, Manifest
from qmpsnap.store.packcheck import Checked
from qmpsnap.store.ramindex import Index, Named
from qmpsnap.store.secret import Keys, none
from qmpsnap.store.shelf import Shelf
from qmpsnap.store.signature import Signed, Trust
from qmpsnap.store.sources import Sources


def catalogue(
    root: StoreRoot, vm: str | None, progress: Progress, trust: Trust | None = None
) -> wire.Listing:
    """All snapshot folders, of *vm* or of all VMs; what is not ours is named, and left alone.

    With *trust* each manifest comes with what its signature says. Raises StoreError when the root
    itself cannot be read.
    """
    found: list[wire.Found] = []
    foreign: list[str] = []
    there = entries(root.path)  # also for one VM: on a store that is not there, nothing is gone
    names = there if vm is None else [vm] if vm in there else []
    for name in names:
        if not (is_vm_name(name) and is_folder(root.path / name)):
            foreign.append(name)
            continue
        for id in entries(root.vm(name)):
            if is_snapshot_id(id) and is_folder(root.vm(name) / id):
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
        _, manifest = sealed(root, request)
    except (DamagedData, StoreError, Untrusted) as failed:
        return [wire.Problem(file=MANIFEST, what=str(failed))]
    problems = []
    for entry in plain(manifest):
        try:
            path = path_of(root, request, entry)
            expect(path, entry, side=StoreError, on_progress=progress)
            with suppress(KeyMissing):
                contents.check(manifest, entry, path, keys, progress=progress)
        except (DamagedData, StoreError) as failed:
            problems.append(wire.Problem(file=entry.name, what=str(failed)))
    if manifest.ram.index is not None:
        with shelf_of(root, request, None) as shelf:
            index = folder / manifest.ram.index
            read = checked or Checked()
            problems += ramhalf.verify(manifest, index, shelf, progress, read, keys)
    with suppress(KeyMissing):
        try:
            contents.unsealed(manifest, keys, folder / MANIFEST)
        except DamagedData as failed:
            problems.append(wire.Problem(file=MANIFEST, what=str(failed)))
    listed = {MANIFEST, SIGNATURE, *(entry.name for entry in manifest.files)}
    extra = sorted(set(walk(folder, folder)) - listed)
    return problems + [wire.Problem(file=name, what=wire.EXTRA) for name in extra]


def glance(
    root: StoreRoot, request: wire.Glance, progress: Progress, keys: Keys = none
) -> wire.Glanced:
    """The small files that are wanted, and whether all others are there, of the right size.

    Raises StoreError, DamagedData for the manifest, KeyMissing.
    """
    _, manifest = sealed(root, request)
    texts, troubles = {}, {}
    with shelf_of(root, request, None) as shelf:
        for name, failed in ramhalf.troubles(manifest, shelf):
            troubles[name] = wire.trouble(failed)
    for entry in plain(manifest):
        try:
            path = path_of(root, request, entry)
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
    content, manifest = sealed(root, request)
    if request.name == MANIFEST:
        return content.decode()  # it was JSON
    entry = entry_of(manifest, request.name)
    return _text(path_of(root, request, entry), manifest, entry, keys)


def _text(path: Path, manifest: Manifest, entry: FileEntry, keys: Keys) -> str:
    if entry.bytes > SMALL:
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
    _, manifest = sealed(root, request)
    entry = entry_of(manifest, request.name)
    path = path_of(root, request, entry)
    expect(path, entry, side=StoreError, on_progress=progress)
    return contents.load(manifest, entry, path, request.fd, keys, progress=progress)


def fetch(root: StoreRoot, request: wire.Fetch, progress: Progress, keys: Keys = none) -> None:
    """Publish a checked copy of a file at a local path, decrypted, and unpacked if so asked.

    Raises StoreError, DamagedData, KeyMissing, and LocalFailed, also when the path exists with
    another content.
    """
    _, manifest = sealed(root, request)
    entry, to = entry_of(manifest, request.name), Path(request.to)
    path = path_of(root, request, entry)
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
        _, manifest = sealed(root, request)
        if manifest.ram.index is None:
            raise UsageError(f"{request.vm} {request.id} has no RAM in packs")
        path = path_of(root, request, entry_of(manifest, manifest.ram.index))
        return ramhalf.index_of(manifest, path, keys=keys), shelf_of(root, request, None)
    spool = Path(request.spool)
    _, manifest = manifest_at(spool / MANIFEST, request, side=LocalFailed)
    path = spool / str(manifest.ram.index)
    index = ramhalf.index_of(manifest, path, side=LocalFailed, keys=keys)
    return index, shelf_of(root, request, request.shared, manifest)


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
    _, manifest = manifest_at(spool / MANIFEST, request, side=LocalFailed)
    with shelf_of(root, request, request.shared, manifest) as shelf:
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
    entries(root.path)  # on a store that is not there, nothing is lost
    return ramhalf.lost(root, vm, packs, progress)


def _found(root: StoreRoot, vm: str, id: str, trust: Trust | None) -> wire.Found:
    path = root.manifest(vm, id)
    text, digest, problem = None, None, None
    signed: Signed | None = None
    try:
        if os.path.lexists(path):
            content = read_small(path, side=StoreError, limit=SMALL)
            if trust is not None:
                beside = signature_in(path.parent, side=StoreError)
                signed = signature.judged(content, beside, trust, path.with_name(SIGNATURE))
            text, digest = content.decode(), digest_bytes(content)
    except UnicodeDecodeError as failed:
        problem = f"{path}: is no text: {failed}"
    except SnapError as failed:
        problem = str(failed)
    return wire.Found(
        vm=vm, id=id, manifest=text, manifest_blake3=digest, problem=problem, signed=signed
    )
