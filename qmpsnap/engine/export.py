"""Serving one disk of a snapshot, read-only, over NBD: files are read from it without a restore."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import msgspec

from qmpsnap.engine import dependents
from qmpsnap.engine.listing import find
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.unsealing import is_sealed
from qmpsnap.errors import (
    BaseChanged,
    Blocked,
    HalfMissing,
    LocalFailed,
    ManifestError,
    UsageError,
)
from qmpsnap.host import journal, qemu_img, qemu_nbd
from qmpsnap.hypervisor.machine import registry
from qmpsnap.shield import finish
from qmpsnap.store import image, points, signature
from qmpsnap.store.catalogue import Entry
from qmpsnap.store.layout import LocalRoot
from qmpsnap.store.manifest import Disk, Image
from qmpsnap.store.points import Point, Points


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What `export --json` prints. *disk* is its label."""

    vm: str
    id: str
    revision: int
    disk: str
    uri: str
    socket: str
    virtual_size_bytes: int


@dataclass(frozen=True, slots=True)
class Meant:
    """The disk *disk* of the snapshot *entry* at *point*, whose images are *chain*, top first."""

    entry: Entry
    point: Point
    disk: Disk
    chain: Sequence[Image]

    @property
    def words(self) -> str:
        return f"disk {self.disk.device} of {self.entry.vm} {self.point.name}"


@dataclass(frozen=True, slots=True)
class Export:
    """A disk that is being served; *shown* says where."""

    shown: Exported
    _server: qemu_nbd.Server

    async def ended(self) -> str:
        """Returns when the server has ended, before its time, with its last words."""
        return await self._server.ended()


@asynccontextmanager
async def exported(
    roots: Roots, vm: str, word: str, disk: str, revision: int | None, socket: Path | None
) -> AsyncIterator[Export]:
    """The disk *disk* (label, device, node or qdev) of a snapshot, served for the block.

    *revision* None is the newest. Without *socket* it is one in the VM's runtime folder. Only the
    local half is read, so that a dead store keeps nobody from his files; but where the store half
    can be seen, somebody trusted has to vouch for it. `delete` refuses the snapshot meanwhile.

    Raises SnapshotUnknown, Unsigned, Foreign, UsageError for a disk or revision that is not there,
    Blocked for a disk that is encrypted, HalfMissing and BaseChanged for what is on disk,
    LocalFailed.
    """
    found = await meant(roots, vm, word, disk, revision)
    entry, point, chosen, chain = found.entry, found.point, found.disk, found.chain
    if is_sealed(chain):
        raise Blocked(
            f"{found.words} is encrypted, and is not served",
            hint="`qmpsnap export --to FILE` writes it into an image",
        )
    await unchanged(found)
    where = _place(socket, vm, point, chosen)
    async with (
        _depended_on(roots.local, vm, entry.id, where) as begun,
        qemu_nbd.serving(Path(chain[0].path), chain[0].format, where) as server,
    ):
        await begun()
        shown = Exported(
            vm=vm,
            id=entry.id,
            revision=point.storage.revision,
            disk=chosen.label,
            uri=f"nbd+unix:///?socket={quote(str(where))}",
            socket=str(where),
            virtual_size_bytes=chosen.virtual_size_bytes,
        )
        yield Export(shown, server)


async def meant(roots: Roots, vm: str, word: str, disk: str, revision: int | None) -> Meant:
    """The disk that these words mean, of a snapshot that may be read. Raises as `exported`."""
    entry = await find(roots, vm, word)
    signature.refuse(entry.signature, f"{vm} {entry.id}")
    if not entry.local:
        raise HalfMissing(f"{vm} {entry.id}: {entry.why}")
    there = await asyncio.to_thread(points.read, roots.local, vm)
    point = _point(there, entry.id, revision)
    chosen = _disk(point, disk)
    return Meant(entry, point, chosen, there.images(point, chosen.label))


