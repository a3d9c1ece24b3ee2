"""A disk in clusters of 64 KiB: which of them a copy is made of, and how they are read for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qmpsnap.errors import LocalFailed

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS

Read = Callable[[Sequence[tuple[int, int]]], Sequence[bytes | bytearray]]
"""Given offsets and lengths in bytes, what the disk holds there: exactly so many bytes each."""


def clusters(extents: Sequence[tuple[int, int]], virtual_size: int) -> list[tuple[int, int]]:
    """The first and the past-the-last cluster of each longest run that *extents* touch."""
    runs: list[tuple[int, int]] = []
    for offset, length in sorted(extents):
        start, end = offset // CLUSTER, -(-min(offset + length, virtual_size) // CLUSTER)
        if length <= 0 or offset >= virtual_size:
            continue
        if runs and start <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(runs[-1][1], end)
        else:
            runs.append((start, end))
    return runs


def batches(
    runs: Sequence[tuple[int, int]], most: int, table: int | None = None
) -> Iterator[list[tuple[int, int]]]:
    """*runs* as first clusters and counts, up to *most* clusters at a time.

    With *table* none reaches over a multiple of it.
    """
    batch: list[tuple[int, int]] = []
    room = most
    for start, end in runs:
        at = start
        while at < end:
            count = min(room, end - at)
            if table is not None:
                count = min(count, table - at % table)
            batch.append((at, count))
            at, room = at + count, room - count
            if not room:
                yield batch
                batch, room = [], most
    if batch:
        yield batch


def whole(dst: Path, read: Read, virtual_size: int) -> Read:
    """*read*, of whole clusters also at an end that is none, for the copy *dst*.

    What it gives raises LocalFailed for an OSError, and where too little came.
    """

    def wholly(pieces: Sequence[tuple[int, int]]) -> Sequence[bytes | bytearray]:
        there = [(at, min(length, virtual_size - at)) for at, length in pieces]
        try:
            found = read(there)
        except OSError as failed:
            raise LocalFailed(f"{dst}: the disk cannot be read: {failed.strerror}") from failed
        for (at, length), content in zip(there, found, strict=True):
            if len(content) != length:
                raise LocalFailed(f"{dst}: {len(content)} bytes came for {length} at {at}")
        at, length = pieces[-1]
        return [*found[:-1], found[-1] + bytes(length - len(found[-1]))]

    return wholly
