"""The RAM of a snapshot on its way to the store: from QEMU's stream to pages, to chunks in packs.

Nothing of it holds the guest: the stream is whole by then, and all work yields to others.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from qmpsnap.engine import ramknown, ramplace
from qmpsnap.engine.capture import Report
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import DamagedData, LocalFailed, StreamUnknown
from qmpsnap.host.priority import in_background, stoppable
from qmpsnap.store import box, chunking, files, filling, pack, pages
from qmpsnap.store.box import Role
from qmpsnap.store.chunks import PLAIN, Chunks, Encrypted
from qmpsnap.store.files import told
from qmpsnap.store.manifest import FileEntry, Manifest, Pack, Ram
from qmpsnap.store.ramindex import NAME as INDEX
from qmpsnap.store.secret import Secret

if TYPE_CHECKING:
    from qmpsnap.hypervisor.vmstate.split import Make, Split

log = logging.getLogger(__name__)
STREAM = "vmstate/stream.zst"


@dataclass(frozen=True, slots=True)
class Stored:
    """What the manifest says of a RAM that is stored; *files* are those of the spool."""

    ram: Ram
    files: list[FileEntry]
    packs: list[Pack]


async def stored(
    roots: Roots,
    vm: str,
    id: str,
    raw: Path,
    folder: Path,
    ram: Ram,
    report: Report,
    lenders: Sequence[str] | None = (),
    secret: Secret | None = None,
) -> Stored:
    """The stream *raw* becomes what *folder*, a spool, has of it; *raw* goes.

    Its pages lie in the VM's folder for them afterwards, not sealed yet, their chunks, as far as
    no earlier snapshot has brought them, in packs that wait to be shipped. A stream that we do not
    know all of is stored whole. Nor is stored again what the newest snapshots of *lenders* have
    brought, which are other VMs of the store; None when the store does not answer. With a *secret*
    all of it is encrypted, and shared with what the same key has encrypted only; not so the pages.

    Raises LocalFailed.
    """
    work = roots.local.ram(vm, id)
    sealing = _Sealing(vm, id, secret)
    await asyncio.to_thread(files.make_folders, work, roots.local.path, side=LocalFailed)
    await asyncio.to_thread(files.make_folders, folder / "vmstate", folder, side=LocalFailed)
    try:
        here = bool(lenders)  # until it is shipped the images are what it has of their packs
        apart = await _split(
            raw, work, report, lambda sizes: ramplace.made(roots, vm, id, sizes, here=here)
        )
    except (StreamUnknown, DamagedData) as strange:
        # QEMU may well load what we make no sense of; as one stream it is all that it was
        log.warning("the RAM of %s %s is stored whole, as one stream: %s", vm, id, strange)
        await asyncio.to_thread(pages.forget, roots.local, vm, id)
        return await _whole(raw, folder, ram, report, sealing)
    await asyncio.to_thread(raw.unlink)
    if not apart.images:  # a machine of a few MiB
        whole = await _whole(apart.stream, folder, ram, report, sealing)
        await asyncio.to_thread(pages.forget, roots.local, vm, id)
        return whole
    chunks: Chunks = PLAIN if secret is None else Encrypted(secret)
    known = await ramknown.known(roots, vm, lenders, chunks.key)
    shared = roots.local.shared(vm)
    await asyncio.to_thread(files.make_folders, shared, roots.local.path, side=LocalFailed)

    def tell(done: int, total: int, what: str = "") -> None:
        report("packing RAM", done, total)

    kept = await stoppable(
        lambda stop: chunking.keep(
            [(one.block, one.path, one.bytes) for one in apart.images],
            shared,
            known.own,
            lent=known.lent,
            stored_pages=[one.stored_pages for one in apart.images],
            chunks=chunks,
            on_progress=tell,
            cancelled=stop,
        )
    )
    content = sealing.content(INDEX, kept.index)
    for path in (work / filling.INDEX, folder / INDEX):
        await asyncio.to_thread(files.publish, path, content, side=LocalFailed)
    small = await in_background(pack.compress, apart.stream, folder / STREAM)
    stream = await in_background(sealing.stream, folder / STREAM, small)
    await asyncio.to_thread(apart.stream.unlink)
    # what a restore that maps the pages needs besides: it need not come from the store, either
    await asyncio.to_thread(_beside, folder / STREAM, work / filling.STREAM)
    index = FileEntry(name=INDEX, bytes=len(content), blake3=files.digest_bytes(content))
    ram = msgspec.structs.replace(_with_stream(ram, small), index=INDEX, images=list(kept.images))
    return Stored(ram, [stream, index], list(kept.packs))


async def sealed(roots: Roots, vm: str, manifest: Manifest) -> None:
    """The snapshot exists: its page images become those that restores find, and old ones go.

    Nothing is lost when that fails: it is told, and a restore takes the chunks from the store.
    """
    if manifest.ram.index is None:
        return
    folder = roots.local.ram(vm, manifest.id)
    at = filling.place(folder)
    images = [
        (one.block, filling.image(at, number), one.stored_pages)
        for number, one in enumerate(manifest.ram.images)
    ]
    try:
        await in_background(pages.seal, folder, manifest.id, images)
    except LocalFailed as failed:
        log.warning("the page images of %s %s are not kept: %s", vm, manifest.id, failed)
    await trimmed(roots, vm)


async def trimmed(roots: Roots, vm: str) -> None:
    """Page images of old snapshots go; or it is told why not. The caller holds the VM's lock.

    Those of one stay that waits for packs of another VM: if these go before it is shipped, its own
    are made of the images.
    """
    try:
        waiting = await asyncio.to_thread(ramplace.waiting, roots, vm)
        await asyncio.to_thread(pages.trim, roots.local, vm, roots.ram_images, waiting)
    except LocalFailed as failed:
        log.warning("page images of %s that are old may be left: %s", vm, failed)


async def _split(raw: Path, work: Path, report: Report, make: Make) -> Split:
    from qmpsnap.hypervisor.vmstate.split import split  # numpy: most verbs need none

    def tell(done: int, total: int) -> None:
        report("sorting RAM", done, total)

    def work_in_thread(stop: Callable[[], bool]) -> Split:
        with told(raw, LocalFailed):
            source = os.open(raw, os.O_RDWR | os.O_CLOEXEC)
        try:
            return split(source, work, make=make, forget=True, on_progress=tell, cancelled=stop)
        finally:
            os.close(source)

    return await stoppable(work_in_thread)


def _beside(stream: Path, copy: Path) -> None:
    with told(copy, LocalFailed):
        try:
            os.link(stream, copy)
        except OSError:  # a file system without hard links
            shutil.copyfile(stream, copy)


async def _whole(raw: Path, folder: Path, ram: Ram, report: Report, sealing: _Sealing) -> Stored:
    def tell(done: int, total: int, what: str) -> None:
        report("packing RAM", done, total)

    packed = await in_background(pack.compress, raw, folder / STREAM, on_progress=tell)
    await asyncio.to_thread(raw.unlink)
    stream = await in_background(sealing.stream, folder / STREAM, packed)
    return Stored(_with_stream(ram, packed), [stream], [])


def _with_stream(ram: Ram, packed: pack.Packed) -> Ram:
    return msgspec.structs.replace(
        ram, raw_bytes=packed.bytes_raw, file=STREAM, raw_blake3=packed.blake3_raw
    )


@dataclass(frozen=True, slots=True)
class _Sealing:
    """What of a snapshot is encrypted with *secret*; nothing without."""

    vm: str
    id: str
    secret: Secret | None

    def content(self, name: str, content: bytes) -> bytes:
        if self.secret is None:
            return content
        return box.sealed_bytes(content, self.secret, Role(self.vm, self.id, name))

    def stream(self, path: Path, packed: pack.Packed) -> FileEntry:
        """The entry of the stream, which is *packed* in the file *path*. Raises LocalFailed."""
        size, digest = packed.bytes, packed.blake3
        if self.secret is not None:
            role = Role(self.vm, self.id, STREAM)
            size, digest = box.seal_over(path, self.secret, role, side=LocalFailed)
        return FileEntry(name=STREAM, bytes=size, blake3=digest)