def _point(there: Points, id: str, revision: int | None) -> Point:
    """Revision *revision* of the snapshot *id*, or the newest one."""
    ours = [one for one in there if one.storage.id == id and not one.kept]
    found = {one.storage.revision: one for one in ours}
    wanted = max(found, default=0) if revision is None else revision
    damaged = [why for name, why in there.damaged.items() if name.partition("/")[0] == id]
    if damaged and (revision is None or wanted not in found):
        raise ManifestError(damaged[0])  # it may be the one that is meant
    if not found:
        raise HalfMissing(f"{there.vm} {id}: there is no sealed local half")
    if wanted not in found:
        known = ", ".join(map(str, sorted(found)))
        raise UsageError(f"{there.vm} {id} has no revision {wanted}; there are: {known}")
    return found[wanted]


def _disk(point: Point, word: str) -> Disk:
    disks = point.storage.disks
    found = [one for one in disks if word in {one.label, one.device, one.node, one.qdev}]
    # a label may be what another disk's node is called: the nearer meaning wins
    found = [one for one in found if word in {one.label, one.device}] or found
    if len(found) != 1:
        there = ", ".join(one.device for one in disks)
        many = "more than one disk is" if found else "no disk is"
        raise UsageError(f"{many} called {word!r}; there are: {there}")
    return found[0]


async def unchanged(found: Meant) -> None:
    """See that all images are those that were frozen, and that their own headers lead to them.

    It is the headers that QEMU's tools go by. Raises BaseChanged, LocalFailed.
    """
    what, chain = found.words, found.chain
    for one in chain:
        if difference := await asyncio.to_thread(image.changed, one):
            raise BaseChanged(f"{what}: {difference}")
    if is_sealed(chain):
        return  # whoever opens them sees to the rest
    told = await qemu_img.chain(Path(chain[0].path), chain[0].format)
    _same_way(what, [one.filename for one in told], [one.path for one in chain])


def _same_way(what: str, headers: Sequence[str], manifests: Sequence[str]) -> None:
    # QEMU has a spelling of its own, json:, for what is not a plain file name
    plain = not any(name.startswith("json:") for name in headers)
    real, wanted = list(map(os.path.realpath, headers)), list(map(os.path.realpath, manifests))
    if len(real) != len(wanted) or (plain and real != wanted):
        way, other = " > ".join(real), " > ".join(wanted)
        raise BaseChanged(f"{what}: its images stand on one another as {way}, and not {other}")


def _place(given: Path | None, vm: str, point: Point, disk: Disk) -> Path:
    if given is not None:
        return given.absolute()
    try:
        folder = registry.folder(vm)
    except OSError as failed:
        raise LocalFailed(f"{failed.filename}: {failed.strerror}") from failed
    return folder / f"{point.name.replace('/', '-')}-{disk.label}.nbd"


@asynccontextmanager
async def _depended_on(
    root: LocalRoot, vm: str, id: str, socket: Path
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Whoever would delete the snapshot sees us: by an empty folder, and then by *socket*.

    What is given is to be called when the socket answers.
    """
    making = Path(tempfile.mkdtemp(prefix="qmpsnap-export-"))
    ours = [making]

    async def noted(folder: Path) -> None:
        note = dependents.Dependent(folder=str(folder), images=[str(socket)], kind="exports")
        await asyncio.to_thread(dependents.note, root, vm, id, note)

    async def begun() -> None:
        ours.append(socket)  # before, it may be that of another export
        await noted(socket)
        await asyncio.to_thread(_no_more, root, vm, id, making)

    try:
        await noted(making)
        # `delete` writes down what it will do before it looks for us: one of us sees the other
        owed = await asyncio.to_thread(journal.pending, root.journal(vm))
        if any(one.id == id for one in owed):
            raise HalfMissing(f"{vm} {id} is being deleted")
        yield begun
    finally:
        for folder in ours:
            await finish(asyncio.to_thread(_no_more, root, vm, id, folder), within=10)


def _no_more(root: LocalRoot, vm: str, id: str, folder: Path) -> None:
    with suppress(OSError):
        dependents.forget(root, vm, id, folder)
    with suppress(OSError):  # the socket is none
        folder.rmdir()
