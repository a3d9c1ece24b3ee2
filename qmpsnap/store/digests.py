"""What a point has written, byte for byte: the only place that digests whole disk images."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from blake3 import blake3

from qmpsnap.errors import LocalFailed, SnapError
from qmpsnap.ids import is_snapshot_id
from qmpsnap.store.files import CHUNK, Progress, opened, publish, read_small, replace, told
from qmpsnap.store.layout import DIGESTS, KEPT, MERGED, STORAGE
from qmpsnap.store.manifest import Digests, decode, encode

NEVER = "was never hashed"
_OTHER = "its content (BLAKE3) is not what {} says"  # either of the two may be damaged
_ZEROS = bytes(CHUNK)


def take(
    folder: Path,
    point: str,
    names: Sequence[str],
    on_progress: Progress | None = None,
    *,
    anew: bool = False,
) -> Digests:
    """Write `digests.json` of *point*, which is in *folder* and has written the images *names*.

    The manifests beside them are digested too: nothing else tells that a revision's is damaged.
    *anew*: in the place of what an earlier call wrote, after a merge. Raises LocalFailed, also
    when other digests are there already.
    """
    total = sum(_size(folder / name) for name in names)
    counter = _Counter(on_progress, total, "hashing")
    images = {name: digest(folder / name, counter.add) for name in names}
    digests = Digests(point=point, images=images | _of_manifests(folder))
    write = replace if anew else publish
    write(folder / DIGESTS, encode(digests), side=LocalFailed)
    return digests


def check(
    folder: Path, names: Sequence[str], on_progress: Progress | None = None
) -> list[tuple[str, str]]:
    """What is wrong with the images *names* of the point in *folder*: name, and what it is.

    Their bytes are read from the disk, not from the cache.
    """
    path = folder / DIGESTS
    try:
        if not os.path.lexists(path):
            return [(DIGESTS, f"{folder}: {NEVER}: it has no {DIGESTS}")]
        noted = decode(read_small(path, side=LocalFailed), Digests, path)
    except SnapError as wrong:
        return [(DIGESTS, str(wrong))]
    if noted.point != point_of(folder):
        return [(DIGESTS, f"{path}: is of {noted.point}")]
    found = []
    now = _of_manifests(folder)
    for name in (STORAGE, MERGED):
        if now.get(name) != noted.images.get(name):
            other = _OTHER.format(path) if name in now else "is missing"
            there = KEPT if name == STORAGE and os.path.lexists(folder / KEPT) else name
            found.append((there, f"{folder / there}: {other}"))
    total = sum(_size(folder / name) for name in names if (folder / name).is_file())
    counter = _Counter(on_progress, total, "verifying")
    looked = ((name, _wrong(folder / name, noted.images.get(name), counter.add)) for name in names)
    return [*found, *((name, what) for name, what in looked if what)]


def point_of(folder: Path) -> str:
    """The name of the point whose folder this is: `ID`, or `ID/REVISION`."""
    inner = is_snapshot_id(folder.parent.name)
    return f"{folder.parent.name}/{folder.name}" if inner else folder.name


def digest(
    path: Path, on_bytes: Callable[[int], None] | None = None, *, from_disk: bool = False
) -> str:
    """The BLAKE3 of *path*, on all cores; holes count as zeros and are not read.

    *on_bytes* is told how many more bytes are done. *from_disk*: what the kernel still has in its
    cache proves nothing, and is read again. Raises LocalFailed.
    """
    hasher, buffer = blake3(max_threads=blake3.AUTO), bytearray(CHUNK)
    with opened(path, LocalFailed) as descriptor:
        size = os.fstat(descriptor).st_size
        if from_disk:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for piece in _pieces(descriptor, size, buffer):
            hasher.update(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
    return hasher.hexdigest()


def _wrong(path: Path, noted: str | None, on_bytes: Callable[[int], None]) -> str:
    if noted is None:
        return f"{path}: {NEVER}"
    try:
        now = digest(path, on_bytes, from_disk=True)
    except LocalFailed as failed:
        return str(failed)
    return "" if now == noted else f"{path}: {_OTHER.format(path.with_name(DIGESTS))}"


def _of_manifests(folder: Path) -> dict[str, str]:
    """A kept point's manifest is that of before under another name: it has one digest."""
    found = {}
    for name, known in ((STORAGE, STORAGE), (KEPT, STORAGE), (MERGED, MERGED)):
        if os.path.lexists(folder / name):
            found[known] = digest(folder / name)
    return found


def _pieces(descriptor: int, size: int, buffer: bytearray) -> Iterator[memoryview | bytes]:
    """The content in order, at most a buffer at a time, from `SEEK_DATA` to `SEEK_HOLE`."""
    view, at = memoryview(buffer), 0
    while at < size:
        start, end = _next_data(descriptor, at, size)
        while at < start:
            piece = _ZEROS[: start - at] if start - at < CHUNK else _ZEROS
            yield piece
            at += len(piece)
        while at < end:
            got = os.preadv(descriptor, [view[: min(CHUNK, end - at)]], at)
            if not got:
                return  # it was cut short meanwhile: the digest tells
            yield view[:got]
            at += got


def _next_data(descriptor: int, at: int, size: int) -> tuple[int, int]:
    try:
        start = os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError as none:
        if none.errno == errno.ENXIO:  # nothing but a hole from here on
            return size, size
        raise
    return min(start, size), min(os.lseek(descriptor, start, os.SEEK_HOLE), size)


def _size(path: Path) -> int:
    with told(path, LocalFailed):
        return path.stat().st_size


class _Counter:
    """Adds up the bytes of several files for one bar."""

    def __init__(self, on_progress: Progress | None, total: int, what: str) -> None:
        self._tell, self._total, self._what, self._done = on_progress, total, what, 0

    def add(self, count: int) -> None:
        self._done += count
        if self._tell is not None:
            self._tell(self._done, self._total, self._what)
