"""Which row of an index a digest has: the only place that looks one up."""

from __future__ import annotations

from array import array

DIGEST = 32
"""Bytes of a digest."""
_LEAST = 1 << 10


class Rows:
    """The rows of *digests* that were added, by their digests; of equal ones the first.

    Open addressing in an array: a guest of 8 GiB has 262,144 rows, and a dict of these takes ten
    times the memory. *digests*, one behind the other, may grow meanwhile, and other threads may
    ask: at worst they are told that a row is not there yet.
    """

    def __init__(self, digests: bytes | bytearray) -> None:
        self._digests = digests
        self._slots = array("I", bytes(4 * _LEAST))  # a row plus one, or nothing
        self._count = 0

    def find(self, digest: bytes) -> int | None:
        """The row of *digest*, if it was added."""
        slots, place = self._slots, _place(digest)
        while row := slots[place & (len(slots) - 1)]:
            if self._digests.startswith(digest, (row - 1) * DIGEST):
                return row - 1
            place += 1
        return None

    def add(self, row: int) -> None:
        """Take in the digest of *row*."""
        if 2 * self._count >= len(self._slots):
            self._grow()
        if _put(self._slots, self._digests, row):
            self._count += 1

    def _grow(self) -> None:
        slots = array("I", bytes(2 * len(self._slots) * self._slots.itemsize))
        for row in filter(None, self._slots):
            _put(slots, self._digests, row - 1)
        self._slots = slots


def _put(slots: array[int], digests: bytes | bytearray, row: int) -> bool:
    digest = digests[row * DIGEST : (row + 1) * DIGEST]
    place = _place(digest)
    while there := slots[place & (len(slots) - 1)]:
        if digests.startswith(digest, (there - 1) * DIGEST):
            return False
        place += 1
    slots[place & (len(slots) - 1)] = row + 1
    return True


def _place(digest: bytes | bytearray) -> int:
    # a digest is as good as any hash of it
    return int.from_bytes(digest[:8], "little")
