"""The index of a sealed image: the only place that knows the words of what lies in it.

    8     size of the disk in bytes
    4     bytes of a cluster, 64 KiB
    2     1 where frames may be compressed
    2     bytes of the name of the point that it stands on
    8     number of runs
    8     number of frames
    ...   name of the point
    ...   runs: first cluster, twice, and one more where it reads as zeros (8), clusters (8)
    ...   frames: bytes as they lie in the file (4)

The clusters of all runs that hold data, one after the other, are what the frames are made of.
"""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from qmpsnap.errors import ManifestError
from qmpsnap.store.aead import TAG_BYTES
from qmpsnap.store.clusters import CLUSTER
from qmpsnap.store.envelope import FRAME

_FIXED = struct.Struct("<QIHHQQ")
_COMPRESSED = 1
_RUN, _FRAME = 16, 4


class Run(NamedTuple):
    """Clusters of the disk that are held, as data or, where *zeros* is so, as nothing but that."""

    start: int
    clusters: int
    zeros: bool


@dataclass(frozen=True, slots=True)
class Index:
    """What a sealed image holds: *runs* in order, and the *stored* bytes of its frames.

    *on*: the point that has the rest of the disk, empty where that is zeros.
    """

    virtual_size: int
    on: str
    compressed: bool
    runs: list[Run]
    stored: list[int]

    @property
    def data_bytes(self) -> int:
        """Of all frames as they are decrypted."""
        return CLUSTER * sum(run.clusters for run in self.runs if not run.zeros)

    def plain(self, frame: int) -> int:
        """The bytes of *frame* as they are decrypted."""
        return min(FRAME, self.data_bytes - frame * FRAME)

    def encode(self) -> bytes:
        on = self.on.encode()
        flags = _COMPRESSED if self.compressed else 0
        fixed = _FIXED.pack(
            self.virtual_size, CLUSTER, flags, len(on), len(self.runs), len(self.stored)
        )
        runs, stored = array("Q"), array("I", self.stored)
        for run in self.runs:
            runs.extend((run.start << 1 | run.zeros, run.clusters))
        return b"".join((fixed, on, _little(runs).tobytes(), _little(stored).tobytes()))

    @classmethod
    def decode(cls, content: bytes, path: Path) -> Self:
        """Raises ManifestError, naming *path*, for what no writer of ours makes."""
        if len(content) < _FIXED.size:
            raise _odd(path, "is cut short")
        size, cluster, flags, named, runs, frames = _FIXED.unpack_from(content)
        if cluster != CLUSTER or flags & ~_COMPRESSED:
            raise _odd(path, f"has clusters of {cluster} bytes, flags {flags}")
        if len(content) != _FIXED.size + named + runs * _RUN + frames * _FRAME:
            raise _odd(path, "is of another length")
        at = _FIXED.size + named
        words = _little(array("Q", content[at : at + runs * _RUN]))
        stored = _little(array("I", content[at + runs * _RUN :])).tolist()
        try:
            on = content[_FIXED.size : at].decode()
        except UnicodeDecodeError as odd:
            raise _odd(path, "names no point") from odd
        found = cls(
            virtual_size=size,
            on=on,
            compressed=bool(flags),
            runs=[
                Run(word >> 1, count, bool(word & 1))
                for word, count in zip(words[::2], words[1::2], strict=True)
            ],
            stored=stored,
        )
        found._check(path)
        return found

    def _check(self, path: Path) -> None:
        end, clusters = 0, -(-self.virtual_size // CLUSTER)
        for run in self.runs:
            if run.start < end or not run.clusters or run.start + run.clusters > clusters:
                raise _odd(path, f"has no run from cluster {run.start} on")
            end = run.start + run.clusters
        data = self.data_bytes
        if len(self.stored) != -(-data // FRAME):
            raise _odd(path, f"has {len(self.stored)} frames for {data} bytes")
        for number, stored in enumerate(self.stored):
            most = min(FRAME, data - number * FRAME) + TAG_BYTES
            if not (TAG_BYTES < stored <= most and (self.compressed or stored == most)):
                raise _odd(path, f"has a frame of {stored} bytes")


def _little(words: array[int]) -> array[int]:
    if sys.byteorder == "big":
        words.byteswap()
    return words


def _odd(path: Path, what: str) -> ManifestError:
    return ManifestError(f"{path}: the index {what}")
