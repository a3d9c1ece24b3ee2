"""Files that the snapshots of a VM share, by their digest: the only place that keeps them.

Each lies once on the store, `VM/shared/BLAKE3`, however many snapshots name it, and once on the
local root, from which it is shipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Literal

import msgspec

from qmpsnap.dialect import schema
from qmpsnap.errors import UNREADABLE, DamagedData, LocalFailed, StoreError
from qmpsnap.spelling import encode, spelled
from qmpsnap.store import box, local
from qmpsnap.store.contents import shared_role
from qmpsnap.store.files import (
    Progress,
    copy_verified,
    digest_file,
    expect_size,
    make_folders,
    read_small,
    replace,
    sync_folder,
    told,
)
from qmpsnap.store.layout import LocalRoot, StoreRoot, aside
from qmpsnap.store.manifest import FileEntry, Plain
from qmpsnap.store.secret import Secret


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the host as it was when it was read: while it is the same, it is not read again.

    *stored* is its copy, encrypted with the key called *key*; without, the copy is as the file.
    """

    device: int
    inode: int
    bytes: int
    mtime_ns: int
    ctime_ns: int
    blake3: str
    key: str | None = None
    stored: Plain | None = None

    @property
    def entry(self) -> FileEntry:
        """The copy."""
        it = self.stored or self
        return FileEntry(name=f"shared/{it.blake3}", bytes=it.bytes, blake3=it.blake3)


class Notes(msgspec.Struct, frozen=True, kw_only=True):
    """`shared.json` of a VM's local folder: the files of the newest snapshot, by their paths."""

    format: Literal["qmpsnap-shared"] = "qmpsnap-shared"
    version: Literal[1, 2] = 1
    files: dict[str, Note]


def keep(
    root: LocalRoot, vm: str, paths: Iterable[str], secret: Secret | None = None
) -> tuple[dict[str, Note], dict[str, str]]:
    """Copies of *paths* are on the local root afterwards: their notes, and why one has none.

    With a *secret* they are encrypted with it.

    What is as it was noted is not read again. Copies that no spool waits for, and that are none of
    *paths*, go. The caller holds the VM's lock. Raises LocalFailed when the root takes no notes.
    """
    known = _noted(root, vm)
    found, troubles = {}, {}
    for path in paths:
        try:
            found[path] = _kept(root, vm, path, known.get(spelled(path)), secret)
        except (LocalFailed, DamagedData) as failed:
            troubles[path] = str(failed)
    if found or known:
        version: Literal[1, 2] = 1 if secret is None else 2  # older ones would list it as it is not
        notes = {spelled(path): one for path, one in found.items()}
        content = encode(Notes(version=version, files=notes))
        make_folders(root.shared(vm), root.path, side=LocalFailed)
        replace(root.notes(vm), content, side=LocalFailed)
    _sweep_local(root, vm, {one.entry.blake3 for one in found.values()})
    return found, troubles


def forget(root: LocalRoot, vm: str) -> None:
    """No snapshot of *vm* is left: what they shared goes too. Raises LocalFailed."""
    with told(root.vm(vm), LocalFailed):
        root.notes(vm).unlink(missing_ok=True)
        for path in _inside(root.shared(vm)):
            path.unlink()
        with suppress(FileNotFoundError):
            root.shared(vm).rmdir()


def deliver(
    root: StoreRoot,
    vm: str,
    entry: FileEntry,
    folder: Path,
    progress: Progress | None = None,
    *,
    anew: bool = False,
) -> None:
    """*entry* is on the store, copied from *folder* if it is not there; what is there is not read.

    With *anew* it takes the place of what is there, which is known to be damaged.

    One that is cut short, or cannot be opened, stays until a whole copy takes its place: it may be
    all that older snapshots have. Two hosts may deliver the same file at once.

    The snapshot that needs it has a folder on the store by now: that keeps a sweep from it.
    Raises StoreError, and LocalFailed and DigestMismatch for the copy in *folder*.
    """
    if not anew and arrived(root, vm, entry):
        return
    path = root.shared(vm) / entry.blake3
    make_folders(path.parent, root.path, side=StoreError)
    fresh = path.with_name(f"{path.name}.{token_hex(8)}")  # another host's is never ours
    with told(path, StoreError):
        try:
            copy_verified(folder / entry.blake3, fresh, entry, progress)
            fresh.replace(path)
        except BaseException:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def arrived(root: StoreRoot, vm: str, entry: FileEntry) -> bool:
    """Whether *entry* is on the store, of its size; one that a sweep put aside is taken back.

    Raises StoreError when that cannot be done.
    """
    path = root.shared(vm) / entry.blake3
    with suppress(StoreError, DamagedData):
        expect_size(path, entry, side=StoreError)
        return True
    with suppress(StoreError, DamagedData):
        expect_size(aside(path), entry, side=StoreError)
        with told(path, StoreError):
            aside(path).replace(path)
            sync_folder(path.parent)
        return True
    return False


