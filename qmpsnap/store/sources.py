"""What RAM is made from, at hand from one request to the next: the only place that keeps it so.

Who waits for a page of a running guest waits for one request: to read index, near indexes and the
tables of moved packs for each of them anew would be most of that time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from qmpsnap.errors import LocalFailed, SnapError
from qmpsnap.store import filling, ramindex, wire
from qmpsnap.store.files import Progress, told
from qmpsnap.store.filling import Filled
from qmpsnap.store.ramindex import Index
from qmpsnap.store.secret import Keys, none
from qmpsnap.store.shelf import Shelf

_State = tuple[int, int, int, int]


class Sources:
    """Those of the snapshot that was asked for last, and of no other one.

    No file is kept open, and nothing stale is taken: an index is what its digest says, each chunk
    is checked, packs are looked for again once something is amiss with one, and a near index is
    read again when its file is another.
    """

    def __init__(self) -> None:
        self._of: wire.Fill | None = None
        self._index: Index | None = None
        self._shelf = Shelf([])
        self._near: dict[Path, tuple[_State, Index]] = {}

    def fill(
        self,
        request: wire.Fill,
        found: Callable[[], tuple[Index, Shelf]],
        progress: Progress,
        keys: Keys = none,
    ) -> Filled:
        """Do *request*, with what *found* gives if that is not at hand. Raises as `filling.fill`
        and *found*."""
        of = msgspec.structs.replace(request, to="", near=[], spans=None)
        fresh = self._index is None or of != self._of
        if fresh:
            self._index = None
            (self._index, self._shelf), self._of = found(), of
        assert self._index is not None
        try:
            return self._filled(self._index, request, progress, keys)
        except SnapError:
            if fresh:
                raise
        self._shelf.forget()  # a pack may have been moved since
        return self._filled(self._index, request, progress, keys)

    def _filled(self, index: Index, request: wire.Fill, progress: Progress, keys: Keys) -> Filled:
        near = [Path(one) for one in request.near]
        for gone in self._near.keys() - {one / filling.INDEX for one in near}:
            del self._near[gone]
        with self._shelf as shelf:
            return filling.fill(
                index,
                shelf,
                Path(request.to),
                near=near,
                near_index=lambda path: self._near_index(path, keys),
                spans=request.spans,
                on_progress=progress,
            )

    def _near_index(self, path: Path, keys: Keys) -> Index:
        with told(path, LocalFailed):
            it = path.lstat()
        state = it.st_dev, it.st_ino, it.st_size, it.st_mtime_ns
        if path not in self._near or self._near[path][0] != state:
            self._near.pop(path, None)
            self._near[path] = state, ramindex.read(path, side=LocalFailed, keys=keys)
        return self._near[path][1]
