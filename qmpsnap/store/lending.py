"""Packs that another VM of the store has: the only place that gives them to a second one.

They are linked: each VM has all that its snapshots need in a folder of its own, and whatever is
removed or moved in the other one's is no concern of it. The store has the bytes once.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from qmpsnap.errors import DamagedData, StoreError
from qmpsnap.store import moved
from qmpsnap.store.files import (
    NO_LINKS,
    Progress,
    copy_verified,
    expect,
    make_folders,
    sync_folder,
    told,
)
from qmpsnap.store.layout import StoreRoot
from qmpsnap.store.manifest import FileEntry, Pack
from qmpsnap.store.rampack import table

_REFUSED = NO_LINKS | {errno.EXDEV, errno.EACCES}


def lend(
    root: StoreRoot, vm: str, pack: Pack, needed: Callable[[], set[bytes]], progress: Progress
) -> bool:
    """Whether *vm* has all that it needs of *pack* now, from the VM that has it (`origin`).

    One that was moved there is moved here, too, if it still has the chunks that are *needed*. All
    of it is read first: what is not what its name says is given to nobody. Where the store makes no
    link it is copied. Raises StoreError when *vm*'s folder does not take it.
    """
    if pack.origin is None:
        return False
    there = root.shared(pack.origin)
    try:
        if not all(stat.S_ISDIR(one.lstat().st_mode) for one in (there.parent, there)):
            return False
        path, other = moved.lies(there / pack.blake3, side=StoreError)
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        if other is not None and not needed() <= table(path, side=StoreError).keys():
            return False
    except (DamagedData, StoreError, OSError):
        return False  # it has gone, or is of no use
    entry = pack.entry
    if other is not None:
        entry = FileEntry(name=f"shared/{other.blake3}", bytes=other.bytes, blake3=other.blake3)
    if not _given(root, root.shared(vm) / entry.blake3, path, entry, progress):
        return False
    if other is not None:
        moved.write(root.shared(vm) / pack.blake3, other, side=StoreError)
    return True


def _given(root: StoreRoot, to: Path, path: Path, entry: FileEntry, progress: Progress) -> bool:
    make_folders(to.parent, root.path, side=StoreError)
    fresh = to.with_name(f"{to.name}.{token_hex(8)}")  # another host's is never ours
    with told(to, StoreError):
        try:
            if _link(path, fresh):
                try:
                    expect(fresh, entry, side=StoreError, on_progress=progress)
                except StoreError:
                    return False  # it cannot be read
            else:
                copy_verified(path, fresh, entry, progress, source=StoreError)
            fresh.replace(to)
        except (DamagedData, FileNotFoundError):
            return False
        except StoreError:
            if os.path.lexists(path):
                raise
            return False
        finally:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
        sync_folder(to.parent)
    return True


def _link(path: Path, fresh: Path) -> bool:
    """False when the store makes no such link. Raises OSError."""
    try:
        os.link(path, fresh, follow_symlinks=False)
    except OSError as failed:
        if failed.errno in _REFUSED:
            return False
        if not (failed.errno == errno.EEXIST and fresh.samefile(path)):
            raise
        # NFS: the answer to our first attempt was lost, and it was made again
    return True
