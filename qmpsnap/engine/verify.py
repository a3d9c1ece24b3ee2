"""Looking whether a snapshot is what its manifests say: every byte of the store half is read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from qmpsnap.engine.capture import Report
from qmpsnap.engine.half import open_pair
from qmpsnap.engine.listing import find
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import DamagedData, LocalFailed, SnapError
from qmpsnap.host import qemu_img
from qmpsnap.store import files, image, local
from qmpsnap.store.catalogue import Entry
from qmpsnap.store.manifest import Disk


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong: *what*, with the file or half that it is about."""

    where: str
    what: str


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """*findings* is empty when all is well."""

    id: str
    vm: str
    state: str
    findings: list[Finding]


async def verify(roots: Roots, vm: str, word: str, report: Report) -> Verified:
    """Check digests, the chains of frozen images, and that the two halves name each other.

    What is wrong comes back as findings; raises only when it cannot be looked at.
    """
    entry = await find(roots, vm, word)
    findings: list[Finding] = []
    try:
        pair = await open_pair(roots, entry)
    except DamagedData as damaged:
        findings.append(Finding(where=entry.id, what=str(damaged)))
        findings += await _of_the_store(roots, entry)
        return Verified(id=entry.id, vm=vm, state=entry.state, findings=findings)

    def tell(done: int, total: int, what: str) -> None:
        report("verifying", done, total)

    if pair.spooled:
        for one in pair.manifest.files:
            path = roots.local.spool(vm, entry.id) / one.name
            try:
                await asyncio.to_thread(files.expect, path, one, side=LocalFailed)
            except (DamagedData, LocalFailed) as damaged:
                findings.append(Finding(where=one.name, what=str(damaged)))
    else:
        problems = await roots.store.verify(vm, entry.id, seal=pair.seal, on_progress=tell)
        findings += [Finding(where=problem.file, what=problem.what) for problem in problems]
    for disk in pair.storage.disks:
        findings += await _chain(disk)
    return Verified(id=entry.id, vm=vm, state=entry.state, findings=findings)


async def _of_the_store(roots: Roots, entry: Entry) -> list[Finding]:
    """What is wrong with the files of a store half that the pair cannot be opened with."""
    try:
        paired = await asyncio.to_thread(local.read_paired, roots.local, entry.vm, entry.id)
    except DamagedData as damaged:
        return [Finding(where="paired.json", what=str(damaged))]
    if paired is None:
        return []
    problems = await roots.store.verify(entry.vm, entry.id, seal=paired.manifest_blake3)
    return [Finding(where=problem.file, what=problem.what) for problem in problems]


async def _chain(disk: Disk) -> list[Finding]:
    findings = []
    for one in disk.chain:
        try:
            difference = await asyncio.to_thread(image.changed, one)
            if difference is None and one.format == "qcow2":
                # the VM has it open beneath its overlay: look without taking its locks
                health = await qemu_img.check(Path(one.path), one.format, force_share=True)
                if health.corruptions:
                    difference = f"qemu-img check: {health.corruptions} corruptions"
        except SnapError as failed:
            difference = str(failed)
        if difference is not None:
            findings.append(Finding(where=f"disk {disk.device}", what=difference))
    return findings
