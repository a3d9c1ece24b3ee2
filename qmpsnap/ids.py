"""The names we give: snapshot IDs, and what is derived from them in QEMU and on disk."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import NewType

NodeName = NewType("NodeName", str)
"""A vertex of QEMU's block graph: at most 31 characters, letter first (or QEMU's `#block123`)."""

_SHAPE = re.compile(r"[0-9]{8}T[0-9]{9}Z")  # not \d: it takes the digits of all scripts
_LATEST = datetime(9999, 12, 31, tzinfo=UTC)  # behind it there is no next one
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LABEL_LENGTH = 11


@dataclass(frozen=True, slots=True, order=True)
class SnapshotId:
    """What both halves of a snapshot are called: a UTC moment to the millisecond.

    19 characters, `20261122T165057123Z`, so that sorting the text sorts the time.
    """

    text: str

    def __post_init__(self) -> None:
        if not _is_moment(self.text):
            raise ValueError(f"not a snapshot id: {self.text!r}")

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of(cls, moment: datetime) -> SnapshotId:
        """The ID of *moment* (aware); digits below the millisecond are cut off."""
        utc = moment.astimezone(UTC)
        return cls(f"{utc:%Y%m%dT%H%M%S}{utc.microsecond // 1000:03d}Z")

    @classmethod
    def after(cls, last: SnapshotId | None, moment: datetime) -> SnapshotId:
        """The ID of *moment*, or the next one after *last* if the clock jumped back."""
        new = cls.of(moment)
        if last is not None and new <= last:
            new = cls.of(last.taken() + timedelta(milliseconds=1))
        return new

    def taken(self) -> datetime:
        """The moment that the ID spells, in UTC."""
        return _moment(self.text)

    def overlay_of(self, label: str) -> NodeName:
        """The node name of the overlay that this snapshot puts on the disk *label*."""
        return NodeName(f"{label}-{self.text}")


def is_snapshot_id(text: str) -> bool:
    """Whether *text* is a snapshot ID, and not a foreign name beside our files."""
    return _is_moment(text)


# each path of a snapshot is made from its ID, and `list` makes thousands of paths
@lru_cache(maxsize=4096)
def _is_moment(text: str) -> bool:
    try:
        return _SHAPE.fullmatch(text) is not None and _moment(text) < _LATEST
    except ValueError:
        return False


def _moment(text: str) -> datetime:
    day, time = text[:8], text[9:18]
    return datetime(
        *(int(day[:4]), int(day[4:6]), int(day[6:])),
        *(int(time[:2]), int(time[2:4]), int(time[4:6]), int(time[6:]) * 1000),
        tzinfo=UTC,
    )


def is_vm_name(text: str) -> bool:
    """Whether *text* may name a VM: it becomes a folder on both roots."""
    return _NAME.fullmatch(text) is not None and not is_snapshot_id(text)


def disk_labels(names: list[str]) -> list[str]:
    """A label for each disk: at most 11 characters of [a-z0-9_], letter first, no two alike.

    A name that fits is its own label; one that was shortened or cleaned ends in four digits of
    its hash, so that the label depends on the name alone, not on its neighbours.
    """
    return [_label(name) for name in names]


def _label(name: str) -> str:
    clean = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if clean == name and len(clean) <= _LABEL_LENGTH and clean[:1].isalpha():
        return clean
    digits = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:4]
    stem = clean if clean[:1].isalpha() else f"d{clean}"
    return f"{stem[: _LABEL_LENGTH - 4].rstrip('_')}{digits}"
