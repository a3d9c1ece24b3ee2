"""A store half that is deleted, and what no other one needs any more."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress

from qmpsnap.errors import StoreError
from qmpsnap.store import sweeping, wire
from qmpsnap.store.files import Progress, sync_folder, told
from qmpsnap.store.halffiles import is_folder
from qmpsnap.store.layout import MANIFEST, StoreRoot
from qmpsnap.store.secret import Keys, none
from qmpsnap.store.shipping import unguarded


def remove(
    root: StoreRoot,
    request: wire.Remove,
    progress: Progress,
    guard: Callable[[], None] = unguarded,
    keys: Keys = none,
) -> None:
    """Delete a store half: unsealed first, so that what is left after a crash never looks whole.

    What it shared with others goes when it was the last that needed it, if a *sweep* is asked for.
    Nothing to delete is as good. *guard* raises when the VM is no longer ours. Raises StoreError.
    """
    folder = root.snapshot(request.vm, request.id)
    with told(folder, StoreError):
        if os.path.lexists(folder):
            if not (is_folder(folder.parent) and is_folder(folder)):
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


def sweep(
    root: StoreRoot,
    vm: str,
    progress: Progress,
    waiting: Sequence[str] = (),
    guard: Callable[[], None] = unguarded,
    keys: Keys = none,
) -> None:
    """Delete what snapshots of *vm* shared, and none needs any more. Raises StoreError."""
    with told(root.vm(vm), StoreError):
        there = is_folder(root.shared(vm))
    if there:
        sweeping.sweep(root, vm, progress, waiting=waiting, guard=guard, keys=keys)
