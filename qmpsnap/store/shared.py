"""Files that the snapshots of a VM share, by their digest: the only place that keeps and ends them.

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

from qmpsnap.errors import DamagedData, LocalFailed, SnapError, StoreError
from qmpsnap.ids import is_snapshot_id
from qmpsnap.spelling import encode, spelled
from qmpsnap.store import local
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
from qmpsnap.store.layout import MANIFEST, LocalRoot, StoreRoot
from qmpsnap.store.manifest import FileEntry, Manifest, decode

_GOING = ".going"


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the host as it was when it was read: while it is the same, it is not read again."""

    device: int
    inode: int
    bytes: int
    mtime_ns: int
    ctime_ns: int
    blake3: str


class Notes(msgspec.Struct, frozen=True, kw_only=True):
    """`shared.json` of a VM's local folder: the files of the newest snapshot, by their paths."""

    format: Literal["qmpsnap-shared"] = "qmpsnap-shared"
    version: Literal[1] = 1
    files: dict[str, Note]


def keep(root: LocalRoot, vm: str, paths: Iterable[str]) -> tuple[dict[str, Note], dict[str, str]]:
    """Copies of *paths* are on the local root afterwards: their notes, and why one has none.

    What is as it was noted is not read again. Copies that no spool waits for, and that are none of
    *paths*, go. The caller holds the VM's lock. Raises LocalFailed when the root takes no notes.
    """
    known = _noted(root, vm)
    found, troubles = {}, {}
    for path in paths:
        try:
            found[path] = _kept(root, vm, path, known.get(spelled(path)))
        except (LocalFailed, DamagedData) as failed:
            troubles[path] = str(failed)
    if found or known:
        content = encode(Notes(files={spelled(path): one for path, one in found.items()}))
        make_folders(root.shared(vm), root.path, side=LocalFailed)
        replace(root.notes(vm), content, side=LocalFailed)
        _sweep_local(root, vm, {one.blake3 for one in found.values()})
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
    root: StoreRoot, vm: str, entry: FileEntry, folder: Path, progress: Progress | None = None
) -> None:
    """*entry* is on the store, copied from *folder* if it is not there; what is there is not read.

    One that is cut short, or cannot be opened, stays until a whole copy takes its place: it may be
    all that older snapshots have. One that `sweep` put aside is taken back. Two hosts may deliver
    the same file at once.

    The snapshot that needs it has a folder on the store by now: that keeps `sweep` from it.
    Raises StoreError, and LocalFailed and DigestMismatch for the copy in *folder*.
    """
    path = root.shared(vm) / entry.blake3
    with suppress(StoreError, DamagedData):
        expect_size(path, entry, side=StoreError)
        return
    with suppress(StoreError, DamagedData):
        expect_size(aside(path), entry, side=StoreError)
        with told(path, StoreError):
            aside(path).replace(path)
            sync_folder(path.parent)
        return
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


def aside(path: Path) -> Path:
    """Where the shared file *path* lies while `sweep` decides, or when that was cut off."""
    return path.with_name(path.name + _GOING)


def sweep(root: StoreRoot, vm: str, progress: Progress | None = None) -> None:
    """Remove what no snapshot on the store needs any more; *progress* is told of each manifest.

    Nothing goes while a snapshot's folder has no manifest that can be read: it may be one that is
    just being shipped. A file is first put aside; who ships meanwhile either finds that it is not
    there, or is seen now by its folder. Raises StoreError; what was put aside is back then, if the
    store lets it.
    """
    put: list[Path] = []
    look = _Look(root, vm, progress)
    with told(root.vm(vm), StoreError):
        there = _inside(root.shared(vm))
        if not there:
            return
        try:
            _swept(look, there, put)
        except BaseException:
            for path in put:
                with suppress(OSError):
                    _back(path)
            raise
        with suppress(OSError):
            root.shared(vm).rmdir()  # only when it is empty
        sync_folder(root.vm(vm))


