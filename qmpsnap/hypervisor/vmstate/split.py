"""A migration stream taken apart: its large RAM blocks as page images, all else as a small stream.

The small stream is one that QEMU takes by itself, for a machine whose RAM is there already.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.hypervisor.vmstate import records, stream
from qmpsnap.hypervisor.vmstate.outlet import Outlet, told
from qmpsnap.hypervisor.vmstate.pages import Marks, PageFile, Recorder
from qmpsnap.hypervisor.vmstate.records import PAGE
from qmpsnap.hypervisor.vmstate.stream import Contents, Opening
from qmpsnap.hypervisor.vmstate.walk import Batch
from qmpsnap.hypervisor.vmstate.window import SIZE, Progress, Window

STREAM = "stream"
Make = Callable[[Sequence[int]], Sequence[Path]]
"""Makes the files of the page images, which have these sizes in bytes, and are all zeros. One that
has no holes gets none."""


@dataclass(frozen=True, slots=True)
class Image:
    """The page image of a large block: a sparse file of the block's *bytes*, zero pages holes."""

    block: str
    path: Path
    bytes: int
    stored_pages: int


@dataclass(frozen=True, slots=True)
class Split:
    """The small *stream*, *images* in the order of the blocks, and what the whole stream has."""

    stream: Path
    images: tuple[Image, ...]
    contents: Contents


def split(
    source: int,
    folder: Path,
    *,
    above: int = 16 << 20,
    make: Make | None = None,
    forget: bool = False,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    window_bytes: int = SIZE,
) -> Split:
    """Take the stream of the descriptor *source* apart, into new files of *folder*.

    They are `stream`, and `0.pages`, `1.pages`, … for the blocks of more than *above* bytes, or
    the files that *make* makes for these, anywhere, before anything is forgotten; none is synced.
    *source* is a regular file, which is read from its start, a pipe or a socket. With *forget* a
    regular file, open for writing too, is given back to the file system as it is read, after a
    first reading that has found it sound: only a full disk then loses it.
    *on_progress* is told (bytes read, bytes in all or 0); *cancelled* is asked now and then.

    Raises StreamUnknown (keep the stream whole), DamagedData, LocalFailed, Cancelled; then nothing
    is left in *folder*.
    """
    if forget:
        stream.examine(source, cancelled=cancelled, window_bytes=window_bytes)
    window = Window(
        source, size=window_bytes, forget=forget, on_progress=on_progress, cancelled=cancelled
    )
    with _Files(folder) as files:
        start = stream.opening(window)
        blocks = _Blocks(start, files, above, make or files.hollow)
        closing = stream.ram(window, start, lambda batch: blocks.put(batch, window.buffer))
        tail = window.offset
        whole, fd = files.new(STREAM)
        outlet = Outlet(fd, whole)
        outlet.put(start.raw)
        blocks.put_small(outlet)
        if closing.switchover:
            outlet.put(records.SWITCHOVER)
        if closing.ended:
            with outlet.section(records.END, start.ram):
                pass  # its pages are among the others
        begin = outlet.bytes
        stream.pour(window, outlet.put)
        sections = stream.devices(fd, begin, tail - begin)
        found = stream.contents(start, closing, blocks.files, sections, tail, window.offset)
        images = tuple(
            Image(block.name, path, block.bytes, block.stored_pages)
            for block, path in zip(found.blocks, blocks.paths, strict=True)
            if path is not None
        )
        files.keep()
    return Split(whole, images, found)


class _Files:
    """New files of *folder*, which go again unless they are kept; open for the block."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._open = folder, ExitStack()
        self._made: list[Path] = []

    def new(self, name: str) -> tuple[Path, int]:
        """Raises LocalFailed."""
        path = self.folder / name
        with told(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._open.callback(os.close, fd)
        self._made.append(path)
        return path, fd

    def hollow(self, sizes: Sequence[int]) -> list[Path]:
        """Page images of *sizes* in the folder. Raises LocalFailed."""
        paths = []
        for number, size in enumerate(sizes):
            path, fd = self.new(f"{number}.pages")
            with told(path):
                os.ftruncate(fd, size)
            paths.append(path)
        return paths

    def opened(self, path: Path, size: int) -> tuple[int, bool]:
        """*path*, made for us, and whether it has no holes. Raises LocalFailed."""
        self._made.append(path)
        with told(path):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._open.callback(os.close, fd)
            return fd, os.fstat(fd).st_blocks * 512 >= size

    def unnamed(self) -> int:
        """A file that is gone once it is closed. Raises LocalFailed."""
        with told(self.folder):
            return self._open.enter_context(
                tempfile.TemporaryFile(dir=self.folder, buffering=0)
            ).fileno()

    def keep(self) -> None:
        self._made.clear()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        for path in self._made:
            path.unlink(missing_ok=True)


class _Blocks:
    """Where the pages of each block go: an image of its own, or a place in one file for the small
    ones, whose pages are also marked, as those that QEMU did not send are not to be sent again."""

    def __init__(self, start: Opening, files: _Files, above: int, make: Make) -> None:
        self._ram = start.ram
        self._names = [name for name, _ in start.blocks]
        self.files: list[PageFile] = []
        self.paths: list[Path | None] = []
        self._seen: dict[int, Marks] = {}
        self._small = files.unnamed()
        self._folder = files.folder
        end, images = 0, iter(make([size for _, size in start.blocks if size > above]))
        for number, (_, size) in enumerate(start.blocks):
            if size > above:
                path = next(images)
                fd, whole = files.opened(path, size)
                self.files.append(PageFile(fd, size // PAGE, whole=whole))
                self.paths.append(path)
            else:
                self.files.append(PageFile(self._small, size // PAGE, end))
                self.paths.append(None)
                self._seen[number] = Marks(size // PAGE)
                end += size

    def put(self, batch: Batch, buffer: bytearray) -> None:
        """Raises LocalFailed."""
        if (seen := self._seen.get(batch.block)) is not None:
            seen.add(batch.pages)
        with told(self.paths[batch.block] or self._folder):
            self.files[batch.block].put(batch.pages, batch.places, buffer)

    def put_small(self, outlet: Outlet) -> None:
        """One PART of the RAM with the pages of the small blocks. Raises LocalFailed."""
        with outlet.section(records.PART, self._ram), told(self._folder):
            for number, seen in self._seen.items():
                recorder = Recorder(self._names[number], outlet.put)
                for pages in seen.runs():
                    recorder.some(pages, self.files[number])
