"""A copy of a disk that is encrypted: the only place that knows the bytes of a sealed image.

    0         what it begins with (`store.envelope`), of the kind QSNPDISK
    ...       frames of data: 256 KiB encrypted, the last one less, and 16 bytes that authenticate
              each; compressed before, where that made it less
    ...       the index (`store.sealedindex`), in frames of its own
    -24   24  where the index begins (8), its bytes there (8), QSNPDEND

Each file has a key of its own. A frame's nonce is its number and what it is of: data, the index,
the end of the index. It is the index that tells how many frames of data there are and of how many
bytes each; frames, index and what is around them fill the file to its last byte. So what was
altered, left out, swapped, taken from another file or cut off is refused, and nothing is given that
was not authenticated before. It is written in one pass, and never lies anywhere in the clear.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import zstandard

from qmpsnap.errors import LocalFailed, ManifestError, NotAuthentic
from qmpsnap.store import aead
from qmpsnap.store.aead import TAG_BYTES, NotOpened
from qmpsnap.store.clusters import CLUSTER, Read, batches, clusters, whole
from qmpsnap.store.copying import data_runs
from qmpsnap.store.envelope import FRAME, Envelope, Kind, Role
from qmpsnap.store.files import Progress, opened, partial
from qmpsnap.store.sealedindex import Index, Run
from qmpsnap.store.secret import Keys, Secret
from qmpsnap.store.sink import Sink, Terms, expect_room

_KIND = Kind(b"QSNPDISK", b"qmpsnap disk, version 1\0")
_NONCE = struct.Struct(">QI")
_DATA, _INDEX, _INDEX_END = range(3)
_TRAILER = struct.Struct("<QQ8s")
_END = b"QSNPDEND"
_ZSTD = 1  # level: what is copied is mostly read from a disk as fast


def write(
    dst: Path,
    *,
    secret: Secret,
    role: Role,
    virtual_size: int,
    on: str,
    extents: Sequence[tuple[int, int]],
    read: Read,
    compress: bool,
    reserve: int,
    limit: int | None,
    cancelled: Callable[[], bool],
    on_progress: Progress | None,
) -> int:
    """Make *dst* hold *extents* of a disk, encrypted with *secret* for *role*; its bytes.

    Blocks. *on*: the point that has the disk elsewhere; empty: it is zeros there. The others are as
    those of `increment.write`, and so is what is raised; no *dst* is left behind then.
    """
    runs = clusters(extents, virtual_size)
    data = CLUSTER * sum(end - start for start, end in runs)
    if os.path.lexists(dst):
        raise LocalFailed(f"{dst}: exists")
    with partial(dst, LocalFailed) as descriptor:
        expect_room(dst, data + -(-data // FRAME) * TAG_BYTES, reserve)
        terms = Terms(limit, reserve, cancelled, on_progress)
        what = f"writing {dst.name}"
        with Sink(descriptor, dst, terms, total=data, what=what) as sink:
            sink.look(0)
            writer = _Writer(sink, Envelope.made(_KIND, secret, role), secret, compress=compress)
            writer.fill(runs, whole(dst, read, virtual_size), keep_zeros=bool(on))
            writer.end(virtual_size, on)
        return sink.written


class _Writer:
    """Fills the file from its first byte to its last."""

    def __init__(self, sink: Sink, envelope: Envelope, secret: Secret, *, compress: bool) -> None:
        self._sink, self._cipher = sink, envelope.cipher(lambda _: secret)
        self._zstd = zstandard.ZstdCompressor(level=_ZSTD) if compress else None
        self._at, self._waiting = 0, bytearray()
        self._runs: list[Run] = []
        self._stored: list[int] = []
        self._append(envelope.content)

    def fill(self, runs: list[tuple[int, int]], read: Read, *, keep_zeros: bool) -> None:
        """All the data of *runs*; *keep_zeros*: what is zeros there is held, too."""
        done = 0
        for batch in batches(runs, self._sink.step // CLUSTER):
            pieces = [(at * CLUSTER, count * CLUSTER) for at, count in batch]
            for (at, count), content in zip(batch, read(pieces), strict=True):
                self._put(at, content, keep_zeros=keep_zeros)
                done += count * CLUSTER
            self._sink.look(done)
        if self._waiting:
            self._frame(bytes(self._waiting))

    def end(self, virtual_size: int, on: str) -> None:
        """The index and what tells where it is."""
        index = Index(virtual_size, on, self._zstd is not None, self._runs, self._stored)
        content, begun = index.encode(), self._at
        for number, start in enumerate(range(0, len(content), FRAME)):
            part = content[start : start + FRAME]
            kind = _INDEX_END if start + FRAME >= len(content) else _INDEX
            self._append(self._cipher.encrypt(_NONCE.pack(number, kind), part, _KIND.purpose))
        self._append(_TRAILER.pack(begun, self._at - begun, _END))

    def _put(self, at: int, content: bytes | bytearray, *, keep_zeros: bool) -> None:
        end = 0
        view = memoryview(content)
        for start, stop in data_runs(content, CLUSTER):
            if keep_zeros:
                self._hold(at + end // CLUSTER, (start - end) // CLUSTER, zeros=True)
            self._hold(at + start // CLUSTER, (stop - start) // CLUSTER, zeros=False)
            self._add(view[start:stop])
            end = stop
        if keep_zeros:
            self._hold(at + end // CLUSTER, (len(content) - end) // CLUSTER, zeros=True)

    def _hold(self, start: int, count: int, *, zeros: bool) -> None:
        last = self._runs[-1] if self._runs else Run(-1, 0, zeros)
        if not count:
            return
        if last.start + last.clusters == start and last.zeros == zeros:
            self._runs[-1] = Run(last.start, last.clusters + count, zeros)
        else:
            self._runs.append(Run(start, count, zeros))

    def _add(self, view: memoryview) -> None:
        while view:
            taken = FRAME - len(self._waiting)
            self._waiting += view[:taken]
            view = view[taken:]
            if len(self._waiting) == FRAME:
                self._frame(bytes(self._waiting))
                self._waiting.clear()

    def _frame(self, content: bytes) -> None:
        if self._zstd is not None and len(less := self._zstd.compress(content)) < len(content):
            content = less
        nonce = _NONCE.pack(len(self._stored), _DATA)
        frame = self._cipher.encrypt(nonce, content, _KIND.purpose)
        self._stored.append(len(frame))
        self._append(frame)

    def _append(self, content: bytes) -> None:
        self._sink.pwrite(content, self._at)
        self._at += len(content)


class Sealed:
    """An open sealed image: its *index*, and what its runs of data hold. For one thread."""

    def __init__(
        self, descriptor: int, path: Path, keys: Keys, role: Role | None, key: str | None
    ) -> None:
        self.path, self._descriptor, self._at = path, descriptor, 0
        envelope = Envelope.read(_KIND, self._next, path)
        envelope.expect(path, role, key)
        self.key: str = envelope.key
        self._cipher = envelope.cipher(keys)
        self.index: Index = Index.decode(self._index(), path)
        # where each frame begins; the index begins where the last one ends
        self._offsets = [*accumulate(self.index.stored, initial=len(envelope.content))]
        if self._offsets[-1] != self._begun:
            raise NotAuthentic(f"{path}: its frames do not fill what is before the index")
        self._data = self.index.data_bytes
        self._known: tuple[int, bytes] = (-1, b"")

    def data(self, at: int, length: int) -> Iterator[memoryview]:
        """The *length* bytes from *at* on of all data in its order, in parts.

        Raises NotAuthentic before any of a frame is given that was altered; LocalFailed.
        """
        end = at + length
        while at < end:
            number, within = divmod(at, FRAME)
            part = memoryview(self.frame(number))[within : within + end - at]
            at += len(part)
            yield part

    def frame(self, number: int) -> bytes:
        """A frame as it was. Raises as `data`."""
        if self._known[0] != number:
            self._known = number, self._opened(number)
        return self._known[1]

    def _opened(self, number: int) -> bytes:
        stored, offset = self.index.stored[number], self._offsets[number]
        plain = min(FRAME, self._data - number * FRAME)
        content = self._decrypted(self._pread(offset, stored), number, _DATA, offset)
        if len(content) == plain:
            return content
        try:
            if zstandard.frame_content_size(content) == plain:
                return zstandard.ZstdDecompressor().decompress(content)
        except zstandard.ZstdError:
            pass
        raise ManifestError(f"{self.path}: cannot be decompressed at {offset}")

    def _index(self) -> bytes:
        size = os.fstat(self._descriptor).st_size
        trailer = self._pread(max(0, size - _TRAILER.size), _TRAILER.size)
        whole = len(trailer) == _TRAILER.size and size >= self._at + _TRAILER.size
        begun, length, end = _TRAILER.unpack(trailer) if whole else (0, 0, b"")
        if end != _END or begun < self._at or begun + length + _TRAILER.size != size:
            raise NotAuthentic(f"{self.path}: is cut off, or was altered at its end")
        self._begun = begun
        parts, offset, left = [], begun, length
        for number in range(max(1, -(-length // (FRAME + TAG_BYTES)))):
            stored = min(left, FRAME + TAG_BYTES)
            left -= stored
            kind = _INDEX if left else _INDEX_END
            parts.append(self._decrypted(self._pread(offset, stored), number, kind, offset))
            offset += stored
        return b"".join(parts)

    def _decrypted(self, frame: bytes, number: int, kind: int, offset: int) -> bytes:
        try:
            nonce = _NONCE.pack(number, kind)
            return aead.opened_once(self._cipher, nonce, frame, _KIND.purpose)
        except NotOpened as odd:
            raise NotAuthentic(f"{self.path}: cannot be decrypted at {offset}: {odd}") from odd

    def _pread(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as failed:
            raise LocalFailed(f"{self.path}: {failed.strerror}") from failed

    def _next(self, size: int) -> bytes:
        content = self._pread(self._at, size)
        self._at += len(content)
        return content


@contextmanager
def opened_sealed(
    path: Path, keys: Keys, role: Role | None, key: str | None = None
) -> Iterator[Sealed]:
    """The sealed image *path*, open for the block.

    *role* is what it has to be for, *key* the one that it has to be encrypted with, where that is
    known. Raises ManifestError for what is none, NotAuthentic, KeyMissing, LocalFailed.
    """
    with opened(path, LocalFailed) as descriptor:
        yield Sealed(descriptor, path, keys, role, key)


def check(
    path: Path,
    keys: Keys,
    role: Role,
    key: str | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Index:
    """Open every frame of it; its index. *on_bytes* is told of each how many it had.

    Raises as `opened_sealed`.
    """
    with opened_sealed(path, keys, role, key) as image:
        for number in range(len(image.index.stored)):
            size = len(image.frame(number))
            if on_bytes is not None:
                on_bytes(size)
        return image.index
