"""Which chunks of RAM are stored already: the only place that gathers their indexes."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from qmpsnap.engine.roots import Roots
from qmpsnap.errors import DamagedData, LocalFailed, SnapError, StoreError
from qmpsnap.store import filling, hurt, local, pages, ramindex
from qmpsnap.store.layout import MANIFEST
from qmpsnap.store.manifest import Manifest, decode
from qmpsnap.store.ramindex import NAME as INDEX
from qmpsnap.store.ramindex import Index
from qmpsnap.store.remote import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Known:
    """Indexes of the VM's *own* snapshots, and those *lent* by other VMs, by their names."""

    own: list[Index] = field(default_factory=list)
    lent: list[tuple[str, Index]] = field(default_factory=list)


async def known(
    roots: Roots, vm: str, lenders: Sequence[str] | None, key: str | None = None
) -> Known:
    """Where chunks lie that need not be stored again: by indexes kept here, else by the store's.

    A pack that the store has not any more, or that was damaged when it was last read, is left out:
    what lies there is stored anew. A store that does not answer is asked once: then the VM's own
    packs are taken to be there (shipping finds out), and those of others are not.

    It is not asked at all where *lenders* is None, as it did not answer before. Empty when nobody
    can tell: all chunks are stored anew then. Only what is encrypted with the *key* counts; if that
    is None, only what is not encrypted.
    """
    every = await _known(roots, vm, lenders)
    return Known(
        [one for one in every.own if one.chunks.key == key],
        [(other, one) for other, one in every.lent if one.chunks.key == key],
    )


async def _known(roots: Roots, vm: str, lenders: Sequence[str] | None) -> Known:
    found, here = Known(), await asyncio.to_thread(_indexes_here, roots, vm)
    if lenders is None:
        return Known(await asyncio.to_thread(_held, roots, vm, here))
    async with roots.store.lasting() as store:
        try:
            own = here or await _newest_own(roots, store, vm)
            found.own.extend([await _whole(roots, store, vm, one) for one in own])
            for other in dict.fromkeys(lenders):
                if other != vm:
                    lent = await _newest_of(roots, store, other)
                    found.lent.extend((other, one) for one in lent)
        except StoreError as dead:
            log.info("what the store has of the RAM of %s is not known: %s", vm, dead)
            return Known(await asyncio.to_thread(_held, roots, vm, here))
    return found


async def _newest_own(roots: Roots, store: Store, vm: str) -> list[Index]:
    for facts in reversed(await asyncio.to_thread(local.survey, roots.local, vm)):
        if facts.paired is not None:
            seal = facts.paired.manifest_blake3
            if found := await _fetched(roots, store, vm, facts.id, seal):
                return found
    return []


async def _newest_of(roots: Roots, store: Store, vm: str) -> list[Index]:
    """The index of the newest pair of another VM, less what is lost of it."""
    here = await asyncio.to_thread(_indexes_here, roots, vm, paired=True)
    found = here[:1] or await _newest_on_store(roots, store, vm)
    if not found:
        log.warning("nothing is known of the RAM of %s: there is no snapshot that has any", vm)
    return [await _whole(roots, store, vm, one) for one in found]


async def _newest_on_store(roots: Roots, store: Store, vm: str) -> list[Index]:
    for one in reversed((await store.catalogue(vm)).found):
        if one.manifest is None or one.manifest_blake3 is None:
            continue
        if one.signed is not None and not one.signed.accepted:
            log.warning("%s %s lends no RAM: %s", vm, one.id, one.signed.words)
            continue
        try:
            manifest = decode(one.manifest.encode(), Manifest, Path(MANIFEST))
        except DamagedData as odd:
            log.info("%s %s: %s", vm, one.id, odd)
            continue
        if manifest.ram.index is not None:
            return await _fetched(roots, store, vm, one.id, one.manifest_blake3)
    return []


async def _whole(roots: Roots, store: Store, vm: str, index: Index) -> Index:
    """Of *index* what is still there, or on its way."""
    lost = await store.lost(vm, index.packs)
    lost -= await asyncio.to_thread(_waiting, roots, vm, lost)
    lost |= await asyncio.to_thread(hurt.packs, roots.local, vm)
    lost &= {one.blake3 for one in index.packs}
    if not lost:
        return index
    log.warning("%d packs of the RAM of %s are lost: what lies there is stored anew", len(lost), vm)
    return index.without(lost)


def _held(roots: Roots, vm: str, indexes: Sequence[Index]) -> list[Index]:
    """Of *indexes* what does not hang on another VM's packs that are not linked yet."""
    hoped = {
        pack.blake3
        for one in local.survey(roots.local, vm)
        if one.paired is None and one.spooled is not None
        for pack in one.spooled.packs
        if pack.origin is not None
    }
    return [one.without(hoped) if hoped else one for one in indexes]


def _waiting(roots: Roots, vm: str, packs: Set[str]) -> set[str]:
    """Those that are here, to be shipped."""
    return {one for one in packs if (roots.local.shared(vm) / one).is_file()}


def _indexes_here(roots: Roots, vm: str, *, paired: bool = False) -> list[Index]:
    found = []
    for path in pages.indexes(roots.local, vm):
        try:
            if paired and local.read_paired(roots.local, vm, path.parent.name) is None:
                continue
            note = pages.read(path.parent)
            digest = note.index_blake3
            index = ramindex.read(path, side=LocalFailed, blake3=digest, keys=roots.secrets)
            found.append(index)
        except SnapError as odd:
            log.info("%s", odd)
    return found


async def _fetched(roots: Roots, store: Store, vm: str, id: str, seal: str) -> list[Index]:
    """Raises StoreError; what is damaged is none."""
    try:
        with tempfile.TemporaryDirectory(dir=roots.local.path) as folder:
            path = Path(folder) / filling.INDEX
            await store.fetch(vm, id, INDEX, path, seal=seal)
            keys = roots.secrets
            return [await asyncio.to_thread(ramindex.read, path, side=LocalFailed, keys=keys)]
    except StoreError:
        raise
    except SnapError as odd:
        log.info("the chunks of %s %s are not known: %s", vm, id, odd)
        return []
