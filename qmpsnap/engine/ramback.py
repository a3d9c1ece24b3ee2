"""A snapshot's RAM on its way back: mapped from page images, or in the stream again."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from qmpsnap.engine import arrivals, ramplace
from qmpsnap.engine.capture import Report
from qmpsnap.engine.feeding import Feeder
from qmpsnap.engine.half import Pair
from qmpsnap.engine.verdict import Row, row
from qmpsnap.errors import DamagedData, LocalFailed
from qmpsnap.host.priority import in_background
from qmpsnap.hypervisor.machine.cmdline import CommandLine
from qmpsnap.hypervisor.machine.launch import Launched
from qmpsnap.hypervisor.machine.mapping import mapped
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.hypervisor.vmstate import postcopy
from qmpsnap.hypervisor.vmstate.load import load
from qmpsnap.store import files, filling, pages
from qmpsnap.store.manifest import Ram
from qmpsnap.store.ramindex import NAME as INDEX
from qmpsnap.units import in_bytes

log = logging.getLogger(__name__)
_FOLDER = "ram"


class Way(StrEnum):
    """`mapped`: QEMU reads a page from its image when the guest touches it, and keeps what the
    guest changes to itself. `demand`: the pages come from the store while the guest runs, those
    first that it touches. `stream`: all pages are loaded into QEMU's own memory first."""

    MAPPED = "mapped"
    DEMAND = "demand"
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
    pair: Pair,
    *,
    to: Path,
    eager: bool,
    shared: Path | None = None,
    ram_in: Path | None = None,
) -> Memory:
    """How the RAM of *pair* comes back into a machine in *to*, if its memory can be mapped.

    *eager*: all of it is loaded before the guest runs. *shared*: the folder in which images from
    the store are made, for others to map as well; else they come on demand. *ram_in*: the folder in
    which they are made also if they are kept here.
    """
    ram = pair.manifest.ram
    if ram.index is None:
        return Memory()
    folder, lacking = pair.roots.local.ram(pair.vm, pair.id), _lacking(pair)
    if ram_in is not None:
        shared, lacking = ram_in, lacking or f"they are wanted in {ram_in}"
    if lacking:
        folder = shared or to / _FOLDER
    at = filling.place(folder)
    images = {one.block: filling.image(at, n) for n, one in enumerate(ram.images)}
    if eager:
        why = dict.fromkeys(images, "all of it was to be loaded first")
        return Memory(Way.STREAM, folder, images, why, lacking)
    way = Way.DEMAND if lacking and shared is None else Way.MAPPED
    return Memory(way, folder, images, {}, lacking)


def given(
    memory: Memory, pair: Pair, line: CommandLine, *, version: str, huge: Collection[str]
) -> tuple[Memory, CommandLine, list[str]]:
    """The machine of *line* with the images of *memory* as its RAM, and what there is to tell.

    What cannot be mapped is loaded first. *version* is that of the QEMU that will run; *huge* are
    the backends on huge pages.
    """
    if memory.way is not Way.MAPPED:
        return memory, line, []
    sizes = {one.block: one.bytes for one in pair.manifest.ram.images}
    into = mapped(
        line, {block: (path, sizes[block]) for block, path in memory.images.items()},
        version=version, huge=huge)  # fmt: skip
    notices = [f"RAM {block} is loaded first: {why}" for block, why in into.left.items()]
    way = Way.MAPPED if into.blocks else Way.STREAM
    memory = replace(memory, way=way, joined=into.left)
    return memory, into.cmdline, [*notices, *into.notices]


def rows(memory: Memory, ram: Ram) -> list[Row]:
    """What `restore --check` tells of it."""
    if not memory.images:
        return []
    stored = in_bytes(sum(one.stored_pages for one in ram.images) << 12)
    whence = "from the store" if memory.lacking else "kept here"
    return [row("RAM pages", stored, f"{whence}, {memory.way}")]


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


async def filled(pair: Pair, memory: Memory, to: Path, report: Report) -> Memory:
    """The images are there: those that are not come from the chunks of the store, into *to*.

    Those that are read as a whole are checked before; if they are damaged, the store's are taken.
    Raises DamagedData, StoreError, LocalFailed.
    """
    if memory.folder is None or memory.way is Way.DEMAND:
        return memory
    if not memory.lacking and (wrong := await _wrong(pair, memory, report)):
        if memory.way is Way.MAPPED:
            raise DamagedData(wrong, hint=f"remove {memory.folder}: the store has all of it")
        log.warning("%s", wrong)
        folder = to / _FOLDER
        images = {one: filling.image(folder, n) for n, one in enumerate(memory.images)}
        memory = replace(memory, folder=folder, images=images, lacking=wrong)
    if memory.lacking:
        await _made(pair, memory, report)
    if memory.way is Way.MAPPED:
        await asyncio.to_thread(ramplace.held, list(memory.images.values()))
    return memory


