"""Memory of a process in files that are memory: the only place that tells how much is to come.

Such a file is sparse. Who reads a hole of it through a mapping takes a page, and is killed (SIGBUS)
when the file system has none.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.errors import LocalFailed
from qmpsnap.host import filesystem, load


@dataclass(frozen=True, slots=True)
class Untouched:
    """What is mapped of files in *place* and was never used, and what may be used, in bytes."""

    place: str
    untouched_bytes: int
    free_bytes: int


def untouched(pid: int) -> list[Untouched]:
    """One for each file system; those that we may not see are left out. Raises LocalFailed."""
    holes: dict[int, int] = {}
    places: dict[int, tuple[str, int]] = {}
    mapped = set(_mapped(pid))
    host = load.usage()
    free = host.memory_available_bytes + host.swap_free_bytes
    seen = set()
    for path in _open(pid):
        with suppress(OSError):
            status = path.stat()
            key = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
            if key not in mapped or key in seen or not stat.S_ISREG(status.st_mode):
                continue
            if not filesystem.in_memory(path):
                continue
            seen.add(key)
            room, named = os.statvfs(path), path.readlink().parent
            # a memfd has no limit but the host's
            limited = room.f_blocks != 0
            left = min(free, room.f_bavail * room.f_frsize) if limited else free
            places[status.st_dev] = str(named) if limited else "memfd", left
            hole = max(0, status.st_size - status.st_blocks * 512)
            holes[status.st_dev] = holes.get(status.st_dev, 0) + hole
    return [Untouched(places[one][0], hole, places[one][1]) for one, hole in holes.items()]


def _mapped(pid: int) -> Iterator[tuple[int, int, int]]:
    try:
        rows = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError as failed:
        raise LocalFailed(f"/proc/{pid}/maps: {failed.strerror}") from failed
    for row in rows:
        _, _, _, device, inode, *_ = row.split(maxsplit=5)
        major, minor = device.split(":")
        if inode != "0":
            yield int(major, 16), int(minor, 16), int(inode)


def _open(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError as failed:
        raise LocalFailed(f"/proc/{pid}/fd: {failed.strerror}") from failed
