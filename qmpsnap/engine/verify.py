"""Looking whether a snapshot is what its manifests say: every byte that we wrote is read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Set
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from qmpsnap.engine import boot, chains, info, listing
from qmpsnap.engine.boot import Boot, Trial
from qmpsnap.engine.capture import Report
from qmpsnap.engine.chains import Finding
from qmpsnap.engine.half import Pair, open_pair
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import (
    DamagedData,
    Foreign,
    KeyMissing,
    LocalFailed,
    MonitorAbsent,
    MonitorBusy,
    SnapError,
    SnapshotUnknown,
    StoreError,
    Unsigned,
    Untrusted,
    VmBusy,
    VmUnknown,
)
from qmpsnap.host.priority import in_background
from qmpsnap.store import files, hurt, local, pages
from qmpsnap.store.catalogue import Entry
from qmpsnap.store.layout import MANIFEST, SHARED, SIGNATURE, STORAGE
from qmpsnap.store.manifest import Manifest, Paired, decode
from qmpsnap.store.signature import Signed

log = logging.getLogger(__name__)
_LOST = (
    "a whole file of that name, from wherever it may be had, puts it right; the next `create` "
    "relies on no pack of RAM that is damaged, and stores what it needs of it anew"
)


class Next(msgspec.Struct, frozen=True, kw_only=True):
    """What the running VM's dirty bitmaps are good for: the next copy of *disk*, and why."""

    disk: str
    level: str
    why: str


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """*findings* is empty when all is well; *boot* is None when none was tried.

    *next* is empty where the VM was not asked. A bitmap that is no good is no damage: the next
    copy is a full then. *signature*: who vouches for it; None where there is no manifest.
    *encryption*: the ID of the key that the store half is encrypted with; where it is not
    *decrypted*, as that key is not here, files are known to be as they were stored, and no more.
    *disk_keys*: the IDs of the keys that its copies of disks are encrypted with, and those that
    they stand on; of the keys in *missing_keys* the same is so.
    """

    id: str
    vm: str
    state: str
    findings: list[Finding]
    boot: Boot | None = None
    next: list[Next] = []
    signature: Signed | None = None
    encryption: str | None = None
    decrypted: bool = False
    disk_keys: list[str] = []
    missing_keys: list[str] = []

    @property
    def untrusted(self) -> bool:
        """Whether all that is wrong is that nobody vouches for it."""
        return bool(self.findings) and all(one.where == SIGNATURE for one in self.findings)

    @property
    def hint(self) -> str:
        """What can be done about it."""
        if self.untrusted and self.signature is not None:
            return (Unsigned if self.signature.verdict == "unsigned" else Foreign).hint
        return _LOST if any(one.where.startswith(f"{SHARED}/") for one in self.findings) else ""


async def verify(
    roots: Roots,
    vm: str,
    word: str,
    report: Report,
    trial: Trial | None = None,
    machine: Machine | None = None,
) -> Verified:
    """Check digests, the images of all revisions, and that the two halves name each other.

    With *trial* the snapshot is also brought back once; a snapshot that is no pair any more is
    not, and its findings say why.

    A *machine* that answers is asked whether its bitmaps match the newest copies.

    What is wrong comes back as findings, also that nobody vouches for the store half, of which
    nothing is read then, and that the store cannot be read where something else is wrong. Raises
    only when it cannot be looked at: StoreError, LocalFailed, and Refused for a *trial* that this
    host or this snapshot does not allow.
    """
    entry = await listing.find(roots, vm, word)

    def tell(done: int, total: int) -> None:
        report("verifying", done, total)

    findings: list[Finding] = []
    pair: Pair | None = None
    disk_keys: list[str] = []
    dead: StoreError | None = None
    try:
        try:
            pair = await open_pair(roots, entry)
        except Untrusted as refused:
            findings.append(Finding(where=SIGNATURE, what=str(refused)))
        except DamagedData as damaged:
            findings.append(Finding(where=entry.id, what=str(damaged)))
            findings += await _of_the_store(roots, entry)
        else:
            if trial is not None:
                trial = await asyncio.to_thread(boot.settled, pair, trial)
            findings += await _of_the_pair(pair, report)
    except StoreError as failed:
        dead = failed  # what is here is looked at all the same
    if entry.local:
        findings += await chains.check(roots.local, vm, entry.id, tell, roots.secrets)
        disk_keys = await chains.keys_of(roots.local, vm, entry.id)
    if dead is not None:
        if not findings:
            raise dead
        findings.append(Finding(where="store", what=f"could not be read: {dead}"))
    seen = None
    if pair is not None and trial is not None and dead is None:
        try:
            seen = await boot.boot(pair, trial, report)
        except SnapError as failed:
            if not findings:
                raise
            findings.append(Finding(where="boot", what=f"could not be tried: {failed}"))
        else:
            if seen.problem:
                findings.append(Finding(where="boot", what=seen.problem))
    return Verified(
        id=entry.id,
        vm=vm,
        state=entry.state,
        findings=findings,
        boot=seen,
        next=await _next(roots, machine),
        signature=entry.signature,
        encryption=entry.encryption,
        decrypted=await _decrypted(roots, entry),
        disk_keys=disk_keys,
        missing_keys=await asyncio.to_thread(_missing, roots, disk_keys),
    )


def _missing(roots: Roots, keys: list[str]) -> list[str]:
    return [key for key in keys if not roots.secrets.has(key)]


async def _decrypted(roots: Roots, entry: Entry) -> bool:
    if entry.encryption is None:
        return False
    return await asyncio.to_thread(roots.secrets.has, entry.encryption)


