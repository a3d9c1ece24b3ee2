"""`restore --check`: whether this snapshot can come back on this host, before anything starts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qmpsnap.engine import (
    bootfiles,
    companion,
    configuration,
    confined,
    here,
    history,
    ramback,
    restoration,
    tpm,
    usage,
)
from qmpsnap.engine.assessed import Assessed
from qmpsnap.engine.assessed import Fitness as Fitness
from qmpsnap.engine.blueprint import Blueprint, with_memory
from qmpsnap.engine.comparison import Captured, compare
from qmpsnap.engine.confined import Wanted
from qmpsnap.engine.half import Glanced, open_pair
from qmpsnap.engine.limiting import Choice
from qmpsnap.engine.listing import find
from qmpsnap.engine.restoration import Ready, Restoration
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.spool import MACHINE, USAGE
from qmpsnap.engine.unsealing import is_sealed, needed
from qmpsnap.engine.usage import Usage
from qmpsnap.engine.verdict import row
from qmpsnap.errors import (
    DamagedData,
    HalfMissing,
    LocalFailed,
)
from qmpsnap.host.priority import in_background
from qmpsnap.store.manifest import Image, Shared
from qmpsnap.store.points import Points
from qmpsnap.store.points import read as read_points
from qmpsnap.store.sealedimages import keys_of
from qmpsnap.units import in_bytes


async def check(roots: Roots, vm: str, word: str, wish: Restoration) -> Fitness:
    """What a restore would find; nothing is started and nothing is written.

    Raises SnapshotUnknown, HalfMissing and their kin for what is no whole pair, StoreError.
    """
    return (await assess(roots, vm, word, wish)).shown()


async def assess(roots: Roots, vm: str, word: str, wish: Restoration) -> Assessed:
    """As `check`, with what a restore goes on with."""
    async with roots.store.lasting() as store:
        return await _assessed(replace(roots, store=store), vm, word, wish)


async def _assessed(roots: Roots, vm: str, word: str, wish: Restoration) -> Assessed:
    pair = await open_pair(roots, await find(roots, vm, word))
    points = await asyncio.to_thread(read_points, roots.local, vm)
    found = Assessed(pair, wish)
    if pair.signed is not None and pair.signed.verdict != "trusted":
        found.differs("signature", f"{pair.signed.words}, and accepted as it is")
    if (key := pair.manifest.key) is not None:
        with found.row("encryption", f"key {key}", "the key is here"):
            await asyncio.to_thread(roots.secrets, key)
        if found.errors:
            return found  # nothing of it can be read
    with found.row("revision", str(pair.storage.revision), "there"):
        pair = replace(pair, storage=restoration.storage_of(pair, points, wish))
        found.pair = pair
    with found.row("state", "RAM" if pair.manifest.ram.file else "disks", _how(wish)):
        restoration.refuse_mode(pair, wish)
    chains = await in_background(_chains, found, points)
    with found.row("folder", "-", str(wish.to)):
        await asyncio.to_thread(restoration.refuse_folder, wish.to)
        if wish.ram_in is not None:
            await asyncio.to_thread(restoration.refuse_folder, wish.ram_in)
    other = await bootfiles.differing(pair)
    whole = [one.entry.name for one in pair.manifest.shared if one.path in other]
    seen = await pair.glance(MACHINE, USAGE, tpm.NAME, whole=whole)
    _files(found, seen)
    _packs(found, seen)
    chosen = bootfiles.choices(pair, other, seen)
    _boot_files(found, chosen)
    machine = None
    with found.row(MACHINE, pair.manifest.qemu_version, "can be read"):
        machine = configuration.decode(seen.text(MACHINE), str(Path(vm, pair.id, MACHINE)))
    used = None
    try:
        used = usage.decode(seen.text(USAGE), str(Path(vm, pair.id, USAGE)))
    except (DamagedData, LocalFailed) as odd:  # a restore can do without
        found.differs(USAGE, str(odd))
    if machine is not None:
        fetched = [one.file for one in chosen if one.fetched]
        await _compared(found, machine, used, chains, fetched, seen)
    return found


async def _compared(
    found: Assessed,
    machine: configuration.Configuration,
    used: Usage | None,
    chains: Chains,
    fetched: Sequence[Shared],
    seen: Glanced,
) -> None:
    pair, wish = found.pair, found.wish
    came = ", ".join(machine.hotplugged) or "nothing"
    went = ", ".join(machine.unplugged) or "nothing"
    changed = bool(machine.hotplugged or machine.unplugged)
    captured = f"{came} came, {went} went" if changed else "none"
    here_now = "cold-plugged at their places" if machine.reconciled else "left out"
    with found.row("hotplug", captured, here_now if changed else "none"):
        restoration.refuse_hotplugged(machine, wish)
    ready: Ready | None = None
    with found.row("command line", f"{len(machine.options or [])} options", "can be moved"):
        ready = restoration.ready(pair, wish, machine, fetched)
    if ready is None:
        return
    ready, rows = companion.with_tpm(ready, seen)
    found.made = ready
    found.rows += rows
    facts = await here.look(ready, machine, chains.plain, chains.decrypted_bytes)
    version = facts.binary.version if facts.binary is not None else "0"
    if not wish.cold:
        memory = await asyncio.to_thread(
            ramback.chosen,
            pair,
            to=wish.to,
            eager=wish.eager,
            shared=wish.pages,
            ram_in=wish.ram_in,
        )
        ready = found.made = with_memory(ready, memory, machine, version)
        found.rows += ramback.rows(ready.memory, pair.manifest.ram)

    found.blueprint = Blueprint(machine, tuple(fetched), seen, version, ready)
    within = None
    usages = [used] if used is not None else []
    if wish.limits is Choice.SUGGEST:
        usages = [*await history.earlier(pair.roots, pair.vm, pair.id), *usages]
    choice, parent = wish.limits, wish.limits_parent
    wanted = Wanted(choice, parent, wish.to, usages, machine, pair.manifest.host)
    with found.row("limits", "-", str(choice)):
        within = await confined.look(wanted)
    if within is not None:
        facts = replace(facts, headroom=replace(facts.headroom, ceilings=within.ceilings))
        found.made = replace(ready, limits=within.limits, site=within.site)
    host, held = pair.manifest.host, _used(used) if used is not None else None
    found.rows += compare(Captured(machine, ready, held, host), facts)
    if within is not None:
        found.rows += confined.rows(within, machine, facts.headroom.cpu_count)


def _how(wish: Restoration) -> str:
    return "booted from its disks" if wish.cold else "goes on with its RAM"


@dataclass(frozen=True, slots=True)
class Chains:
    """The images of the disks: the *plain* ones, and what the others take, decrypted, in bytes."""

    plain: list[list[Image]]
    decrypted_bytes: int


def _chains(found: Assessed, points: Points) -> Chains:
    pair, plain, decrypted = found.pair, list[list[Image]](), 0
    known = {pair.manifest.key}
    for disk in pair.storage.disks:
        keys: list[str] = []
        with found.row(f"disk {disk.device}", disk.level):
            restoration.refuse_changed(pair, points, disk)
            chain = restoration.images(pair, points, disk)
            keys = keys_of(chain)
            if not is_sealed(chain):
                plain.append(chain)
            elif all(map(pair.roots.secrets.has, keys)):
                decrypted += needed(pair.vm, chain, pair.roots.secrets)
        for key in (one for one in keys if one not in known):
            known.add(key)
            with found.row("encryption of disks", f"key {key}", "the key is here"):
                pair.roots.secrets(key)
    return Chains(plain, decrypted)


def _files(found: Assessed, seen: Glanced) -> None:
    manifest = found.pair.manifest
    for entry in manifest.files:
        if entry.name in (MACHINE, USAGE):
            continue  # they are read, and told then
        if entry.name.split("/")[0] in (tpm.NAME, tpm.FOLDER):
            continue  # with the TPM itself
        ram = entry.name == manifest.ram.file
        ram |= entry.name == manifest.ram.index and not ramback.kept_here(found.pair)
        size = in_bytes(entry.bytes)
        if entry.name in seen.wrong and not (ram and not found.wish.cold):
            found.differs(entry.name, str(seen.wrong[entry.name]))
            continue
        with found.row("vmstate" if ram else entry.name, size, size):
            if entry.name in seen.wrong:
                raise seen.wrong[entry.name]


def _packs(found: Assessed, seen: Glanced) -> None:
    """The RAM that is shared with other snapshots: one row, which tells of the first that lacks."""
    packs = found.pair.manifest.packs
    if not packs:
        return
    wrong = [one.entry.name for one in packs if one.entry.name in seen.wrong]
    size = f"{in_bytes(sum(one.used_bytes for one in packs))} in {len(packs)} packs"
    if wrong and (found.wish.cold or ramback.kept_here(found.pair)):
        found.differs("RAM", str(seen.wrong[wrong[0]]))
        return
    with found.row("RAM", size, size):
        if wrong:
            raise seen.wrong[wrong[0]]


def _boot_files(found: Assessed, chosen: Sequence[bootfiles.Choice]) -> None:
    for one in chosen:
        what, size = f"{one.file.option} {one.file.path}", in_bytes(one.file.bytes)
        if one.trouble:
            with found.row(what, size):
                raise HalfMissing(one.trouble)
            continue
        here = "the copy of the snapshot" if one.fetched else "as it was"
        found.rows.append(row(what, size, here, differs=one.remark))


def _used(figures: Usage) -> int | None:
    """Bytes of memory that the VM's process held, swap included: the most of all samples."""
    held = [one.memory for one in (figures.before, figures.after) if one is not None]
    known = [one.rss_bytes + (one.swap_bytes or 0) for one in held if one and one.rss_bytes]
    return max(known, default=None)
