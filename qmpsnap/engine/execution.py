"""What is in the execution state of a snapshot: the only place that reads one and loads none."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from qmpsnap.engine.capture import Report
from qmpsnap.engine.half import Pair
from qmpsnap.errors import Blocked

if TYPE_CHECKING:
    from qmpsnap.hypervisor.vmstate.stream import Contents


class StateBlock(Struct, frozen=True, kw_only=True):
    """A block of RAM: its size, and its pages of 4096 bytes that are not and that are zero.

    *place*: whether its pages are in the stream, or apart from it, each once for all snapshots.
    """

    name: str
    bytes: int
    stored_pages: int
    zero_pages: int
    place: Literal["stream", "packs"]


class StateSection(Struct, frozen=True, kw_only=True):
    """A device's section: *bytes* is what the device wrote."""

    name: str
    instance: int
    version: int
    bytes: int


class ExecutionState(Struct, frozen=True, kw_only=True):
    """`show --vmstate`. *mode* is how the RAM was taken, *stream_bytes* the length of the stream
    without what is in packs, *ram_bytes* that of its RAM; *machine* is the machine type."""

    vm: str
    id: str
    mode: str
    machine: str
    stream_bytes: int
    ram_bytes: int
    blocks: list[StateBlock]
    sections: list[StateSection]


async def read(pair: Pair, report: Report) -> ExecutionState:
    """The execution state of *pair*, of which all bytes of the stream are checked.

    Raises Blocked (it was taken without RAM), HalfMissing, DamagedData, StreamUnknown (a stream of
    a kind that we do not take apart), StoreError, LocalFailed.
    """
    ram = pair.manifest.ram
    if ram.file is None:
        raise Blocked(f"{pair.vm} {pair.id} was taken without RAM: it has no execution state")
    contents = await _examined(pair, report)
    apart = {image.block: image.stored_pages for image in ram.images}
    blocks = []
    for block in contents.blocks:
        stored = apart.get(block.name, block.stored_pages)
        blocks.append(
            StateBlock(
                name=block.name,
                bytes=block.bytes,
                stored_pages=stored,
                zero_pages=block.stored_pages + block.zero_pages - stored,
                place="packs" if block.name in apart else "stream",
            )
        )
    return ExecutionState(
        vm=pair.vm,
        id=pair.id,
        mode=ram.mode,
        machine=contents.machine,
        stream_bytes=contents.bytes,
        ram_bytes=contents.ram_bytes,
        blocks=blocks,
        sections=[
            StateSection(name=one.name, instance=one.instance, version=one.version, bytes=one.bytes)
            for one in contents.sections
        ],
    )


async def _examined(pair: Pair, report: Report) -> Contents:
    """The stream goes through a pipe: one with all RAM in it may be larger than any folder."""
    reading, writing = os.pipe()
    looking = asyncio.create_task(asyncio.to_thread(_look, reading))
    try:
        await pair.load(writing, report)
    finally:
        os.close(writing)  # the end of the stream, wherever that is
        await asyncio.wait([looking])
        odd = looking.exception()  # what `load` raises goes before: the stream is cut then
    if odd is not None:
        raise odd
    return looking.result()


def _look(fd: int) -> Contents:
    from qmpsnap.hypervisor.vmstate.stream import examine  # numpy: most verbs need none

    try:
        return examine(fd)
    finally:
        while os.read(fd, 1 << 20):  # who writes shall not find a broken pipe
            pass
        os.close(fd)
