"""Packs read to their last byte: the only place that does, each once however many need it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3

from qmpsnap.errors import DamagedData, DigestMismatch, KeyMissing, LocalFailed, StoreError
from qmpsnap.store.chunks import PLAIN, Chunks, chunks_of
from qmpsnap.store.files import PIECE, Progress, expect_size, opened
from qmpsnap.store.rampack import Frame, key_of, table
from qmpsnap.store.secret import Keys, none
from qmpsnap.store.shelf import Lying

_State = tuple[int, int, int, int]


class Checked:
    """What was found in the packs that were read; a file that is as it was is not read again.

    To be kept for one run: who looks again another day wants to know how the file is then.
    """

    def __init__(self) -> None:
        self._found: dict[Path, tuple[_State, DamagedData | StoreError | LocalFailed | None]] = {}

    def check(self, lying: Lying, progress: Progress | None = None, keys: Keys = none) -> None:
        """The file is what its name says, and each chunk of it what its table says.

        Where the key of one that is encrypted is not here, chunks are not looked at. Raises
        DigestMismatch, DamagedData, and the folder's own error.
        """
        expect_size(lying.path, lying.entry, side=lying.side)
        with opened(lying.path, lying.side) as descriptor:
            it = os.fstat(descriptor)
            state = it.st_dev, it.st_ino, it.st_size, it.st_mtime_ns
            known = self._found.get(lying.path)
            if known is None or known[0] != state:
                try:
                    _read(lying, descriptor, keys, progress)
                except (DamagedData, StoreError, LocalFailed) as failed:
                    known = state, failed
                else:
                    known = state, None
                self._found[lying.path] = known
        if known[1] is not None:
            raise known[1]


def _read(lying: Lying, descriptor: int, keys: Keys, progress: Progress | None) -> None:
    spoilt: DamagedData | None = None
    frames: Mapping[bytes, Frame] = {}
    kind: Chunks = PLAIN
    try:
        frames = table(lying.path, side=lying.side)
        kind = chunks_of(key_of(lying.path, side=lying.side), keys)
    except KeyMissing:
        frames = {}
    except DamagedData as odd:
        spoilt = odd  # told when the file is what it was
    hasher, chunks, done = blake3(), _Passing(frames, kind), 0
    while piece := os.read(descriptor, PIECE):
        hasher.update(piece)
        chunks.take(piece)
        done += len(piece)
        if progress is not None:
            progress(done, lying.entry.bytes, f"reading {lying.path.name}")
    if (done, hasher.hexdigest()) != (lying.entry.bytes, lying.entry.blake3):
        raise DigestMismatch(f"{lying.path}: the content is not what the manifest says (BLAKE3)")
    if spoilt is not None:
        raise spoilt
    if chunks.wrong:
        count = f"{chunks.wrong} chunks are"
        raise DigestMismatch(f"{lying.path}: {count} not what its table says (BLAKE3)")


class _Passing:
    """The chunks of a pack, looked at as its bytes go by; *wrong* is how many are others."""

    def __init__(self, frames: Mapping[bytes, Frame], kind: Chunks) -> None:
        self._kind = kind
        self._left = deque(sorted(frames.items(), key=lambda one: one[1].offset))
        self._at, self._bytes = 0, b""  # what has gone by, and is of a chunk to come
        self.wrong = 0

    def take(self, piece: bytes) -> None:
        """The next bytes of the file."""
        self._bytes += piece
        end = self._at + len(self._bytes)
        view = memoryview(self._bytes)
        while self._left and self._left[0][1].offset + self._left[0][1].length <= end:
            digest, frame = self._left.popleft()
            start = frame.offset - self._at
            try:
                # one that overlaps another starts before what is left
                part = view[max(0, start) : start + frame.length]
                self._kind.content(part, digest, frame.raw)
            except DigestMismatch:
                self.wrong += 1
        upto = min(end, self._left[0][1].offset) if self._left else end
        self._bytes = bytes(view[max(0, upto - self._at) :])
        self._at = end - len(self._bytes)
