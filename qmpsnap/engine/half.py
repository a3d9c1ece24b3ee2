"""A store half to read from, wherever it is now: on the store, or still in the spool."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from qmpsnap.engine.capture import Report
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import HalfMissing, LocalFailed
from qmpsnap.store import files, local, pack
from qmpsnap.store.catalogue import Entry
from qmpsnap.store.layout import MANIFEST
from qmpsnap.store.manifest import FileEntry, Manifest, Storage, decode


@dataclass(frozen=True, slots=True)
class Pair:
    """Both halves of a whole snapshot: *storage* and *manifest* name each other."""

    roots: Roots
    vm: str
    id: str
    storage: Storage
    manifest: Manifest
    seal: str
    spooled: bool

    async def read(self, name: str) -> str:
        """The text of a small file of the store half, checked. Raises DamagedData, StoreError."""
        if not self.spooled:
            return await self.roots.store.read(self.vm, self.id, name, seal=self.seal)
        path, entry = self.roots.local.spool(self.vm, self.id) / name, self._entry(name)
        await asyncio.to_thread(files.expect, path, entry, side=LocalFailed)
        return (await asyncio.to_thread(files.read_small, path, side=LocalFailed)).decode()

    async def load(self, fd: int, report: Report) -> None:
        """Write the vmstate, checked and unpacked, into *fd*.

        Raises DamagedData, as a rule before the first byte, StoreError, LocalFailed.
        """
        name = self.manifest.ram.file
        if name is None:
            raise HalfMissing(f"{self.vm} {self.id} was taken without RAM")

        def tell(done: int, total: int, what: str) -> None:
            report("loading RAM", done, total)

        if not self.spooled:
            store = self.roots.store
            await store.load(self.vm, self.id, name, fd, seal=self.seal, on_progress=tell)
            return
        path, entry = self.roots.local.spool(self.vm, self.id) / name, self._entry(name)
        await asyncio.to_thread(files.expect, path, entry, side=LocalFailed)
        await asyncio.to_thread(
            pack.unpack_to_fd,
            path,
            fd,
            raw_bytes=self.manifest.ram.raw_bytes,
            raw_blake3=self.manifest.ram.raw_blake3,
            side=LocalFailed,
            on_progress=tell,
        )

    def _entry(self, name: str) -> FileEntry:
        if (entry := self.manifest.entry(name)) is None:
            raise HalfMissing(f"{self.vm} {self.id}: the manifest lists no {name}")
        return entry


async def open_pair(roots: Roots, entry: Entry) -> Pair:
    """Both halves of *entry*. Raises HalfMissing with the reason when it is not whole."""
    if entry.state not in {"paired", "shipping"}:
        raise HalfMissing(f"{entry.vm} {entry.id} is {entry.state}: {entry.why}")
    storage = await asyncio.to_thread(local.read_storage, roots.local, entry.vm, entry.id)
    if entry.state == "shipping":
        path = roots.local.spool(entry.vm, entry.id) / MANIFEST
        content = await asyncio.to_thread(files.read_small, path, side=LocalFailed)
        manifest = decode(content, Manifest, path)
        seal = files.digest_bytes(content)
        return Pair(roots, entry.vm, entry.id, storage, manifest, seal, spooled=True)
    listing = await roots.store.catalogue(entry.vm)
    found = next(one for one in listing.found if one.id == entry.id)
    assert found.manifest is not None
    assert found.manifest_blake3 is not None
    path = roots.store.root.manifest(entry.vm, entry.id)
    manifest = decode(found.manifest.encode(), Manifest, path)
    return Pair(roots, entry.vm, entry.id, storage, manifest, found.manifest_blake3, spooled=False)
