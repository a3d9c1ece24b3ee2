"""A migration stream from its beginning to its end: the only place that knows the order in it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from qmpsnap.errors import StreamUnknown
from qmpsnap.hypervisor.vmstate import description, records
from qmpsnap.hypervisor.vmstate.description import Section
from qmpsnap.hypervisor.vmstate.outlet import Outlet, told
from qmpsnap.hypervisor.vmstate.pages import PageFile
from qmpsnap.hypervisor.vmstate.records import PAGE, damaged
from qmpsnap.hypervisor.vmstate.walk import Batch, Walker
from qmpsnap.hypervisor.vmstate.window import SIZE, Progress, Window

_MOST_BLOCKS = 4096  # their list fits into a window
_MOST_RAM = 1 << 46  # bytes; it bounds what is kept of each page
_IGNORABLE = {"configuration/uuid": 16}  # subsections of the configuration, and their bytes


@dataclass(frozen=True, slots=True)
class Block:
    """A RAM block: its bytes, and its pages with and without content."""

    name: str
    bytes: int
    stored_pages: int
    zero_pages: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What a stream of *bytes* has: RAM *blocks* in its order, then the devices' *sections*.

    *machine* is the machine type. *ended*: the RAM has a section END; a background save has none.
    """

    machine: str
    bytes: int
    ram_bytes: int
    ended: bool
    blocks: tuple[Block, ...]
    sections: tuple[Section, ...]


@dataclass(frozen=True, slots=True)
class Opening:
    """What comes before the first page, and the bytes of it as they stand, *raw*."""

    raw: bytes
    machine: str
    ram: int
    blocks: tuple[tuple[str, int], ...]


@dataclass(slots=True)
class Closing:
    """The end of the RAM: where its last PART ends, and what follows up to the first device."""

    parts_end: int
    switchover: bool = False
    ended: bool = False


def opening(window: Window) -> Opening:
    """Read header, configuration and the list of RAM blocks.

    Raises StreamUnknown, DamagedData, LocalFailed.
    """
    raw = _Raw(window)
    window.expect(records.MAGIC, "the beginning of a migration stream")
    machine = _configuration(window)
    if window.peek(1) != bytes([records.START]):
        _refuse_section(window)
    window.pos += 1
    ram, name = window.number(4), window.name()
    if name != "ram":
        raise StreamUnknown(f"a section {name!r} that is no RAM comes before it")
    window.number(4)
    if (version := window.number(4)) != records.RAM_VERSION:
        raise StreamUnknown(f"the RAM section is of version {version}")
    blocks = _blocks(window)
    window.expect(records.number(records.EOS, 8), "the end of the list of RAM blocks")
    window.expect(records.footer(ram), "the footer of the RAM's first section")
    return Opening(raw.taken(), machine, ram, blocks)


class _Raw:
    """The bytes that *window* passes from now on; it must not be moved."""

    def __init__(self, window: Window) -> None:
        window.fill()
        self._window, self._start, self._offset = window, window.pos, window.offset

    def taken(self) -> bytes:
        window = self._window
        assert window.offset - window.pos == self._offset - self._start
        return bytes(window.buffer[self._start : window.pos])


def _configuration(window: Window) -> str:
    if not window.has(1):
        raise window.cut()
    if window.peek(1) != bytes([records.CONFIGURATION]):
        raise StreamUnknown("the migration stream has no configuration: an old machine type")
    window.pos += 1
    where = window.offset
    length = window.number(4)
    if length > 255:
        raise damaged(f"a machine type of {length} characters", where)
    machine = window.take(length).decode(errors="replace")
    while window.peek(1) == bytes([records.SUBSECTION]):
        window.pos += 1
        name = window.name()
        window.number(4)  # its version
        if name == "configuration/capabilities":
            used = [window.name() for _ in range(min(window.number(4), 64))]
            if used:
                raise StreamUnknown(f"the migration used {', '.join(used)}")
        elif name == "configuration/target-page-bits":
            if (bits := window.number(4)) != PAGE.bit_length() - 1:
                raise StreamUnknown(f"the guest has pages of {1 << min(bits, 63)} bytes")
        elif name in _IGNORABLE:
            window.take(_IGNORABLE[name])
        else:
            raise StreamUnknown(f"the migration stream has {name!r}")
    return machine


def _blocks(window: Window) -> tuple[tuple[str, int], ...]:
    where = window.offset
    head = window.number(8)
    if head % PAGE != records.SIZES:
        raise damaged("the RAM does not begin with the list of its blocks", where)
    left, blocks = head - records.SIZES, dict[str, int]()
    while left > 0 and len(blocks) < _MOST_BLOCKS:
        where = window.offset
        name, size = window.name(), window.number(8)
        if size > min(left, _MOST_RAM) or size % PAGE or name in blocks:
            raise damaged(f"a RAM block {name!r} of {size} bytes", where)
        blocks[name] = size
        left -= size
    if left:
        raise damaged("the list of RAM blocks has no end", where)
    return tuple(blocks.items())


