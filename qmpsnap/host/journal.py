"""Debts on local disk: the only place that writes down what we owe a VM before we owe it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from qmpsnap import private
from qmpsnap.errors import UNREADABLE, LocalFailed
from qmpsnap.host.filesystem import sync_dir
from qmpsnap.ids import is_snapshot_id

_SUFFIX = ".jsonl"


@dataclass(frozen=True, slots=True)
class Record:
    """A debt that was never struck out: its lines, oldest first; the first holds its facts.

    *torn* says that the file ends in a line that cannot be read. Its writer died in the middle
    of it, so what that line announced was not begun.
    """

    id: str
    lines: list[dict[str, Any]]
    torn: bool


@dataclass(slots=True)
class Entry:
    """A debt under way. Each line is on disk before the call that writes it returns."""

    path: Path
    _size: int = field(default=0)

    @property
    def id(self) -> str:
        """The snapshot's ID that it is known by."""
        return self.path.name.removesuffix(_SUFFIX)

    def note(self, phase: str, **facts: object) -> None:
        """Write down that *phase* is about to begin. Raises LocalFailed: then do not begin it."""
        self._append({"phase": phase, **facts})

    def add(self, **facts: object) -> None:
        """Write down something that is no phase of its own. Raises LocalFailed."""
        self._append(facts)

    def read(self) -> Record:
        """All that was written down so far. Raises LocalFailed."""
        return _read(self.path, self.id)

    def close(self) -> None:
        """Strike the debt out: it is paid. A second call does nothing. Raises LocalFailed."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as failed:
            raise LocalFailed(f"{self.path}: {failed.strerror}") from failed
        sync_dir(self.path.parent)

    def _append(self, line: Mapping[str, object], flags: int = 0) -> None:
        content = msgspec.json.encode(dict(line)) + b"\n"
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | flags, 0o600)
            try:
                # Never O_APPEND: a line that a full disk cut short is written over
                written = os.pwrite(descriptor, content, self._size)
                os.ftruncate(descriptor, self._size + written)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as failed:
            raise LocalFailed(f"{self.path}: {failed.strerror}") from failed
        if written != len(content):
            raise LocalFailed(f"{self.path}: the disk took {written} of {len(content)} bytes")
        self._size += written


@dataclass(frozen=True, slots=True)
class Journal:
    """The debts of one VM, a file each in *folder*."""

    folder: Path

    def open_entry(self, id: str, facts: Mapping[str, object]) -> Entry:
        """Write down a new debt under the snapshot ID *id*; it is durable on return.

        Raises LocalFailed, also when *id* has an entry already, and ValueError for a foreign id.
        """
        entry = Entry(self._path(id))
        try:
            private.folders(self.folder)
        except OSError as failed:
            raise LocalFailed(f"{self.folder}: {failed.strerror}") from failed
        entry._append(facts, os.O_CREAT | os.O_EXCL)
        sync_dir(self.folder)
        sync_dir(self.folder.parent)
        return entry

    def reopen(self, id: str) -> Entry:
        """The entry of a pending record, to go on with it; a torn last line is written over.

        Raises LocalFailed when there is no such entry.
        """
        path = self._path(id)
        return Entry(path, len(_whole_lines(path)))

    def _path(self, id: str) -> Path:
        if not is_snapshot_id(id):
            raise ValueError(f"not a snapshot id: {id!r}")
        return self.folder / f"{id}{_SUFFIX}"


def pending(folder: Path) -> list[Record]:
    """The debts in *folder*, oldest first; none if it is not there, foreign files left out.

    Raises LocalFailed.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as failed:
        raise LocalFailed(f"{folder}: {failed.strerror}") from failed
    ids = [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]
    return [_read(folder / f"{id}{_SUFFIX}", id) for id in ids if is_snapshot_id(id)]


def _read(path: Path, id: str) -> Record:
    content = _whole_lines(path)
    lines = [msgspec.json.decode(line, type=dict[str, Any]) for line in content.splitlines()]
    return Record(id, lines, torn=path.stat().st_size != len(content))


def _whole_lines(path: Path) -> bytes:
    """The part of *path* up to the first line that is cut short or is no JSON object."""
    try:
        content = path.read_bytes()
    except OSError as failed:
        raise LocalFailed(f"{path}: {failed.strerror}") from failed
    whole = 0
    for line in content.splitlines(keepends=True):
        try:
            msgspec.json.decode(line, type=dict[str, Any])
        except UNREADABLE:
            break
        if not line.endswith(b"\n"):
            break
        whole += len(line)
    return content[:whole]
