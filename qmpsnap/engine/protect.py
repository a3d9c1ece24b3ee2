"""Protected snapshots: the only place that knows which ones must not be deleted or pruned."""

from __future__ import annotations

import asyncio

import msgspec

from qmpsnap.engine.listing import find
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import HalfMissing, LocalFailed, Refused
from qmpsnap.host import lock
from qmpsnap.store import files
from qmpsnap.store.layout import PROTECTED, LocalRoot


class Protection(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a snapshot is protected now, and the *note* that says why."""

    vm: str
    id: str
    protected: bool
    note: str


async def protect(roots: Roots, vm: str, word: str, note: str = "") -> Protection:
    """Keep one snapshot from `prune` and `delete`; done once more, it replaces the note.

    Raises SnapshotUnknown, VmBusy, LocalFailed, and HalfMissing when there is no local half here.
    """
    async with lock.held(roots.local.lock(vm), "protect"):
        entry = await find(roots, vm, word)
        if not entry.local:
            raise HalfMissing(f"{vm} {entry.id}: {entry.why}: only a local half can be protected")
        path = roots.local.snapshot(vm, entry.id) / PROTECTED
        content = f"{note}\n".encode() if note else b""
        await asyncio.to_thread(files.replace, path, content, side=LocalFailed)
        return Protection(vm=vm, id=entry.id, protected=True, note=note)


async def unprotect(roots: Roots, vm: str, word: str) -> Protection:
    """Let one snapshot go the way of the others; one that was not protected is as good.

    Raises SnapshotUnknown, VmBusy, LocalFailed.
    """
    async with lock.held(roots.local.lock(vm), "unprotect"):
        entry = await find(roots, vm, word)
        await asyncio.to_thread(_forget, roots.local, vm, entry.id)
        return Protection(vm=vm, id=entry.id, protected=False, note="")


def is_protected(root: LocalRoot, vm: str, id: str) -> bool:
    """Whether the snapshot must stay. Raises LocalFailed when that cannot be told."""
    path = root.snapshot(vm, id) / PROTECTED
    with files.told(path, LocalFailed):
        try:
            path.lstat()
        except FileNotFoundError:
            return False
        return True


def _forget(root: LocalRoot, vm: str, id: str) -> None:
    path = root.snapshot(vm, id) / PROTECTED
    with files.told(path, LocalFailed):
        if is_protected(root, vm, id):
            path.unlink()
            files.sync_folder(path.parent)


def refuse_protected(root: LocalRoot, vm: str, id: str) -> None:
    """Raises Refused for a protected snapshot, LocalFailed."""
    if is_protected(root, vm, id):
        note = files.read_small(root.snapshot(vm, id) / PROTECTED, side=LocalFailed, limit=4096)
        told = note.decode(errors="replace").strip()
        raise Refused(
            f"{vm} {id} is protected{f': {told}' if told else ''}",
            hint=f"`qmpsnap unprotect {vm} {id}` lets it go",
        )
