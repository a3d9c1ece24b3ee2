"""The only place that reads what a JSON file of ours says of itself: its format and its version."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from qmpsnap.errors import UNREADABLE, ManifestError


class _Head(msgspec.Struct, frozen=True):
    format: str
    version: int


def version_of(content: bytes | str, format: str, newest: int, path: Path | str) -> int:
    """The version of *content*, which the file *path* holds.

    Raises ManifestError, naming *path*, for what is no such file, or of a version after *newest*.
    """
    with readable(content, path):
        head = msgspec.json.decode(content, type=_Head)
    if head.format != format:
        raise ManifestError(f"{path}: is of the format {head.format!r}, not {format!r}")
    if head.version > newest:
        raise ManifestError(
            f"{path}: is {format} version {head.version}; this qmpsnap knows up to {newest}",
            hint="use the qmpsnap that wrote it, or a newer one",
        )
    return head.version


@contextmanager
def readable(content: bytes | str, path: Path | str) -> Iterator[None]:
    """What is wrong with *content* becomes a ManifestError that names *path* and `$.key`."""
    try:
        yield
    except UNREADABLE as failed:
        raise ManifestError(f"{path}: {_in_words(failed, content)}") from failed


def _in_words(failed: Exception, content: bytes | str) -> str:
    if not content.strip():
        return "is empty"
    if "truncated" in str(failed):
        return f"is cut short after {len(content)} bytes"
    return str(failed)