def schemas() -> dict[str, dict[str, object]]:
    """The JSON Schema of `shared.json`, by the word that its file is named for."""
    return {"qmpsnap-shared": schema(Notes)}


def _kept(root: LocalRoot, vm: str, path: str, known: Note | None, secret: Secret | None) -> Note:
    seen = _seen(path)
    if known is not None and known.key == (secret.key if secret is not None else None):
        same = msgspec.structs.replace(
            seen, blake3=known.blake3, key=known.key, stored=known.stored
        )
        with suppress(LocalFailed, DamagedData):
            expect_size(root.shared(vm) / known.entry.blake3, known.entry, side=LocalFailed)
            if same == known:
                return known
    real = Path(os.path.realpath(path))  # /vmlinuz is a link on many a host
    size, digest = digest_file(real, side=LocalFailed)
    noted = msgspec.structs.replace(seen, blake3=digest)
    make_folders(root.shared(vm), root.path, side=LocalFailed)
    if secret is not None:
        noted = _encrypted(root.shared(vm), real, vm, noted, secret)
        if size != seen.bytes or _seen(path) != seen:
            raise LocalFailed(f"{path}: was changed while it was read")
        return noted
    copy = root.shared(vm) / digest
    with suppress(LocalFailed, DamagedData):
        expect_size(copy, noted.entry, side=LocalFailed)
        return noted
    with told(copy, LocalFailed):
        copy.unlink(missing_ok=True)
    copy_verified(real, copy, noted.entry, source=LocalFailed, target=LocalFailed)
    if size != seen.bytes or _seen(path) != seen:
        raise LocalFailed(f"{path}: was changed while it was read")
    return noted


def _seen(path: str) -> Note:
    with told(Path(path), LocalFailed):
        it = Path(path).stat()
    return Note(
        device=it.st_dev,
        inode=it.st_ino,
        bytes=it.st_size,
        mtime_ns=it.st_mtime_ns,
        ctime_ns=it.st_ctime_ns,
        blake3="",
    )


def _encrypted(folder: Path, real: Path, vm: str, note: Note, secret: Secret) -> Note:
    """*note* with the copy of *real* in *folder*, encrypted. Raises LocalFailed."""
    fresh = folder / token_hex(8)
    try:
        size, digest = box.seal(real, fresh, secret, shared_role(vm), side=LocalFailed)
        with told(fresh, LocalFailed):
            fresh.replace(folder / digest)
            sync_folder(folder)
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
    stored = Plain(bytes=size, blake3=digest)
    return msgspec.structs.replace(note, key=secret.key, stored=stored)


def _noted(root: LocalRoot, vm: str) -> dict[str, Note]:
    try:
        content = read_small(root.notes(vm), side=LocalFailed)
        return msgspec.json.decode(content, type=Notes).files
    except (LocalFailed, *UNREADABLE):
        return {}  # it only saves work


def awaited(root: LocalRoot, vm: str) -> set[str] | None:
    """What the spools of this host need, by digest; None when that cannot be told.

    Of it a removal on the store takes nothing. Raises LocalFailed.
    """
    needed: set[str] = set()
    for facts in local.survey(root, vm):
        if facts.problem is not None:
            return None
        if facts.spool and facts.spooled is None and facts.storage is not None:
            return None
        if facts.spooled is not None:
            needed |= facts.spooled.needed
    return needed


def sweep_local(root: LocalRoot, vm: str) -> None:
    """Copies that were shipped go, but for those of the newest snapshot's files of the host.

    The caller holds the VM's lock, and has no packs there whose spool is not sealed yet. Raises
    LocalFailed.
    """
    _sweep_local(root, vm, {one.entry.blake3 for one in _noted(root, vm).values()})


def _sweep_local(root: LocalRoot, vm: str, needed: set[str]) -> None:
    waiting = awaited(root, vm)
    if waiting is None:
        return  # a damaged spool may need any of them
    with told(root.shared(vm), LocalFailed):
        for path in _inside(root.shared(vm)):
            if path.name not in needed | waiting:
                path.unlink()


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
