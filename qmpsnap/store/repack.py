"""Packs of which little is needed any more: the only place that moves the rest into new ones.

A new pack is whole first; then a note leads to it from the old one (see `moved`); then the old one
goes. Whatever is cut off, each chunk that is needed is in one of the two, and the next sweep goes
on. While an old pack is there, its note says nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qmpsnap.errors import DamagedData, KeyMissing, SnapError, StoreError
from qmpsnap.store import moved, ramhalf
from qmpsnap.store.chunking import PACK
from qmpsnap.store.files import Progress, sync_folder
from qmpsnap.store.layout import StoreRoot, aside
from qmpsnap.store.manifest import Manifest
from qmpsnap.store.ramindex import Named
from qmpsnap.store.rampack import ROWS, Frame, Writer, copy, key_of, table
from qmpsnap.store.secret import Keys, none


class Look(Protocol):
    """What the snapshots on the store need: *manifests* are those that were read, by their IDs."""

    manifests: dict[str, Manifest]

    def needed(self) -> set[str] | None:
        """Looks again; None when a manifest cannot be read, so that nothing may go."""


@dataclass(frozen=True, slots=True)
class _Old:
    """A pack, encrypted with *key* or not, what is needed of it, and where that lies."""

    path: Path
    key: str | None
    frames: dict[bytes, Frame]

    @property
    def bytes(self) -> int:
        return sum(frame.length for frame in self.frames.values())


def repack(
    root: StoreRoot,
    vm: str,
    look: Look,
    waiting: Collection[str],
    progress: Progress | None,
    keys: Keys = none,
) -> None:
    """Move what is needed out of packs that are less than half needed; those go.

    Packs that *waiting* names stay as they are: who waits may need more of them. So do damaged
    ones. Nothing is done where a manifest or an index cannot be read, be it for want of a key.
    Raises StoreError, OSError.
    """
    if not any(one.packs for one in look.manifests.values()) or look.needed() is None:
        return
    folder = root.shared(vm)
    try:
        lying = _lying(folder, look.manifests.values(), waiting)
        kept = {lying[one] for one in waiting if one in lying}
        noted = {name for name in lying.values() if moved.there(moved.note(folder / name))}
        sparse = _maybe_sparse(folder, look.manifests.values(), lying) - kept
        if not noted and not sparse:
            return
        needs = _needs(root, look.manifests, lying, noted | sparse, keys)
    except SnapError:
        return
    for name in sorted(noted):
        if not _settled(folder / name, needs[name], look, stays=name in kept):
            return
    olds = []
    for name in sorted(one for one in sparse if (folder / one).exists()):
        with suppress(DamagedData):
            frames = table(folder / name, side=StoreError)
            if needs[name] <= frames.keys():
                key = key_of(folder / name, side=StoreError)
                old = _Old(folder / name, key, {one: frames[one] for one in needs[name]})
                if old.bytes * 2 < (folder / name).stat().st_size:
                    olds.append(old)
    for group in _grouped(olds):
        if not _moved(folder, group, look, keys, progress):
            return


def _lying(folder: Path, manifests: Iterable[Manifest], waiting: Collection[str]) -> dict[str, str]:
    """Where the packs that are listed lie, by their digests; lost ones are left out."""
    found = {}
    for name in {pack.blake3 for one in manifests for pack in one.packs} | set(waiting):
        with suppress(DamagedData):
            _, other = moved.lies(folder / name, side=StoreError)
            found[name] = other.blake3 if other is not None else name
    return found


def _maybe_sparse(
    folder: Path, manifests: Iterable[Manifest], lying: Mapping[str, str]
) -> set[str]:
    """Packs of which no snapshot by itself needs half."""
    most: dict[str, int] = {}
    for one in manifests:
        used: dict[str, int] = {}
        for pack in one.packs:
            if pack.blake3 in lying:
                name = lying[pack.blake3]
                used[name] = used.get(name, 0) + pack.used_bytes
        for name, count in used.items():
            most[name] = max(most.get(name, 0), count)
    sizes = {name: folder / name for name in most}
    return {
        name for name, path in sizes.items()
        if path.exists() and most[name] * 2 < path.stat().st_size
    }  # fmt: skip


def _needs(
    root: StoreRoot,
    manifests: Mapping[str, Manifest],
    lying: Mapping[str, str],
    wanted: set[str],
    keys: Keys,
) -> dict[str, set[bytes]]:
    """The chunks that snapshots need of the packs *wanted*. Raises SnapError for an index."""
    found: dict[str, set[bytes]] = {name: set() for name in wanted}
    for id, manifest in manifests.items():
        listed = {pack.blake3: lying.get(pack.blake3, "") for pack in manifest.packs}
        if wanted.isdisjoint(listed.values()):
            continue
        path = root.snapshot(manifest.vm, id) / str(manifest.ram.index)
        index = ramhalf.index_of(manifest, path, keys=keys)
        places = [listed[pack.blake3] for pack in index.packs]
        for row, number in enumerate(index.pack_numbers):
            if places[number] in found:
                found[places[number]].add(index.digest(row))
    return found


def _settled(pack: Path, needed: set[bytes], look: Look, *, stays: bool) -> bool:
    """A pack with a note goes, if the other one has all that is needed; else the note does.

    False when somebody else is at work here.
    """
    new = moved.read(pack, side=StoreError)
    other = moved.there(pack.with_name(new.new.blake3)) if new is not None else None
    with suppress(DamagedData):
        if not stays and other is not None and needed <= table(other, side=StoreError).keys():
            return _gone(pack, look)
    for path in (moved.note(pack), aside(moved.note(pack))):
        path.unlink(missing_ok=True)
    sync_folder(pack.parent)
    return True


def _grouped(olds: Iterable[_Old]) -> list[list[_Old]]:
    """Those that go into one new pack: of one key."""
    groups: list[list[_Old]] = []
    room = rows = 0
    for old in sorted(olds, key=lambda one: one.key or ""):
        other = bool(groups) and groups[-1][0].key != old.key
        if other or old.bytes > room or len(old.frames) > rows:
            groups.append([])
            room, rows = PACK, ROWS
        groups[-1].append(old)
        room, rows = room - old.bytes, rows - len(old.frames)
    return groups


def _moved(
    folder: Path, olds: list[_Old], look: Look, keys: Keys, progress: Progress | None
) -> bool:
    """False when somebody else is at work here."""
    writer = Writer(folder, key=olds[0].key, side=StoreError)
    done: list[_Old] = []
    try:
        written: set[bytes] = set()
        for old in olds:
            # a damaged one stays as it is, and `verify` tells; so does one whose key is not here
            with suppress(DamagedData, KeyMissing):
                copy(old.path, old.frames, writer, written, keys, progress)
                done.append(old)
        if not done:
            return True
        pack = writer.close(progress)
    finally:
        writer.discard()
    new = folder / pack.blake3
    for old in done:
        moved.write(old.path, Named(blake3=pack.blake3, bytes=pack.bytes), side=StoreError)
    if not new.exists():
        # another sweep took it for nobody's before it could see our note
        with suppress(FileNotFoundError):
            aside(new).rename(new)
        if not new.exists():
            return False
    return all(_gone(old.path, look) for old in done)


def _gone(pack: Path, look: Look) -> bool:
    """Take *pack* away; not if a snapshot came meanwhile, which may need more of it: False then."""
    before = set(look.manifests)
    with suppress(FileNotFoundError):
        pack.rename(aside(pack))
    if look.needed() is None or set(look.manifests) != before:
        with suppress(FileNotFoundError):
            aside(pack).rename(pack)
        return False
    aside(pack).unlink(missing_ok=True)
    sync_folder(pack.parent)
    return True
