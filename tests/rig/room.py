"""A file system of its own with little room: the only place where the tests mount memory."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def room(path: Path, size: int | str) -> Iterator[Path]:
    """A tmpfs of *size* (bytes, or `4M`) at *path*, which is made if need be. Needs root."""
    if os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("only root can mount")
        pytest.skip("only root can mount")
    path.mkdir(parents=True, exist_ok=True)
    options = f"size={size},mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", path], check=True)
    try:
        yield path
    finally:
        # lazily: after a failure somebody may still be at it, and the next test is none of theirs
        subprocess.run(["umount", "--lazy", path], check=True)


def filled(folder: Path, *, leave: int) -> Path:
    """Somebody else's file, which takes all but *leave* bytes of *folder*'s file system."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        while (size := os.statvfs(folder).f_bavail * 4096 - leave) > 0:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
            except OSError as full:  # a copy that is under way was quicker
                if full.errno != errno.ENOSPC:
                    raise
    return filler
