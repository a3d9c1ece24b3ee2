"""A migration stream put together again from a small stream and page images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from qmpsnap.errors import DamagedData
from qmpsnap.hypervisor.vmstate import records
from qmpsnap.hypervisor.vmstate import stream as streams
from qmpsnap.hypervisor.vmstate.outlet import Outlet, told
from qmpsnap.hypervisor.vmstate.pages import Recorder
from qmpsnap.hypervisor.vmstate.window import Progress, Window


def join(
    stream: Path, images: Mapping[str, Path], fd: int, *, on_progress: Progress | None = None
) -> int:
    """Write the small *stream* into *fd* with all pages of *images*, block -> page image, in it.

    A large block that has no image stays as it is, without pages. Returns the bytes written.
    *on_progress* is told (bytes of images done, bytes of them in all).

    Raises DamagedData (the small stream, or an image that is not of its block's size),
    StreamUnknown, LocalFailed (a file cannot be read, or *fd* takes no more); as a rule before
    the first byte.
    """
    outlet = Outlet(fd, f"descriptor {fd}")
    with ExitStack() as opened:
        small = _opened(stream, opened)
        window = Window(small)
        start = streams.opening(window)
        closing = streams.ram(window, start, lambda batch: None)
        streams.devices(small, window.offset, 0)
        ready = _ready(images, dict(start.blocks), opened)
        window = Window(small)
        streams.pour(window, outlet.put, closing.parts_end)
        done, total = 0, sum(size for _, _, size in ready)
        for block, image, size in ready:
            with outlet.section(records.PART, start.ram), told(images[block]):
                for upto in Recorder(block, outlet.put).all(image, size):
                    if on_progress is not None:
                        on_progress(done + upto, total)
            done += size
        streams.pour(window, outlet.put)
    return outlet.bytes


def _opened(path: Path, opened: ExitStack) -> int:
    with told(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    opened.callback(os.close, fd)
    return fd


def _ready(
    images: Mapping[str, Path], blocks: Mapping[str, int], opened: ExitStack
) -> list[tuple[str, int, int]]:
    """Block, descriptor and bytes of each image, in the order of *blocks*."""
    if strange := images.keys() - blocks.keys():
        raise DamagedData(f"the machine has no RAM block {', '.join(sorted(strange))}")
    ready = []
    for block in (block for block in blocks if block in images):
        path, size = images[block], blocks[block]
        fd = _opened(path, opened)
        if (found := os.fstat(fd).st_size) != size:
            raise DamagedData(f"{path}: has {found} bytes, the RAM block {block} {size}")
        ready.append((block, fd, size))
    return ready