def _refuse_section(window: Window) -> NoReturn:
    """A section that does not belong where *window* stands. Raises StreamUnknown, DamagedData."""
    where = window.offset
    kind = window.number(1)
    if kind not in {records.START, records.FULL}:
        records.refuse_type(kind, where)
    window.number(4)
    raise StreamUnknown(f"a section of {window.name()!r} at {where} is not expected there")


def ram(window: Window, opening: Opening, put: Callable[[Batch], None]) -> Closing:
    """Walk all of the RAM, each batch of pages handed to *put*; the devices follow.

    Raises StreamUnknown, DamagedData, LocalFailed, and what *put* raises.
    """
    walker = Walker(opening.blocks)
    closing = Closing(window.offset)
    while True:
        where, word = window.offset, window.peek(1)
        if word in {bytes([records.PART]), bytes([records.END])} and not closing.ended:
            closing.ended = word == bytes([records.END])
            window.pos += 1
            if window.number(4) != opening.ram:
                raise damaged("a section goes on that never began", where)
            for batch in walker.section(window):
                put(batch)
            window.expect(records.footer(opening.ram), "the footer of a RAM section")
            if not closing.switchover and not closing.ended:
                closing.parts_end = window.offset
        elif word == bytes([records.COMMAND]) and not closing.switchover:
            if window.peek(len(records.SWITCHOVER)) != records.SWITCHOVER:
                _refuse_command(window)
            window.pos += len(records.SWITCHOVER)
            closing.switchover = True
        elif word in {bytes([records.FULL]), bytes([records.END_OF_STREAM])}:
            return closing
        else:
            _refuse_section(window)


def _refuse_command(window: Window) -> NoReturn:
    where = window.offset
    window.number(1)
    command, length = window.number(2), window.number(2)
    raise StreamUnknown(f"a command {command:#x} of {length} bytes at {where} is not known")


def pour(window: Window, put: Callable[[memoryview], object], upto: int | None = None) -> None:
    """Hand what is left of the stream, up to the offset *upto*, to *put*.

    Raises LocalFailed, and what *put* raises.
    """
    while window.has(1) and (upto is None or window.offset < upto):
        end = window.end if upto is None else min(window.end, window.pos + upto - window.offset)
        put(memoryview(window.buffer)[window.pos : end])
        window.pos = end


def examine(
    source: int,
    *,
    on_progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    window_bytes: int = SIZE,
) -> Contents:
    """Read all of the stream and check it; *source* is a regular file, a pipe or a socket.

    *on_progress* is told (bytes read, bytes in all or 0); *cancelled* is asked now and then.
    Raises StreamUnknown, DamagedData, LocalFailed, Cancelled.
    """
    window = Window(source, size=window_bytes, on_progress=on_progress, cancelled=cancelled)
    start = opening(window)
    files = [PageFile(None, size // PAGE) for _, size in start.blocks]

    def count(batch: Batch) -> None:
        files[batch.block].put(batch.pages, batch.places, window.buffer)

    closing = ram(window, start, count)
    begin = window.offset
    if window.regular:
        sections = devices(source, begin, 0)
        return contents(start, closing, files, sections, begin, os.fstat(source).st_size)
    with tempfile.TemporaryFile(buffering=0) as spool:
        pour(window, Outlet(spool.fileno(), tempfile.gettempdir()).put)
        sections = devices(spool.fileno(), 0, begin)
    return contents(start, closing, files, sections, begin, window.offset)


def devices(fd: int, begin: int, shift: int) -> tuple[Section, ...]:
    """The devices' sections in the file *fd*, from *begin* to its end, each checked.

    *shift* is added to the offsets in complaints. Raises StreamUnknown, DamagedData, LocalFailed.
    """
    with told("the migration stream"):
        return tuple(description.read(fd, shift).sections(begin))


def contents(
    start: Opening,
    closing: Closing,
    files: list[PageFile],
    sections: tuple[Section, ...],
    tail: int,
    size: int,
) -> Contents:
    """What was found in a stream of *size* bytes whose devices begin at *tail*."""
    blocks = []
    for (name, block), file in zip(start.blocks, files, strict=True):
        stored = len(file.stored)
        blocks.append(Block(name, block, stored, block // PAGE - stored))
    ram_bytes = tail - len(start.raw)
    return Contents(start.machine, size, ram_bytes, closing.ended, tuple(blocks), sections)
