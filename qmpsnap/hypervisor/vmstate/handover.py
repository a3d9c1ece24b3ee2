"""What the source of a postcopy migration says: the only place that spells QEMU's commands.

Facts: QEMU's migration/savevm.c, and runs of 7.2, 10.0 and 11.1.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.errors import DamagedData, LocalFailed, StreamUnknown
from qmpsnap.hypervisor.vmstate import description, records, stream
from qmpsnap.hypervisor.vmstate.pages import Marks
from qmpsnap.hypervisor.vmstate.records import PAGE, number
from qmpsnap.hypervisor.vmstate.walk import Batch
from qmpsnap.hypervisor.vmstate.window import Window

_OPEN_RETURN_PATH = 1
_PING = 2
_POSTCOPY_ADVISE = 3
_POSTCOPY_LISTEN = 4
_POSTCOPY_RUN = 5
_POSTCOPY_RAM_DISCARD = 6
_PACKAGED = 7
_POSTCOPY_RESUME = 9
_RECV_BITMAP = 10

LOADED = 3  # the ping that is answered once all devices are loaded
_MOST_PACKED = (1 << 32) - 1  # bytes
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Handover:
    """A small stream and where its parts are: [*parts*) the pages of the small blocks, [*devices*).

    *large* has the blocks whose pages are not in it, and the bytes of each.
    """

    path: Path
    opening: stream.Opening
    large: Mapping[str, int]
    parts: tuple[int, int]
    devices: tuple[int, int]

    def head(self) -> Iterator[bytes]:
        """Header to package: all that QEMU has to have before it asks for pages.

        Raises LocalFailed.
        """
        raw, start = self.opening.raw, _start_of_ram(self.opening)
        yield raw[:start]
        yield _command(_OPEN_RETURN_PATH)
        # the sizes of the host's pages that its blocks are made of, and the guest's
        yield _command(_POSTCOPY_ADVISE, number(PAGE, 8) + number(PAGE, 8))
        yield raw[start:]
        yield from self._pieces(*self.parts)
        # Without any discard QEMU's state machine goes from "listening" back to "discarding", and
        # what follows is loaded as if no guest waited for it (7.2 to 11.1: it stands still then).
        for block, size in self.large.items():
            yield _command(_POSTCOPY_RAM_DISCARD, b"\0%b\0" % _name(block) + _range(0, size))
        before, behind = _command(_POSTCOPY_LISTEN), _ping(LOADED) + _command(_POSTCOPY_RUN)
        start, end = self.devices
        yield _command(_PACKAGED, number(len(before) + end - start + len(behind), 4))
        yield before
        yield from self._pieces(start, end)
        yield behind

    def end(self) -> bytes:
        """What follows the last page."""
        ram = self.opening.ram
        return section(ram, last=True) + bytes([records.END_OF_STREAM])

    def _pieces(self, at: int, end: int) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                file.seek(at)
                while at < end:
                    piece = file.read(min(_PIECE, end - at))
                    if not piece:
                        raise DamagedData(f"{self.path} was cut short at {at}")
                    yield piece
                    at += len(piece)
        except OSError as failed:
            raise LocalFailed(f"{self.path}: {failed.strerror}") from failed


def read(path: Path, large: Collection[str]) -> Handover:
    """Look through the small stream at *path*, to which the pages of the blocks *large* belong.

    Raises StreamUnknown, DamagedData, LocalFailed.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file.fileno(), large)
    except OSError as failed:
        raise LocalFailed(f"{path}: {failed.strerror}") from failed


def _read(path: Path, fd: int, large: Collection[str]) -> Handover:
    window = Window(fd)
    opening = stream.opening(window)
    begin = window.offset
    seen = [Marks(size // PAGE) for _, size in opening.blocks]

    def see(batch: Batch) -> None:
        seen[batch.block].add(batch.pages)

    closing = stream.ram(window, opening, see)
    devices = (window.offset, description.read(fd).last)
    between = os.pread(fd, devices[0] - closing.parts_end, closing.parts_end)
    if between.removeprefix(records.SWITCHOVER) not in {b"", section(opening.ram, last=True)}:
        raise StreamUnknown(f"{path}: the RAM's last section has pages")
    if devices[1] - devices[0] > _MOST_PACKED - 64:
        raise StreamUnknown(f"{path}: more devices than QEMU takes in one piece")
    sizes = dict(opening.blocks)
    if strange := [block for block in large if block not in sizes]:
        raise DamagedData(f"{path}: there is no RAM block {', '.join(strange)}")
    for (block, size), pages in zip(opening.blocks, seen, strict=True):
        if len(pages) != (0 if block in large else size // PAGE):
            raise DamagedData(f"{path}: {len(pages)} pages of RAM block {block} are in the stream")
    return Handover(
        path,
        opening,
        {block: size for block, size in opening.blocks if block in large},
        (begin, closing.parts_end),
        devices,
    )


def received(block: str) -> bytes:
    """Asks which pages of *block* QEMU has, once it waits for a source that was lost."""
    return _command(_RECV_BITMAP, _name(block))


def resume() -> bytes:
    """Tells a QEMU that lost its source that there is one again."""
    return _command(_POSTCOPY_RESUME)


def section(ram: int, *content: bytes | memoryview, last: bool = False) -> bytes:
    """A section of the RAM, whose number is *ram*, with the records *content*."""
    kind = bytes([records.END if last else records.PART])
    end = number(records.EOS, 8)
    return b"".join((kind, number(ram, 4), *content, end, records.footer(ram)))


def _start_of_ram(opening: stream.Opening) -> int:
    """Where in `opening.raw` the RAM's first section begins."""
    blocks = sum(1 + len(block.encode()) + 8 for block, _ in opening.blocks)
    header, list_end, footer = 1 + 4 + 4 + 4 + 4, 8 + 8, 1 + 4
    return len(opening.raw) - (header + blocks + list_end + footer)


def _command(which: int, payload: bytes = b"") -> bytes:
    return b"%c%b%b%b" % (records.COMMAND, number(which, 2), number(len(payload), 2), payload)


def _ping(value: int) -> bytes:
    return _command(_PING, number(value, 4))


def _name(block: str) -> bytes:
    return b"%c%b" % (len(block.encode()), block.encode())


def _range(start: int, length: int) -> bytes:
    return number(start, 8) + number(length, 8)