async def verify_all(
    roots: Roots, vm: str, report: Report, machine: Machine | None = None
) -> AsyncGenerator[Verified, None]:
    """As `verify`, for each snapshot of *vm*, oldest first; a pack that several need is read once.

    A *machine* is asked when the newest is looked at. Raises SnapshotUnknown when there is none.
    """
    entries = await listing.entries(roots, vm)
    if not entries:
        raise SnapshotUnknown(f"{vm} has no snapshot")
    async with roots.store.lasting() as store:
        lasting = replace(roots, store=store)
        for entry in entries:
            asked = machine if entry == entries[-1] else None
            yield await verify(lasting, vm, entry.id, report, machine=asked)


async def _next(roots: Roots, machine: Machine | None) -> list[Next]:
    if machine is None:
        return []
    try:
        disks = (await info.info(roots, machine)).disks
    except (MonitorAbsent, MonitorBusy, VmBusy, VmUnknown):
        return []
    return [Next(disk=one.name, level=one.level, why=one.level_why) for one in disks if one.level]


async def _of_the_pair(pair: Pair, report: Report) -> list[Finding]:
    """What is wrong with the files of a store half, wherever it is now."""

    def tell(done: int, total: int, what: str) -> None:
        report("verifying", done, total)

    roots, findings = pair.roots, await _of_the_pages(pair, tell)
    if not pair.spooled:
        problems = await roots.store.verify(pair.vm, pair.id, seal=pair.seal, on_progress=tell)
        findings += [Finding(where=one.file, what=one.what) for one in problems]
        return findings + await _of_others(pair, {one.file for one in problems})
    for one in pair.plain:
        path = pair.spooled_at(one)
        try:
            await asyncio.to_thread(files.expect, path, one, side=LocalFailed)
        except (DamagedData, LocalFailed) as damaged:
            findings.append(Finding(where=one.name, what=str(damaged)))
    try:
        problems = await pair.packs(whole=True, tell=tell)
    except StoreError as dead:
        if not findings:
            raise
        return [*findings, Finding(where="shared", what=f"could not be read: {dead}")]
    return findings + [Finding(where=problem.file, what=problem.what) for problem in problems]


async def _of_others(pair: Pair, wrong: Set[str]) -> list[Finding]:
    """Which other snapshots of the store need the packs that are among the files *wrong*.

    Those packs are remembered: no later snapshot relies on them.
    """
    if MANIFEST in wrong or not pair.manifest.packs:
        return []
    lost = {one.blake3 for one in pair.manifest.packs if one.entry.name in wrong}
    whole = {one.blake3 for one in pair.manifest.packs} - lost
    try:
        await asyncio.to_thread(hurt.seen, pair.roots.local, pair.vm, lost, whole)
    except LocalFailed as failed:
        log.warning("the next snapshot may rely on packs that are damaged: %s", failed)
    if not lost:
        return []
    needed: dict[str, list[str]] = {}
    # a pack may be a link to another VM's, or have one
    for one in (await pair.roots.store.catalogue()).found:
        if one.manifest is None or (one.vm, one.id) == (pair.vm, pair.id):
            continue
        who = one.id if one.vm == pair.vm else f"{one.vm} {one.id}"
        with suppress(DamagedData):
            manifest = decode(one.manifest.encode(), Manifest, Path(one.id))
            for name in (pack.entry.name for pack in manifest.packs if pack.blake3 in lost):
                needed.setdefault(name, []).append(who)
    return [
        Finding(where=name, what=f"is needed by {', '.join(ids)}, too: `verify` tells what of it")
        for name, ids in needed.items()
    ]


async def _of_the_pages(pair: Pair, tell: files.Progress) -> list[Finding]:
    """What is wrong with the page images that are kept here: a restore would take them."""
    if (name := pair.manifest.ram.index) is None:
        return []
    folder = pair.roots.local.ram(pair.vm, pair.id)
    digest = pair.entry(name).blake3
    try:
        wrong = await in_background(pages.wrong, folder, digest, tell, pair.roots.secrets)
    except KeyMissing:
        return []
    if wrong:
        wrong.append(f"{folder}: may be removed, the store has all of it")
    return [Finding(where="pages", what=one) for one in wrong]


async def _of_the_store(roots: Roots, entry: Entry) -> list[Finding]:
    """What is wrong with the files of a store half that the pair cannot be opened with."""
    try:
        paired = await asyncio.to_thread(local.read_paired, roots.local, entry.vm, entry.id)
    except DamagedData as damaged:
        return [Finding(where="paired.json", what=str(damaged))]
    if paired is None:
        return []
    problems = await roots.store.verify(entry.vm, entry.id, seal=paired.manifest_blake3)
    findings = [Finding(where=problem.file, what=problem.what) for problem in problems]
    return findings + await _of_the_seal(roots, entry, paired)


async def _of_the_seal(roots: Roots, entry: Entry, paired: Paired) -> list[Finding]:
    """Whether it is the local half's manifest that changed since the two halves were paired."""
    found = (await roots.store.catalogue(entry.vm)).found
    seal = next((one for one in found if one.id == entry.id), None)
    if seal is None or seal.manifest is None or seal.manifest_blake3 != paired.manifest_blake3:
        return []
    path = roots.local.storage(entry.vm, entry.id)
    try:
        now = await asyncio.to_thread(local.storage_digest, roots.local, entry.vm, entry.id)
        manifest = decode(seal.manifest.encode(), Manifest, path)
    except SnapError:
        return []  # it is a finding already
    if now == manifest.storage_blake3:
        return []
    return [Finding(where=STORAGE, what=f"{path}: is not what the store half names (BLAKE3)")]
