"""Sealed images that stand on one another, read as the one disk that they are."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from qmpsnap.store.clusters import CLUSTER, batches
from qmpsnap.store.sealed import Sealed
from qmpsnap.store.sealedindex import Run

_STEP = 64  # clusters that are compared at a time


class _Part(NamedTuple):
    """The clusters from *start* to *end* are those of *image* (by its place), *at* in its data.

    *at* is None for zeros.
    """

    start: int
    end: int
    image: int
    at: int | None

    def cut(self, start: int, end: int) -> _Part:
        at = None if self.at is None else self.at + start - self.start
        return _Part(start, end, self.image, at)


class SealedChain:
    """*images*, top first: what the top one holds is so, whatever the others say. One thread."""

    def __init__(self, images: Sequence[Sealed]) -> None:
        self._images = images
        self.virtual_size: int = images[0].index.virtual_size
        self.compressed: bool = images[0].index.compressed
        """Whether the top one is."""
        parts: list[_Part] = []
        for number, image in enumerate(images):
            parts = _over(parts, _parts(number, image.index.runs))
        self._parts = parts
        self._starts = [part.start for part in parts]

    def runs(self) -> list[Run]:
        """What any of the images holds, in order; zeros too."""
        found: list[Run] = []
        for part in self._parts:
            last = found[-1] if found else Run(0, 0, zeros=False)
            zeros, count = part.at is None, part.end - part.start
            if last.clusters and last.start + last.clusters == part.start and last.zeros == zeros:
                found[-1] = Run(last.start, last.clusters + count, zeros)
            else:
                found.append(Run(part.start, count, zeros))
        return found

    def extents(self, *, zeros: bool) -> list[tuple[int, int]]:
        """`runs` as offsets and lengths in bytes; without *zeros* those that hold data."""
        return [
            (run.start * CLUSTER, run.clusters * CLUSTER)
            for run in self.runs()
            if zeros or not run.zeros
        ]

    def read(self, pieces: Sequence[tuple[int, int]]) -> list[bytearray]:
        """What the disk holds at offsets that are of whole clusters, for so many bytes each.

        Best in rising order. Raises NotAuthentic before any of it is given, LocalFailed.
        """
        return [self._piece(offset, length) for offset, length in pieces]

    def _piece(self, offset: int, length: int) -> bytearray:
        found = bytearray(length)
        start, end = offset // CLUSTER, -(-(offset + length) // CLUSTER)
        for number in range(max(0, bisect_right(self._starts, start) - 1), len(self._parts)):
            part = self._parts[number]
            if part.start >= end:
                break
            if part.end <= start or part.at is None:
                continue
            part = part.cut(max(start, part.start), min(end, part.end))
            assert part.at is not None
            at, size = part.at * CLUSTER, (part.end - part.start) * CLUSTER
            to = (part.start - start) * CLUSTER
            for content in self._images[part.image].data(at, size):
                content = content[: length - to]  # the last cluster may reach past the end
                found[to : to + len(content)] = content
                to += len(content)
        return found


def same(
    one: SealedChain, other: SealedChain, *, zeros: bool, on_bytes: Callable[[int], None]
) -> bool:
    """Whether both hold the same, and (with *zeros*) zeros at the same places.

    *on_bytes* is told how many more bytes were compared. Raises as `SealedChain.read`.
    """
    if one.virtual_size != other.virtual_size:
        return False
    if one.extents(zeros=False) != other.extents(zeros=False):
        return False
    if zeros and one.runs() != other.runs():
        return False
    runs = [(run.start, run.start + run.clusters) for run in one.runs() if not run.zeros]
    for batch in batches(runs, _STEP):
        pieces = [(at * CLUSTER, count * CLUSTER) for at, count in batch]
        if one.read(pieces) != other.read(pieces):
            return False
        on_bytes(sum(length for _, length in pieces))
    return True


def _parts(number: int, runs: Sequence[Run]) -> Iterator[_Part]:
    at = 0
    for run in runs:
        yield _Part(run.start, run.start + run.clusters, number, None if run.zeros else at)
        at += 0 if run.zeros else run.clusters


def _over(upper: Sequence[_Part], lower: Iterator[_Part]) -> list[_Part]:
    """*upper*, and what *lower* has between."""
    found: list[_Part] = []
    above = iter(upper)
    covering = next(above, None)
    for part in lower:
        at = part.start
        while at < part.end:
            if covering is None or covering.start >= part.end:
                found.append(part.cut(at, part.end))
                at = part.end
            elif covering.end <= at or covering.start <= at:
                at = max(at, covering.end)
                if covering.end > part.end:
                    break  # it may cover some of the next one, too
                found.append(covering)
                covering = next(above, None)
            else:
                found.append(part.cut(at, covering.start))
                at = covering.start
    rest = [] if covering is None else [covering, *above]
    return [*found, *rest]