async def _wrong(pair: Pair, memory: Memory, report: Report) -> str:
    """What is wrong with images that are to be read; empty if nothing is."""
    if not memory.joined or memory.folder is None:
        return ""

    def tell(done: int, total: int, what: str) -> None:
        report("checking RAM", done, total)

    digest, keys = pair.entry(INDEX).blake3, pair.roots.secrets
    found = await in_background(pages.wrong, memory.folder, digest, tell, keys)
    return "".join(found[:1])


async def _made(pair: Pair, memory: Memory, report: Report) -> None:
    assert memory.folder is not None
    log.info("the RAM of %s %s comes from the store: %s", pair.vm, pair.id, memory.lacking)
    with files.told(memory.folder, LocalFailed):
        await asyncio.to_thread(memory.folder.mkdir, 0o700, parents=True, exist_ok=True)
    near = await asyncio.to_thread(pages.indexes, pair.roots.local, pair.vm)
    await pair.fill(memory.folder, report, near=[path.parent for path in near])


async def loaded(
    pair: Pair,
    memory: Memory,
    monitor: Monitor,
    to: Path,
    on_running: Callable[[], Awaitable[None]],
    report: Report,
    *,
    feeder: Feeder | None,
    process: Launched,
) -> Way:
    """Bring the state of *pair* into the *process* that waits for it, and await *on_running* then.

    All RAM is where it belongs at the end; where it comes on demand, the guest has run for a while
    by then, or the *feeder* is still at it, if it is `remaining`. Gives the way that it really
    went: without userfaultfd nothing comes on demand.

    Raises MigrationFailed, MonitorLost, GuestLacksPages, DamagedData, StoreError, LocalFailed.
    """
    made = memory.folder if memory.lacking and memory.way is not Way.MAPPED else None
    try:
        if memory.way is Way.DEMAND and feeder is not None:
            why = await postcopy.trouble(monitor)
            if not why:
                made = None  # the feeder's
                await _on_demand(pair, memory, monitor, to, on_running, report, feeder, process)
                return memory.way
            feeder.remaining = False
            await feeder.ended()
            log.warning("all RAM is loaded before the guest runs: %s", why)
            memory = replace(memory, way=Way.STREAM, joined=dict.fromkeys(memory.images, why))
            memory = await filled(pair, memory, to, report)

        async def feed(fd: int) -> None:
            await _fed(pair, memory, fd, to, report)

        await load(monitor, feed)
        await on_running()
    finally:
        if made is not None:  # all of it is in QEMU's own memory
            await asyncio.to_thread(shutil.rmtree, made, ignore_errors=True)
    return memory.way


async def _on_demand(
    pair: Pair,
    memory: Memory,
    monitor: Monitor,
    to: Path,
    on_running: Callable[[], Awaitable[None]],
    report: Report,
    feeder: Feeder,
    process: Launched,
) -> None:
    assert memory.folder is not None

    def tell(done: int, total: int) -> None:
        report("bringing RAM", done, total)

    with files.told(memory.folder, LocalFailed):
        await asyncio.to_thread(memory.folder.mkdir, 0o700)
    await _small(pair, memory, memory.folder / arrivals.STREAM, report)
    await feeder.order(to, memory.folder, process)
    await feeder.ready()
    await postcopy.accept(monitor, feeder.theirs)
    feeder.theirs.close()
    await feeder.loaded()
    await postcopy.paused(monitor)
    feeder.go()
    arriving = asyncio.create_task(feeder.arrived(tell))
    running = asyncio.ensure_future(on_running())
    try:
        # `cont` itself may wait for a page, and for ever if that is damaged
        await asyncio.wait({arriving, running}, return_when=asyncio.FIRST_COMPLETED)
        if arriving.done():
            arriving.result()
        await running
        if not feeder.remaining:
            await arriving
    finally:
        for task in (arriving, running):
            task.cancel()
        await asyncio.gather(arriving, running, return_exceptions=True)


async def _fed(pair: Pair, memory: Memory, fd: int, to: Path, report: Report) -> None:
    """Write the state into *fd*: with the pages of all blocks that are not mapped."""
    if not memory.joined:
        await pair.load(fd, report, near=_near(memory))
        return
    from qmpsnap.hypervisor.vmstate.join import join  # numpy, too

    images = {block: path for block, path in memory.images.items() if block in memory.joined}

    def tell(done: int, total: int) -> None:
        report("loading RAM", done, total)

    def joined(small: Path, own: int) -> None:
        try:
            join(small, images, own, on_progress=tell)
        finally:
            os.close(own)

    path = to / "state.part"
    try:
        await _small(pair, memory, path, report)
        # a thread goes on when its waiter is cancelled: it must own what it writes to
        await asyncio.to_thread(joined, path, os.dup(fd))
    finally:
        await asyncio.to_thread(path.unlink, missing_ok=True)


async def _small(pair: Pair, memory: Memory, path: Path, report: Report) -> None:
    """The stream without the pages of the images, as the file *path*."""
    with files.told(path, LocalFailed):
        own = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        await pair.load(own, report, near=_near(memory))
    finally:
        os.close(own)


def _near(memory: Memory) -> Path | None:
    return memory.folder / filling.STREAM if memory.folder is not None else None
