"""What snapshots on the store shared, and none needs: the only place that removes it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from qmpsnap.errors import SnapError, StoreError
from qmpsnap.ids import is_snapshot_id
from qmpsnap.store import moved, repack
from qmpsnap.store.files import Progress, read_small, sync_folder, told
from qmpsnap.store.layout import GOING, MANIFEST, StoreRoot, aside
from qmpsnap.store.manifest import Manifest, decode
from qmpsnap.store.secret import Keys, none


def sweep(
    root: StoreRoot,
    vm: str,
    progress: Progress | None = None,
    *,
    waiting: Collection[str] = (),
    guard: Callable[[], None] = lambda: None,
    keys: Keys = none,
) -> None:
    """Remove what no snapshot on the store needs any more; *progress* is told of each manifest.

    Of *waiting*, the digests of what snapshots need which are still to be shipped, nothing goes.
    What is left of a pack of which little is needed is moved into another one.

    Nothing goes while a snapshot's folder has no manifest that can be read: it may be one that is
    just being shipped. A file is first put aside; who ships meanwhile either finds that it is not
    there, or is seen now by its folder. Raises StoreError; what was put aside is back then, if the
    store lets it. *guard* is called before anything goes, and raises when the VM is another host's.
    """
    put: list[Path] = []
    look = _Look(root, vm, progress, waiting, guard)
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
        with suppress(StoreError, OSError):
            # moving takes room, and a removal must not want any: the next one tries again
            repack.repack(root, vm, look, waiting, progress, keys)
        with suppress(OSError):
            root.shared(vm).rmdir()  # only when it is empty
        sync_folder(root.vm(vm))


class _Look:
    """What the snapshots of a VM need; a manifest that was read is not read again."""

    def __init__(
        self,
        root: StoreRoot,
        vm: str,
        progress: Progress | None,
        waiting: Collection[str],
        guard: Callable[[], None],
    ) -> None:
        self._root, self._vm, self._progress = root, vm, progress
        self._waiting, self._guard = set(waiting), guard
        self.manifests: dict[str, Manifest] = {}

    def needed(self) -> set[str] | None:
        """The names that they need now; None when one cannot be read.

        What nobody needs may go, if this host has the VM: else StoreError. Raises OSError.
        """
        self._guard()
        folders = [path for path in _inside(self._root.vm(self._vm)) if is_snapshot_id(path.name)]
        found = set(self._waiting)
        for number, folder in enumerate(folders, 1):
            if folder.name not in self.manifests:
                path = folder / MANIFEST
                try:
                    manifest = decode(read_small(path, side=StoreError), Manifest, path)
                except SnapError:
                    return None
                self.manifests[folder.name] = manifest
                if self._progress is not None:
                    self._progress(number, 0, f"looking at what {self._vm} shares")
            found |= self.manifests[folder.name].needed
        try:
            return found | self._led_to(found)
        except SnapError:
            return None

    def _led_to(self, found: set[str]) -> set[str]:
        """The notes of packs that were moved, and where they lead to."""
        folder, more = self._root.shared(self._vm), set[str]()
        noted = {path.name.removesuffix(GOING) for path in _inside(folder)}
        for digest in found:
            at = folder / digest
            while moved.note(at).name in noted - more:
                more.add(moved.note(at).name)
                if (to := moved.read(at, side=StoreError)) is None:
                    break
                more.add(to.new.blake3)
                at = folder / to.new.blake3
        return more


def _swept(look: _Look, there: list[Path], put: list[Path]) -> None:
    """*put* has what is aside, also when this is broken off."""
    needed = look.needed()
    put += [path for path in there if path.name.endswith(GOING)]
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
    return path.with_name(path.name.removesuffix(GOING))


def _back(path: Path) -> None:
    if not _origin(path).exists():
        with suppress(FileNotFoundError):
            path.rename(_origin(path))


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