class _Look:
    """What the snapshots of a VM need; a manifest that was read is not read again."""

    def __init__(self, root: StoreRoot, vm: str, progress: Progress | None) -> None:
        self._root, self._vm, self._progress = root, vm, progress
        self._known: dict[str, set[str]] = {}

    def needed(self) -> set[str] | None:
        """The digests that they name now; None when one cannot be read. Raises OSError."""
        folders = [path for path in _inside(self._root.vm(self._vm)) if is_snapshot_id(path.name)]
        found: set[str] = set()
        for number, folder in enumerate(folders, 1):
            if folder.name not in self._known:
                path = folder / MANIFEST
                try:
                    manifest = decode(read_small(path, side=StoreError), Manifest, path)
                except SnapError:
                    return None
                self._known[folder.name] = {one.blake3 for one in manifest.shared}
                if self._progress is not None:
                    self._progress(number, 0, f"looking at what {self._vm} shares")
            found |= self._known[folder.name]
        return found


def _swept(look: _Look, there: list[Path], put: list[Path]) -> None:
    """*put* has what is aside, also when this is broken off."""
    needed = look.needed()
    put += [path for path in there if path.name.endswith(_GOING)]
    for path in there:
        if needed is not None and path not in put and path.name not in needed:
            with suppress(FileNotFoundError):  # another sweep was faster
                path.rename(aside(path))
                put.append(aside(path))
    needed = look.needed()
    for path in dict.fromkeys(put):
        name = _origin(path)
        if needed is not None and (name.name not in needed or name.exists()):
            path.unlink(missing_ok=True)  # who ships may have taken it back just now
        else:
            _back(path)


def _origin(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(_GOING))


def _back(path: Path) -> None:
    if not _origin(path).exists():
        with suppress(FileNotFoundError):
            path.rename(_origin(path))


def schemas() -> dict[str, dict[str, object]]:
    """The JSON Schema of `shared.json`, by the word that its file is named for."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {"qmpsnap-shared": dialect | msgspec.json.schema(Notes)}


def _kept(root: LocalRoot, vm: str, path: str, known: Note | None) -> Note:
    seen = _seen(path)
    if known is not None and msgspec.structs.replace(seen, blake3=known.blake3) == known:
        with suppress(LocalFailed, DamagedData):
            expect_size(root.shared(vm) / known.blake3, _entry(known), side=LocalFailed)
            return known
    real = Path(os.path.realpath(path))  # /vmlinuz is a link on many a host
    size, digest = digest_file(real, side=LocalFailed)
    noted = msgspec.structs.replace(seen, blake3=digest)
    make_folders(root.shared(vm), root.path, side=LocalFailed)
    copy = root.shared(vm) / digest
    with suppress(LocalFailed, DamagedData):
        expect_size(copy, _entry(noted), side=LocalFailed)
        return noted
    with told(copy, LocalFailed):
        copy.unlink(missing_ok=True)
    copy_verified(real, copy, _entry(noted), source=LocalFailed, target=LocalFailed)
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


def _entry(note: Note) -> FileEntry:
    return FileEntry(name=f"shared/{note.blake3}", bytes=note.bytes, blake3=note.blake3)


def _noted(root: LocalRoot, vm: str) -> dict[str, Note]:
    try:
        content = read_small(root.notes(vm), side=LocalFailed)
        return msgspec.json.decode(content, type=Notes).files
    except (LocalFailed, msgspec.DecodeError, UnicodeDecodeError):
        return {}  # it only saves work


def _sweep_local(root: LocalRoot, vm: str, needed: set[str]) -> None:
    for facts in local.survey(root, vm):
        if facts.problem is not None:
            return  # nor is it known what its spool waits for
        if facts.spool and facts.spooled is None and facts.storage is not None:
            return
        needed |= {one.blake3 for one in facts.spooled.shared} if facts.spooled else set()
    with told(root.shared(vm), LocalFailed):
        for path in _inside(root.shared(vm)):
            if path.name not in needed:
                path.unlink()


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
