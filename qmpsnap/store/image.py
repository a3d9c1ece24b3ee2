"""Frozen images: the only place that tells whether a base is still the file that was frozen."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qmpsnap.errors import LocalFailed
from qmpsnap.store.files import digest_bytes, told
from qmpsnap.store.manifest import Image

_HEADER = 64 << 10


def examine_image(path: Path, format: str, virtual_size: int, *, key: str | None = None) -> Image:
    """The file (or block device) *path* as it is now; *virtual_size* in bytes is what QEMU says.

    *key*: the ID of the key that it is encrypted with. Raises LocalFailed.
    """
    with told(path, LocalFailed):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            block = stat.S_ISBLK(status.st_mode)
            if not block and not stat.S_ISREG(status.st_mode):
                raise LocalFailed(f"{path}: neither a file nor a block device")
            header = os.pread(descriptor, _HEADER, 0)
            size = os.lseek(descriptor, 0, os.SEEK_END)
        finally:
            os.close(descriptor)
    # A device's node is made anew at each boot: its own inode and time say nothing of the data
    return Image(
        path=str(path.absolute()),
        format=format,
        virtual_size_bytes=virtual_size,
        file_bytes=size,
        device=status.st_rdev if block else status.st_dev,
        inode=0 if block else status.st_ino,
        mtime_ns=0 if block else status.st_mtime_ns,
        header_blake3=digest_bytes(header),
        key=key,
    )


def changed(image: Image) -> str | None:
    """What differs from when the image was frozen, in words; None when it is the same file.

    The number of the device is not compared: it may change at each boot. Raises LocalFailed when
    the file is there and cannot be read.
    """
    path = Path(image.path)
    with told(path, LocalFailed):
        if not path.exists():
            return f"{path} is missing"
    now = examine_image(path, image.format, image.virtual_size_bytes, key=image.key)
    if now.file_bytes != image.file_bytes:
        return f"{path} had {image.file_bytes} bytes, and has {now.file_bytes}"
    if now.inode != image.inode:
        return f"{path} is another file (inode {now.inode}, was {image.inode})"
    if now.header_blake3 != image.header_blake3:
        return f"{path} has another header"
    if now.mtime_ns != image.mtime_ns:
        return f"{path} was written to after it was frozen"
    return None
