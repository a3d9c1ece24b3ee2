"""Packs that were lost, made again from page images: the only place that does, and puts them in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from qmpsnap.errors import LocalFailed, PacksMissing, StoreError
from qmpsnap.store import moved, ramindex
from qmpsnap.store.chunking import stop_if
from qmpsnap.store.files import Progress, sync_folder, told
from qmpsnap.store.filling import Neighbour, neighbour
from qmpsnap.store.ramindex import Index, Named
from qmpsnap.store.rampack import Writer, copy, key_of, table
from qmpsnap.store.secret import Keys, none


def remade(
    index: Index,
    lost: Collection[str],
    near: Sequence[Path],
    to: Path,
    *,
    keys: Keys = none,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, Named]:
    """For each pack of *lost* one in *to* that has all chunks which *index* needs of it.

    They come from the page images in the folders *near*, each beside its index, of whichever
    snapshots these are; each is checked. The same chunks make the same pack. Blocks.

    Raises PacksMissing, with the packs of which these have not all, LocalFailed, Cancelled; nothing
    is left then but packs that are whole.
    """
    found: dict[str, Named] = {}
    missing = []
    with ExitStack() as stack:

        def read(path: Path) -> Index:
            return ramindex.read(path, side=LocalFailed, keys=keys)

        found_near = (neighbour(one, read, index.chunks.key) for one in near)
        neighbours = [one for one in found_near if one is not None]
        for one in neighbours:
            stack.callback(one.close)
        for name in lost:
            rows = [row for row in range(len(index)) if index.pack(row).blake3 == name]
            writer = Writer(to, key=index.chunks.key)
            try:
                if _written(writer, index, rows, neighbours, on_progress, cancelled):
                    pack = writer.close()
                    found[name] = Named(blake3=pack.blake3, bytes=pack.bytes)
                else:
                    missing.append(name)
            finally:
                writer.discard()
    if missing:
        raise PacksMissing(
            f"{len(missing)} lost packs of RAM cannot be made again: no page images that are kept "
            f"here have all of them",
            packs=tuple(missing),
        )
    return found


def joined(name: Path, path: Path, new: Path, keys: Keys, progress: Progress | None) -> None:
    """What the pack *name* has, and *new*, is in a third one, which *name* leads to. It goes.

    It is the file *path* now (a sweep may have put it aside). Raises StoreError, DamagedData,
    KeyMissing: it is as it was then.
    """
    writer = Writer(name.parent, key=key_of(new, side=StoreError), side=StoreError)
    try:
        written: set[bytes] = set()
        for one in (path, new):
            copy(one, table(one, side=StoreError), writer, written, keys, progress)
        pack = writer.close(progress)
    finally:
        writer.discard()
    moved.write(name, Named(blake3=pack.blake3, bytes=pack.bytes), side=StoreError)
    with told(path, StoreError):
        path.unlink(missing_ok=True)
        sync_folder(name.parent)


def _written(
    writer: Writer,
    index: Index,
    rows: Iterable[int],
    near: Sequence[Neighbour],
    on_progress: Progress | None,
    cancelled: Callable[[], bool] | None,
) -> bool:
    """False when one of the chunks is in none of the images."""
    written: set[bytes] = set()
    for row in rows:
        stop_if(cancelled, Path(index.pack(row).blake3))
        digest = index.digest(row)
        if digest in written:
            continue
        _, length = index.span(index.block_of(row), row)
        contents = (one.chunk(digest, length) for one in near)
        content = next((one for one in contents if one is not None), None)
        if content is None:
            return False
        writer.add(digest, index.chunks.frame(content, digest), length)
        written.add(digest)
        if on_progress is not None:
            on_progress(writer.bytes, 0, "making lost RAM again")
    return True
