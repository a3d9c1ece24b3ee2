"""Folders and files for their owner only: the one place that makes either with its parents."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path


def folders(path: Path) -> None:
    """Make *path* and what is missing above it, each 0700 under any umask. Raises OSError.

    `Path.mkdir` gives its mode to the last one only, and the umask's to the others.
    """
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for one in reversed(missing):
        with suppress(FileExistsError):
            one.mkdir(0o700)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def opener(path: str, flags: int) -> int:
    """For `open`: a new file is 0600."""
    return os.open(path, flags, 0o600)
