"""A snapshot's RAM on its way back: mapped from page images, or in the stream again."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from qmpsnap.engine.capture import Report
from qmpsnap.engine.half import Pair
from qmpsnap.errors import DamagedData, LocalFailed
from qmpsnap.hypervisor.machine.cmdline import CommandLine
from qmpsnap.hypervisor.machine.mapping import mapped
from qmpsnap.hypervisor.vmstate.join import join
from qmpsnap.store import files, filling, pages
from qmpsnap.store.ramindex import NAME as INDEX

log = logging.getLogger(__name__)
_FOLDER = "ram"


class Way(StrEnum):
    """`mapped`: QEMU reads a page from its image when the guest touches it, and keeps what the
    guest changes to itself. `stream`: all pages are loaded into QEMU's own memory first."""

    MAPPED = "mapped"
    STREAM = "stream"


@dataclass(frozen=True, slots=True)
class Memory:
    """How the RAM comes back. *images*: all blocks that have one, *joined* those of them whose
    pages travel in the stream, and why. *lacking*: why the images have to be made first.
    """

    way: Way = Way.STREAM
    folder: Path | None = None
    images: Mapping[str, Path] = field(default_factory=dict)
    joined: Mapping[str, str] = field(default_factory=dict)
    lacking: str = ""


def chosen(
    pair: Pair, line: CommandLine, *, to: Path, eager: bool, version: str, huge: Collection[str]
) -> tuple[Memory, CommandLine, list[str]]:
    """How the RAM of *pair* goes into the machine of *line*, which gets its memory from images.

    With what there is to tell about it. *eager*: all of it is loaded before the guest runs.
    *version* is that of the QEMU that will run; *huge* are the backends on huge pages.
    """
    ram = pair.manifest.ram
    if ram.index is None:
        return Memory(), line, []
    folder, lacking = pair.roots.local.ram(pair.vm, pair.id), _lacking(pair)
    if lacking:
        folder = to / _FOLDER
    images = {one.block: filling.image(folder, n) for n, one in enumerate(ram.images)}
    if eager:
        why = dict.fromkeys(images, "all of it was to be loaded first")
        return Memory(Way.STREAM, folder, images, why, lacking), line, []
    sizes = {one.block: one.bytes for one in ram.images}
    into = mapped(
        line, {block: (path, sizes[block]) for block, path in images.items()},
        version=version, huge=huge)  # fmt: skip
    way = Way.MAPPED if into.blocks else Way.STREAM
    notices = [f"RAM {block} is loaded first: {why}" for block, why in into.left.items()]
    return (
        Memory(way, folder, images, into.left, lacking),
        into.cmdline,
        [*notices, *into.notices],
    )


def kept_here(pair: Pair) -> bool:
    """Whether the RAM's page images are on the local root, so that no pack is needed."""
    return pair.manifest.ram.index is not None and not _lacking(pair)


def _lacking(pair: Pair) -> str:
    """Why the page images that are kept here will not do; empty if they do."""
    try:
        pages.found(pair.roots.local.ram(pair.vm, pair.id), pair.entry(INDEX).blake3)
    except (DamagedData, LocalFailed) as odd:
        return str(odd)
    return ""


async def filled(pair: Pair, memory: Memory, report: Report) -> None:
    """The images are there: those that are not come from the chunks of the store.

    Raises DamagedData, StoreError, LocalFailed.
    """
    if not memory.lacking or memory.folder is None:
        return
    log.info("the RAM of %s %s comes from the store: %s", pair.vm, pair.id, memory.lacking)
    await asyncio.to_thread(memory.folder.mkdir, 0o700)
    near = await asyncio.to_thread(pages.indexes, pair.roots.local, pair.vm)
    await pair.fill(memory.folder, report, near=[path.parent for path in near])


async def feed(pair: Pair, memory: Memory, fd: int, to: Path, report: Report) -> None:
    """Write the state into *fd*: with the pages of all blocks that are not mapped.

    Raises DamagedData, StoreError, LocalFailed.
    """
    near = memory.folder / filling.STREAM if memory.folder is not None else None
    if not memory.joined:
        await pair.load(fd, report, near=near)
        return
    small = to / "state.part"
    images = {block: path for block, path in memory.images.items() if block in memory.joined}

    def tell(done: int, total: int) -> None:
        report("loading RAM", done, total)

    def joined(own: int) -> None:
        try:
            join(small, images, own, on_progress=tell)
        finally:
            os.close(own)

    try:
        with files.told(small, LocalFailed):
            own = os.open(small, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            await pair.load(own, report, near=near)
        finally:
            os.close(own)
        # a thread goes on when its waiter is cancelled: it must own what it writes to
        await asyncio.to_thread(joined, os.dup(fd))
    finally:
        await asyncio.to_thread(small.unlink, missing_ok=True)
