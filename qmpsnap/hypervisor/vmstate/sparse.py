"""Holes in files: the only place that makes them and looks for them."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator

_libc = ctypes.CDLL(None, use_errno=True)
_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
_CANNOT = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ESPIPE, errno.ENODEV}


def punch(fd: int, start: int, length: int) -> bool:
    """Make a hole of *length* bytes; False if this file system cannot. Raises OSError."""
    offset, size = ctypes.c_int64(start), ctypes.c_int64(length)
    while _libc.fallocate(fd, _PUNCH, offset, size) != 0:
        number = ctypes.get_errno()
        if number in _CANNOT:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True


def extents(fd: int, size: int, grain: int, step: int) -> Iterator[tuple[int, int, bool]]:
    """All of a file of *size* bytes: (start, end, may be data), in multiples of *grain*.

    What may have data is *step* bytes at most, and a hole in it is not looked for: where data and
    holes alternate, reading the zeros is a hundred times faster than asking. Raises OSError.
    """
    at = 0
    while at < size:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as failed:
            if failed.errno != errno.ENXIO:  # nothing but a hole to the end
                raise
            data = size
        start = max(at, data // grain * grain)
        if start > at:
            yield at, start, False
        at = min(start + step, size)
        if at > start:
            yield start, at, True
