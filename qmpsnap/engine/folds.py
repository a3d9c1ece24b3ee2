"""What the journal says of overlays that were on their way back into the disks beneath."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from qmpsnap.errors import UNREADABLE, LocalFailed, ManifestError
from qmpsnap.host.journal import Entry, Record
from qmpsnap.hypervisor.block.fold import Stage, Told

log = logging.getLogger(__name__)


class _Fold(msgspec.Struct, frozen=True):
    """A line of the journal: how far the overlay *path* has come."""

    fold: Stage
    path: str


class _Ended(msgspec.Struct, frozen=True):
    """A line of the journal: QEMU was seen to have ended, nanoseconds since the epoch."""

    ended: int


def is_note(line: Mapping[str, object]) -> bool:
    """Whether a line of the journal tells of folds, and not of a phase."""
    return "fold" in line or "ended" in line


def noting(entry: Entry, path: str) -> Told:
    """What `fold` is to call for the overlay *path*: each stage is durable before it is true.

    Where not even the first note is possible none is made, and what `offline` then cannot tell is
    left to somebody who looks: a full disk must not keep an overlay from going.
    """
    silent = False

    async def told(stage: Stage) -> None:
        nonlocal silent
        if silent:
            return
        try:
            await asyncio.to_thread(entry.add, fold=stage.value, path=path)
        except LocalFailed as failed:
            if stage is not Stage.FOLDED and await asyncio.to_thread(_is_noted, entry, path):
                raise  # what is noted would be wrong from here on
            silent = True
            log.warning("%s", failed)

    return told


def _is_noted(entry: Entry, path: str) -> bool:
    return stage(entry.read(), Path(path)) is not None


async def ended(entry: Entry) -> None:
    """Note that QEMU has ended just now: who writes to its disks later was not the fold."""
    try:
        await asyncio.to_thread(entry.add, ended=time.time_ns())
    except LocalFailed as failed:
        log.warning("%s", failed)


def stage(record: Record, path: Path) -> Stage | None:
    """How far the fold of the overlay *path* had come; None if none was noted.

    Raises ManifestError.
    """
    lines = [line for line in record.lines if "fold" in line]
    try:
        found = msgspec.convert(lines, list[_Fold])
    except UNREADABLE as odd:
        raise ManifestError(f"the journal's entry {record.id}: {odd}") from odd
    return next((one.fold for one in reversed(found) if one.path == str(path)), None)


def seen_ended(record: Record) -> int | None:
    """When QEMU was seen to have ended, in nanoseconds since the epoch; None if nobody saw it.

    Raises ManifestError.
    """
    lines = [line for line in record.lines if "ended" in line]
    try:
        found = msgspec.convert(lines, list[_Ended])
    except UNREADABLE as odd:
        raise ManifestError(f"the journal's entry {record.id}: {odd}") from odd
    return found[0].ended if found else None
