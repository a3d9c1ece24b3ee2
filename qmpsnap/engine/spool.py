"""The store half on its way: built whole on the local root, before anything goes to the store."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from qmpsnap import private
from qmpsnap.engine import configuration, ramstore, tpm, usage
from qmpsnap.engine.capture import Captured, Report
from qmpsnap.engine.copy import Copied
from qmpsnap.engine.identity import identity_of
from qmpsnap.engine.plan import Plan, PlannedDisk, cheapest
from qmpsnap.engine.roots import Roots, host_id, moment
from qmpsnap.engine.survey import Survey
from qmpsnap.engine.wishes import Level
from qmpsnap.errors import LocalFailed
from qmpsnap.host import qemu_img
from qmpsnap.host.priority import in_background
from qmpsnap.hypervisor.block.graph import Node
from qmpsnap.hypervisor.machine.reconcile import numbered
from qmpsnap.hypervisor.vmstate import sections
from qmpsnap.hypervisor.vmstate.session import RamMode
from qmpsnap.store import box, contents, files, manifest, points
from qmpsnap.store.box import Role
from qmpsnap.store.image import examine_image
from qmpsnap.store.layout import MANIFEST, SIGNATURE
from qmpsnap.store.manifest import (
    RAM_STORED_ONCE,
    Binding,
    Disk,
    FileEntry,
    Image,
    Manifest,
    Ram,
    Shared,
    Storage,
    encode,
)
from qmpsnap.store.sealedimages import opened_chain
from qmpsnap.store.secret import Secret

MACHINE = "machine.json"
USAGE = "usage.json"
_LEVELS: dict[Level, manifest.Level] = {
    Level.OVERLAY: "overlay",
    Level.FULL: "full",
    Level.INC: "inc",
    Level.DIFF: "diff",
}


def storage(
    plan: Plan,
    captured: Captured,
    copied: Mapping[str, Copied],
    *,
    of: str | None = None,
    revision: int = 0,
) -> Storage:
    """What the local half will say: its copies, and the frozen chains as they lie on disk now.

    *of* is the snapshot whose *revision* this is, when it is not one of its own. Raises
    LocalFailed when a file of a chain cannot be read.
    """
    disks = [_disk(disk, copied.get(disk.label)) for disk in plan.disks]
    return Storage(
        version=manifest.version_of(image for disk in disks for image in disk.chain),
        id=of or str(plan.id),
        vm=plan.vm,
        host=host_id(),
        taken_at=moment(captured.pause.stopped_at),
        revision=revision,
        revision_id=str(plan.id) if of else None,
        level=_LEVELS[cheapest(_level(disk, copied.get(disk.label)) for disk in plan.disks)],
        disks=disks,
        left_out=list(plan.left_out),
    )


def _level(disk: PlannedDisk, copied: Copied | None) -> Level:
    return Level.FULL if copied is not None and copied.instead else disk.chosen.level


def _disk(disk: PlannedDisk, copied: Copied | None) -> Disk:
    instead = copied.instead if copied is not None else ""
    beneath = disk.chosen.beneath if not instead else None
    whole = Disk(
        label=disk.label,
        device=disk.site.name,
        qdev=disk.site.disk.qdev or None,
        origin=disk.site.origin,
        node=disk.site.disk.top.name,
        role="pflash" if disk.site.flash else "disk",
        level=_LEVELS[_level(disk, copied)],
        virtual_size_bytes=disk.site.disk.top.virtual_size,
        chain=[],
        overlay=None,
        parent=beneath.name if beneath is not None else None,
        reason=instead or disk.chosen.reason,
        bitmap=disk.bitmap,
    )
    if copied is None:
        chain = _chain(disk.site.disk.chain, disk.site.paths)
        return msgspec.structs.replace(whole, chain=chain, overlay=str(disk.overlay.path))
    return msgspec.structs.replace(
        whole, chain=[copied.image], means=copied.means, bytes_written=copied.bytes_written
    )


def _chain(nodes: tuple[Node, ...], paths: tuple[str, ...]) -> list[Image]:
    images = []
    for node, path in zip(nodes, paths, strict=True):
        driver = node.driver if node.driver in {"qcow2", "raw"} else "raw"
        images.append(examine_image(Path(path), driver, node.virtual_size))
    return images


async def build(
    roots: Roots,
    folder: Path,
    plan: Plan,
    facts: Survey,
    captured: Captured,
    half: Storage,
    used: usage.Usage,
    *,
    raw: Path,
    note: str,
    trial: bool,
    report: Report,
    lenders: Sequence[str] | None = (),
    shared: Sequence[Shared] = (),
    held: tpm.Held | None = None,
    secret: Secret | None = None,
) -> Manifest:
    """Fill *folder* with the store half, sign and seal it there. *raw* is stored, then deleted.

    With a *secret* all of it is encrypted, but for what a manifest says of one that is.

    What is *shared* with other snapshots is on the local root by now. *held* is the VM's TPM;
    *lenders* are other VMs whose RAM need not be stored again.

    Raises LocalFailed, and what `Keyring.sign` does; what was written stays for the caller to
    remove.
    """
    if facts.reconciled is not None and captured.mode is not RamMode.NONE:
        networks = await asyncio.to_thread(sections.numbers, raw, "slirp")
        facts = replace(facts, reconciled=numbered(facts.reconciled, networks))
    machine = configuration.of(facts)
    await asyncio.to_thread(_small, folder / MACHINE, configuration.encode(machine))
    await asyncio.to_thread(_small, folder / USAGE, usage.encode(used))
    names = [MACHINE, USAGE]
    flash = [disk for disk in half.disks if disk.role == "pflash"]
    for disk in flash:
        if disk.chain[0].key is None:
            names.append(name := _nvram_name(disk))
            await _nvram(disk, folder / name)
    if held is not None:
        names += await asyncio.to_thread(tpm.write, folder, held)
    ram = Ram(
        mode=captured.mode.value,
        asked=plan.asked.value,
        reason=captured.reason,
        raw_bytes=0,
        file=None,
        raw_blake3=None,
        compression="zstd",
    )
    place = (plan.vm, str(plan.id))
    entries = [await asyncio.to_thread(_entry, folder, name, place, secret) for name in names]
    if secret is not None:
        entries += [
            await in_background(_sealed_nvram, roots, folder, disk, place, secret)
            for disk in flash
            if disk.chain[0].key is not None
        ]
    kept = ramstore.Stored(ram, [], [])
    if captured.mode is not RamMode.NONE:
        kept = await ramstore.stored(
            roots, plan.vm, str(plan.id), raw, folder, ram, report, lenders, secret
        )
    bound = identity_of(facts)
    manifest = Manifest(
        id=str(plan.id),
        vm=plan.vm,
        host=half.host,
        identity=Binding(uuid=bound.uuid, disks=bound.disks),
        taken_at=half.taken_at,
        qemu_version=facts.abilities.version,
        ram=kept.ram,
        quiesce="agent" if plan.freeze else "none",
        frozen=plan.freeze,
        pause_ms=round(captured.pause.milliseconds, 3),
        frozen_ms=None if captured.frozen_ms is None else round(captured.frozen_ms, 3),
        was="running" if plan.running else "paused",
        files=[*entries, *kept.files],
        storage_blake3=files.digest_bytes(encode(half)),
        note=note,
        trial_store=trial,
        shared=list(shared),
        packs=kept.packs,
        version=RAM_STORED_ONCE if kept.ram.index else 1,
    )
    if secret is not None:
        manifest = contents.sealed(manifest, secret)
    content = encode(manifest)
    signed = await asyncio.to_thread(roots.keyring.sign, content)
    await asyncio.to_thread(files.publish, folder / SIGNATURE, signed, side=LocalFailed)
    await asyncio.to_thread(files.publish, folder / MANIFEST, content, side=LocalFailed)
    return manifest


async def _nvram(disk: Disk, path: Path) -> None:
    await asyncio.to_thread(private.folders, path.parent)
    top = disk.chain[0]
    await qemu_img.convert(Path(top.path), top.format, path, "raw")


def _nvram_name(disk: Disk) -> str:
    return f"nvram/{disk.label}.raw"


def _sealed_nvram(
    roots: Roots, folder: Path, disk: Disk, place: tuple[str, str], secret: Secret
) -> FileEntry:
    """As `_nvram` and `_entry` do, of an image that is encrypted: never in the clear."""
    vm, name = place[0], _nvram_name(disk)
    chain = [*disk.chain]
    if disk.parent is not None:
        there = points.read(roots.local, vm)
        chain += there.images(there.by_name[disk.parent], disk.label)
    with opened_chain(vm, chain, None, roots.secrets) as image:
        (content,) = image.read([(0, image.virtual_size)])
    encrypted = box.sealed_bytes(bytes(content), secret, Role(*place, name))
    _small(folder / name, encrypted)
    return FileEntry(name=name, bytes=len(encrypted), blake3=files.digest_bytes(encrypted))


def _small(path: Path, content: bytes) -> None:
    private.folders(path.parent)
    files.publish(path, content, side=LocalFailed)


def _entry(folder: Path, name: str, place: tuple[str, str], secret: Secret | None) -> FileEntry:
    if secret is None:
        size, digest = files.digest_file(folder / name, side=LocalFailed)
    else:
        size, digest = box.seal_over(folder / name, secret, Role(*place, name), side=LocalFailed)
    return FileEntry(name=name, bytes=size, blake3=digest)
