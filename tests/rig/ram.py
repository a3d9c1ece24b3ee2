"""RAM for tests: page images as a guest leaves them, small, and reproducible."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path

PAGE = 4096


def page(seed: object) -> bytes:
    """A page that is not zeros, and like no other one; it can be compressed a little."""
    return random.Random(repr(seed)).randbytes(PAGE // 2) + b"\1" * (PAGE // 2)


def write_image(path: Path, pages: Mapping[int, bytes], size: int) -> tuple[str, Path, int]:
    """A page image of *size* bytes, as `chunking.keep` takes it; the block is called as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.ftruncate(descriptor, size)
    for number, content in pages.items():
        os.pwrite(descriptor, content, number * PAGE)
    os.close(descriptor)
    return path.name, path, size


def holes(path: Path) -> set[int]:
    """The pages that take no room."""
    size, at, found = path.stat().st_size, 0, set()
    with path.open("rb") as file:
        while at < size:
            try:
                data = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                data = size
            found |= set(range(at // PAGE, data // PAGE))
            at = os.lseek(file.fileno(), data, os.SEEK_HOLE) if data < size else size
    return found
