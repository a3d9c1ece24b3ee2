"""Delivering store halves: from the spool on the local root to the store, verified and sealed."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.engine import ramstore
from qmpsnap.engine.capture import Report
from qmpsnap.engine.roots import Roots, claimant, judge, moment
from qmpsnap.errors import LocalFailed, NotShipped, PacksMissing, SnapError, StoreAway, VmBusy
from qmpsnap.host import lock
from qmpsnap.host.priority import stoppable
from qmpsnap.store import files, hurt, local, pages, ramindex, remaking, shared
from qmpsnap.store.layout import MANIFEST, SIGNATURE
from qmpsnap.store.manifest import Manifest, Paired, decode
from qmpsnap.store.ramindex import NAME as INDEX
from qmpsnap.store.ramindex import Named
from qmpsnap.store.wire import Shipped

log = logging.getLogger(__name__)
_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds
_now, _sleep = time.monotonic, asyncio.sleep


@dataclass(frozen=True, slots=True)
class Delivered:
    """One store half that arrived; *bytes* is its size there."""

    vm: str
    id: str
    bytes: int


async def ship(roots: Roots, vm: str, id: str, report: Report) -> Delivered:
    """Deliver the sealed spool of one snapshot, note the pair, and remove the spool.

    One that an older version has sealed is signed first, if it is what the local half goes with.

    Raises NotShipped with the reason; the spool is whole then. Safe to repeat after any crash.
    """
    spool = roots.local.spool(vm, id)

    arrived: set[str] = set()

    def tell(done: int, total: int, what: str) -> None:
        if what.startswith("copying") and done >= total:
            arrived.add(what)
        report(f"shipping {what}" if what else "shipping", done, total)

    anew = await asyncio.to_thread(_to_replace, roots, vm)

    async def sent(device: int, instead: Mapping[str, Named]) -> Shipped:
        return await roots.store.ship(
            spool,
            vm,
            id,
            device=device,
            shared=roots.local.shared(vm),
            instead=instead,
            anew=anew,
            lease=await claimant(roots, vm),
            on_progress=tell,
        )

    async def tried() -> Shipped:
        judged = await judge(roots)
        await asyncio.to_thread(_signed, roots, vm, id)
        try:
            return await sent(judged.device, {})
        except PacksMissing as lost:
            log.warning("%s %s: %d packs are made again: %s", vm, id, len(lost.packs), lost)
            return await sent(judged.device, await _made_again(roots, vm, id, lost, report))

    try:
        shipped = await _persistently(tried, arrived, roots.ship_retry)
    except SnapError as failed:
        waiting = NotShipped(f"{vm} {id} is captured, but not shipped: {failed}")
        if isinstance(failed, PacksMissing):
            waiting.packs, waiting.hint = failed.packs, failed.hint
        raise waiting from failed
    note = Paired(
        id=id,
        manifest_blake3=shipped.manifest_blake3,
        store=str(roots.store.root.path),
        shipped_at=moment(),
    )
    await asyncio.to_thread(local.mark_paired, roots.local, vm, note)
    await asyncio.to_thread(hurt.seen, roots.local, vm, (), anew)
    await asyncio.to_thread(_remove, spool)
    await asyncio.to_thread(shared.sweep_local, roots.local, vm)
    await ramstore.trimmed(roots, vm)
    return Delivered(vm, id, shipped.bytes)


async def _persistently(
    tried: Callable[[], Awaitable[Shipped]], arrived: Collection[str], within: float
) -> Shipped:
    """What *tried* gives; again and again while the store is away, each time after a longer pause.

    Raises as *tried* does once *within* seconds have passed in which nothing more has *arrived*.
    """
    pause, ends, before = _PAUSE, 0.0, -1
    while True:
        try:
            return await tried()
        except StoreAway as away:
            if len(arrived) > before:
                pause, ends, before = _PAUSE, _now() + within, len(arrived)
            if _now() + pause > ends:
                raise
            log.warning("%s; it is tried again in %g s", away, pause)
            await _sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _signed(roots: Roots, vm: str, id: str) -> None:
    """The spool has a signature; our own if there was none. Raises LocalFailed, ManifestError."""
    spool = roots.local.spool(vm, id)
    if (spool / SIGNATURE).exists():
        return
    content = files.read_small(spool / MANIFEST, side=LocalFailed)
    manifest = decode(content, Manifest, spool / MANIFEST)
    if manifest.storage_blake3 != local.storage_digest(roots.local, vm, id):
        return  # nothing here vouches for it
    log.info("%s %s was taken by an older version: it is signed now", vm, id)
    files.publish(spool / SIGNATURE, roots.keyring.sign(content), side=LocalFailed)


def _to_replace(roots: Roots, vm: str) -> set[str]:
    """Packs that are here, and were damaged when somebody last read them on the store."""
    damaged = hurt.packs(roots.local, vm)
    return {one for one in damaged if (roots.local.shared(vm) / one).exists()}


async def _made_again(
    roots: Roots, vm: str, id: str, lost: PacksMissing, report: Report
) -> dict[str, Named]:
    """Packs that have what the spool needs of those that are *lost*, from page images kept here.

    Raises *lost* where that cannot be, LocalFailed.
    """
    path, to = roots.local.spool(vm, id) / INDEX, roots.local.shared(vm)

    def tell(done: int, total: int, what: str) -> None:
        report(what, done, total)

    def work(stop: Callable[[], bool]) -> dict[str, Named]:
        files.make_folders(to, roots.local.path, side=LocalFailed)
        index = ramindex.read(path, side=LocalFailed, keys=roots.secrets)
        near = [one.parent for one in pages.indexes(roots.local, vm)]
        return remaking.remade(
            index, lost.packs, near, to, keys=roots.secrets, on_progress=tell, cancelled=stop
        )

    try:
        return await stoppable(work)
    except PacksMissing as still:
        log.warning("%s %s: %s", vm, id, still)
        raise lost from still


async def ship_all(
    roots: Roots, vm: str | None, report: Report
) -> tuple[list[Delivered], list[NotShipped]]:
    """Deliver every sealed spool of *vm*, or of all VMs; a VM that an engine works on waits."""
    delivered: list[Delivered] = []
    failed: list[NotShipped] = []
    for name in await asyncio.to_thread(roots.local.vms) if vm is None else [vm]:
        if not any(one.spool for one in await asyncio.to_thread(local.survey, roots.local, name)):
            continue
        try:
            # two that ship one spool would write the same partial files
            async with lock.held(roots.local.lock(name), "ship"):
                sent, waiting = await ship_waiting(roots, name, report)
        except VmBusy as busy:
            sent, waiting = [], [NotShipped(f"{name}: {busy}")]
        delivered += sent
        failed += waiting
    return delivered, failed


async def ship_waiting(
    roots: Roots, vm: str, report: Report
) -> tuple[list[Delivered], list[NotShipped]]:
    """As `ship_all`, for a *vm* whose lock the caller holds."""
    delivered: list[Delivered] = []
    failed: list[NotShipped] = []
    for facts in await tidied(roots, vm):
        if facts.paired or facts.storage is None or facts.spooled is None or facts.problem:
            continue
        try:
            delivered.append(await ship(roots, vm, facts.id, report))
        except NotShipped as trouble:
            failed.append(trouble)
    return delivered, failed


async def tidied(roots: Roots, vm: str) -> list[local.LocalFacts]:
    """What is left here of halves that have arrived goes, where a crash came after their note.

    What the host has of each snapshot is returned. The caller holds the VM's lock. Raises
    LocalFailed.
    """
    found = await asyncio.to_thread(local.survey, roots.local, vm)
    for facts in found:
        if facts.paired is not None and facts.spool:
            await asyncio.to_thread(_remove, roots.local.spool(vm, facts.id))
    await asyncio.to_thread(shared.sweep_local, roots.local, vm)
    return found


def _remove(spool: Path) -> None:
    try:
        shutil.rmtree(spool)
    except OSError as failed:
        raise LocalFailed(f"{spool}: {failed.strerror}") from failed
