"""What the disks must hold: plain bytes, and the states that a snapshot may be of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

CHUNK = 65536
Content = tuple[bytes, ...]
"""The bytes of a disk, in pieces: those that did not change are shared between states."""

State = Mapping[str, Content]
"""The content of each disk, by label, at one instant."""


def length(content: Content) -> int:
    return sum(map(len, content))


def difference(content: Content, found: bytes) -> str:
    """Where *found* is not *content*, in words; empty if it is the same."""
    wanted = b"".join(content)
    if len(wanted) != len(found):
        return f"{len(found)} bytes instead of {len(wanted)}"
    if wanted == found:
        return ""
    at = [
        index
        for index in range(0, len(wanted), 512)
        if wanted[index : index + 512] != found[index : index + 512]
    ]
    clusters = sorted({index // CHUNK for index in at})
    first = next(index for index in range(at[0], at[0] + 512) if wanted[index] != found[index])
    return (
        f"differs from byte {first:#x} on ({found[first]:#x} instead of {wanted[first]:#x}), "
        f"in {len(at)} sectors of the clusters {clusters}"
    )


def _told(state: State, found: Mapping[str, bytes]) -> str:
    return ", ".join(
        f"{label} {told}" for label in found if (told := difference(state[label], found[label]))
    )


class Disk:
    """A disk as the guest sees it."""

    def __init__(self, size: int) -> None:
        self._chunks: list[bytes] = []
        self.resize(size)

    @property
    def size(self) -> int:
        return length(self.content)

    @property
    def content(self) -> Content:
        return tuple(self._chunks)

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        for index in range(offset // CHUNK, (end + CHUNK - 1) // CHUNK):
            start = index * CHUNK
            chunk = bytearray(self._chunks[index])
            low, high = max(offset, start), min(end, start + len(chunk))
            chunk[low - start : high - start] = data[low - offset : high - offset]
            self._chunks[index] = bytes(chunk)

    def resize(self, size: int) -> None:
        whole = b"".join(self._chunks)[:size]
        whole += bytes(size - len(whole))
        self._chunks = [whole[start : start + CHUNK] for start in range(0, size, CHUNK)]


@dataclass(slots=True)
class Point:
    """A snapshot's revision. *may_be*: the states that the disks were in while it was taken.

    All its disks must be of one of them: the same one, since a snapshot is of one instant.
    """

    snapshot: str
    revision: int
    labels: tuple[str, ...]
    may_be: list[State]
    by: str

    def judge(self, found: Mapping[str, bytes]) -> str:
        """What is wrong with the restored disks *found*; empty if nothing is."""
        if sorted(found) != sorted(self.labels):
            return f"restores {sorted(found)} instead of {sorted(self.labels)}"
        fitting = [
            state
            for state in self.may_be
            if all(b"".join(state[label]) == found[label] for label in found)
        ]
        if not fitting:
            first, last = _told(self.may_be[0], found), _told(self.may_be[-1], found)
            return first if len(self.may_be) == 1 else f"either {first}; or {last}"
        self.may_be = fitting
        return ""


@dataclass(slots=True)
class Model:
    """All disks now, and all points there are."""

    disks: dict[str, Disk]
    points: dict[tuple[str, int], Point] = field(default_factory=dict)
    _seen: list[State] = field(default_factory=list)

    def state(self) -> State:
        return {label: disk.content for label, disk in self.disks.items()}

    def begin(self) -> None:
        """From here on an instant may be: every state counts until the next `begin`."""
        self._seen = [self.state()]

    def changed(self) -> None:
        self._seen.append(self.state())

    def states(self) -> list[State]:
        return list(self._seen)

    def snapshots(self) -> Sequence[str]:
        return sorted({id for id, _ in self.points})

    def forget(self, ids: set[str]) -> None:
        self.points = {key: one for key, one in self.points.items() if key[0] not in ids}
