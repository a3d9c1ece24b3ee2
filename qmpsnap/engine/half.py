"""A store half to read from, wherever it is now: on the store, or still in the spool."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.engine.capture import Report
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import (
    DamagedData,
    DigestMismatch,
    HalfMissing,
    KeyMissing,
    LocalFailed,
    SnapError,
    StoreError,
)
from qmpsnap.store import contents, files, filling, local, ramhalf, ramindex, signature
from qmpsnap.store.catalogue import Entry
from qmpsnap.store.filling import Filled, Span
from qmpsnap.store.layout import MANIFEST
from qmpsnap.store.manifest import FileEntry, Manifest, Storage, decode
from qmpsnap.store.ramindex import Index
from qmpsnap.store.shelf import Shelf
from qmpsnap.store.signature import Signed
from qmpsnap.store.wire import Problem, error


@dataclass(frozen=True, slots=True)
class Glanced:
    """The files of a store half at a glance: *texts* that were asked for, what is *wrong*."""

    texts: dict[str, str]
    wrong: dict[str, SnapError]

    def text(self, name: str) -> str:
        """Raises what is wrong with it, HalfMissing when no such file is listed."""
        if name in self.wrong:
            raise self.wrong[name]
        if name not in self.texts:
            raise HalfMissing(f"the manifest lists no {name}")
        return self.texts[name]


@dataclass(frozen=True, slots=True)
class Pair:
    """Both halves of a whole snapshot: *storage* and *manifest* name each other.

    *signed*: who vouches for them; None where that was not asked for.
    """

    roots: Roots
    vm: str
    id: str
    storage: Storage
    manifest: Manifest
    seal: str
    spooled: bool
    signed: Signed | None = None

    async def read(self, name: str) -> str:
        """The text of a small file of the store half, checked.

        Raises DamagedData, StoreError, KeyMissing.
        """
        if not self.spooled:
            return await self.roots.store.read(self.vm, self.id, name, seal=self.seal)
        path, entry = self.roots.local.spool(self.vm, self.id) / name, self.entry(name)
        await asyncio.to_thread(files.expect, path, entry, side=LocalFailed)
        return await asyncio.to_thread(self._text, path, entry)

    async def glance(self, *names: str, whole: Sequence[str] = ()) -> Glanced:
        """The texts of the small files *names*, and whether all others are there.

        Those in *whole* are read and compared.

        Raises DamagedData for the manifest, StoreError, LocalFailed.
        """
        if self.spooled:
            found = await asyncio.to_thread(self._glance, names, whole)
            found.wrong.update(await self._packs())
            return found
        seen = await self.roots.store.glance(self.vm, self.id, names, whole=whole, seal=self.seal)
        wrong: dict[str, SnapError] = {name: error(one) for name, one in seen.troubles.items()}
        return Glanced(seen.texts, wrong)

    async def _packs(self) -> dict[str, SnapError]:
        """What is wrong with packs of a half in the spool: here, or on the store, by name."""
        try:
            found = await self.packs(whole=False)
        except (StoreError, LocalFailed) as failed:
            packs = [one.entry for one in self.manifest.packs]
            return {one.name: failed for one in packs if not self.spooled_at(one).exists()}
        return {one.file: HalfMissing(one.what) for one in found}

    async def packs(self, *, whole: bool, tell: files.Progress | None = None) -> list[Problem]:
        """What is wrong with the RAM in packs of a half that is in the spool; *whole*: all is read.

        Raises StoreError, LocalFailed, DamagedData.
        """
        local = self.roots.local
        spool, shared = local.spool(self.vm, self.id), local.shared(self.vm)
        if not self.manifest.packs:
            return []
        return await self.roots.store.packs(
            self.vm, self.id, spool, shared, whole=whole, on_progress=tell
        )

    async def fill(
        self,
        to: Path,
        report: Report,
        *,
        near: Sequence[Path] = (),
        spans: Sequence[Span] | None = None,
    ) -> Filled:
        """Make the page images of its RAM in the folder *to*, as `filling.fill` does.

        Raises HalfMissing, DigestMismatch, DamagedData, which name what is lost; StoreError,
        LocalFailed.
        """

        def tell(done: int, total: int, what: str) -> None:
            report("filling RAM", done, total)

        if self.spooled and all(self.spooled_at(one.entry).exists() for one in self.manifest.packs):
            # the store need not be there
            over = threading.Event()
            try:
                return await asyncio.to_thread(self._fill, to, near, spans, tell, over.is_set)
            finally:
                over.set()  # a thread goes on when its waiter is cancelled
        spool = self.roots.local.spool(self.vm, self.id) if self.spooled else None
        return await self.roots.store.fill(
            self.vm,
            self.id,
            to,
            near=near,
            spans=spans,
            seal=self.seal,
            spool=spool,
            shared=self.roots.local.shared(self.vm) if self.spooled else None,
            on_progress=tell,
        )

    def _fill(
        self,
        to: Path,
        near: Sequence[Path],
        spans: Sequence[Span] | None,
        tell: files.Progress,
        cancelled: Callable[[], bool],
    ) -> Filled:
        local = self.roots.local
        path = local.spool(self.vm, self.id) / str(self.manifest.ram.index)
        keys = self.roots.secrets
        index = ramhalf.index_of(self.manifest, path, side=LocalFailed, keys=keys)

        def near_index(path: Path) -> Index:
            return ramindex.read(path, side=LocalFailed, keys=keys)

        with Shelf([(local.shared(self.vm), LocalFailed)]) as shelf:
            return filling.fill(
                index, shelf, to, near=near, near_index=near_index, spans=spans,
                on_progress=tell, cancelled=cancelled,
            )  # fmt: skip

    def spooled_at(self, entry: FileEntry) -> Path:
        """Where a file lies while the store half waits in the spool."""
        if entry not in self.manifest.files:
            return self.roots.local.shared(self.vm) / entry.blake3
        return self.roots.local.spool(self.vm, self.id) / entry.name

    @property
    def plain(self) -> list[FileEntry]:
        """All files of the store half but the packs of RAM, which need not be on this side."""
        packs = {pack.blake3 for pack in self.manifest.packs}
        return [one for one in self.manifest.listed if one.blake3 not in packs]

    def _text(self, path: Path, entry: FileEntry) -> str:
        stored = files.read_small(path, side=LocalFailed)
        content = contents.content(self.manifest, entry, stored, self.roots.secrets, path)
        return content.decode()

    def _glance(self, names: Sequence[str], whole: Sequence[str]) -> Glanced:
        found = Glanced({}, {})
        for entry in self.plain:
            path = self.spooled_at(entry)
            try:
                if entry.name not in (*names, *whole):
                    files.expect_size(path, entry, side=LocalFailed)
                    continue
                files.expect(path, entry, side=LocalFailed)
                if entry.name not in names:
                    continue
                found.texts[entry.name] = self._text(path, entry)
            except (DamagedData, LocalFailed) as odd:
                found.wrong[entry.name] = odd
        return found

    async def fetch(self, entry: FileEntry, to: Path) -> None:
        """Publish a checked copy of a file at *to*, decrypted.

        Raises DamagedData, StoreError, LocalFailed, KeyMissing.
        """
        if not self.spooled:
            store = self.roots.store
            await store.fetch(self.vm, self.id, entry.name, to, seal=self.seal)
            return
        if self.manifest.key is not None:
            path, keys = self.spooled_at(entry), self.roots.secrets
            await asyncio.to_thread(files.expect, path, entry, side=LocalFailed)
            await asyncio.to_thread(
                contents.copy, self.manifest, entry, path, to, keys, side=LocalFailed
            )
            return
        await asyncio.to_thread(
            files.copy_verified,
            self.spooled_at(entry),
            to,
            entry,
            source=LocalFailed,
            target=LocalFailed,
        )

    async def load(self, fd: int, report: Report, *, near: Path | None = None) -> None:
        """Write the vmstate, checked and unpacked, into *fd*; from the file *near* if that is it.

        Raises DamagedData, as a rule before the first byte, StoreError, LocalFailed.
        """
        name = self.manifest.ram.file
        if name is None:
            raise HalfMissing(f"{self.vm} {self.id} was taken without RAM")

        def tell(done: int, total: int, what: str) -> None:
            report("loading RAM", done, total)

        if near is not None and await asyncio.to_thread(_is, near, self.entry(name)):
            await asyncio.to_thread(self._unpack, near, os.dup(fd), self.entry(name), tell)
            return
        if not self.spooled:
            store = self.roots.store
            await store.load(self.vm, self.id, name, fd, seal=self.seal, on_progress=tell)
            return
        path, entry = self.roots.local.spool(self.vm, self.id) / name, self.entry(name)
        await asyncio.to_thread(files.expect, path, entry, side=LocalFailed)
        # a thread goes on when its waiter is cancelled: it must own what it writes to
        await asyncio.to_thread(self._unpack, path, os.dup(fd), entry, tell)

    def _unpack(self, path: Path, fd: int, entry: FileEntry, tell: files.Progress) -> None:
        keys = self.roots.secrets
        try:
            contents.load(self.manifest, entry, path, fd, keys, side=LocalFailed, progress=tell)
        finally:
            os.close(fd)

    def entry(self, name: str) -> FileEntry:
        """What is listed under *name*. Raises HalfMissing."""
        if (entry := self.manifest.entry(name)) is None:
            raise HalfMissing(f"{self.vm} {self.id}: the manifest lists no {name}")
        return entry


def _is(path: Path, entry: FileEntry) -> bool:
    try:
        files.expect(path, entry, side=LocalFailed)
    except (DamagedData, LocalFailed):
        return False
    return True


async def open_pair(roots: Roots, entry: Entry) -> Pair:
    """Both halves of *entry*. Raises HalfMissing with the reason when it is not whole.

    Raises Unsigned and Foreign for one that nobody vouches for, unless that is accepted.
    """
    signature.refuse(entry.signature, f"{entry.vm} {entry.id}")
    if entry.state not in {"paired", "shipping"}:
        raise HalfMissing(f"{entry.vm} {entry.id} is {entry.state}: {entry.why}")
    storage = await asyncio.to_thread(local.read_storage, roots.local, entry.vm, entry.id)
    if entry.state == "shipping":
        trust = await asyncio.to_thread(roots.trust)
        manifest, seal, signed = await asyncio.to_thread(
            local.read_spooled, roots.local, entry.vm, entry.id, trust
        )
        manifest = await asyncio.to_thread(_told, roots, manifest)
        return Pair(roots, entry.vm, entry.id, storage, manifest, seal, spooled=True, signed=signed)
    # what the store says now is believed only if it is what the local half noted when it shipped
    paired = await asyncio.to_thread(local.read_paired, roots.local, entry.vm, entry.id)
    if paired is None:
        raise HalfMissing(f"{entry.vm} {entry.id}: the local half names no store half")
    path = roots.store.root.manifest(entry.vm, entry.id)
    listing = await roots.store.catalogue(entry.vm)
    found = next((one for one in listing.found if one.id == entry.id), None)
    if found is None or found.manifest is None:
        raise HalfMissing(f"{path}: the store half is gone")
    if found.manifest_blake3 != paired.manifest_blake3:
        raise DigestMismatch(f"{path}: is not the manifest that was shipped")
    signature.refuse(found.signed, str(path.parent))
    manifest = decode(found.manifest.encode(), Manifest, path)
    manifest = await asyncio.to_thread(_told, roots, manifest)
    seal = paired.manifest_blake3
    return Pair(
        roots, entry.vm, entry.id, storage, manifest, seal, spooled=False, signed=found.signed
    )


def _told(roots: Roots, manifest: Manifest) -> Manifest:
    """With what it has sealed, where the key is here. Raises DamagedData."""
    try:
        return contents.unsealed(manifest, roots.secrets, f"{manifest.vm} {manifest.id} {MANIFEST}")
    except KeyMissing:
        return manifest
