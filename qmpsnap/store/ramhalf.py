"""The RAM of a store half that is in packs: the only place that ships and checks it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

from qmpsnap.errors import (
    DamagedData,
    KeyMissing,
    LocalFailed,
    PacksMissing,
    SnapError,
    StoreError,
    UsageError,
)
from qmpsnap.store import contents, lending, moved, ramindex, remaking, shared, wire
from qmpsnap.store.files import Progress, Side, expect_size
from qmpsnap.store.layout import StoreRoot
from qmpsnap.store.manifest import FileEntry, Manifest, Pack
from qmpsnap.store.packcheck import Checked
from qmpsnap.store.ramindex import Index, Named
from qmpsnap.store.rampack import Frame, table
from qmpsnap.store.secret import Keys, none
from qmpsnap.store.shelf import Shelf, whereabouts

_PIECE = 32  # chunks that are read at a time
_NAMED = 8  # packs, or chunks, that one message names


def index_of(
    manifest: Manifest, path: Path, *, side: Side = StoreError, keys: Keys = none
) -> Index:
    """The index of *manifest*, which is the file *path*, checked.

    Raises DigestMismatch, DamagedData, *side*; UsageError when its RAM is not in packs; KeyMissing.
    """
    entry = manifest.entry(manifest.ram.index) if manifest.ram.index is not None else None
    if entry is None:
        raise UsageError(f"the RAM of {manifest.vm} {manifest.id} is not in packs")
    expect_size(path, entry, side=side)
    role = contents.role(manifest, entry) if manifest.key is not None else None
    index = ramindex.read(path, side=side, blake3=entry.blake3, keys=keys, role=role)
    if index.chunks.key != manifest.key:
        raise DamagedData(f"{path}: is encrypted with another key than the manifest says")
    listed = {pack.blake3 for pack in manifest.packs}
    if lost := [one.blake3 for one in index.packs if one.blake3 not in listed]:
        raise DamagedData(f"{path}: names packs that the manifest does not list: {in_words(lost)}")
    return index


def deliver(
    root: StoreRoot,
    manifest: Manifest,
    spool: Path,
    folder: Path,
    progress: Progress,
    instead: Mapping[str, Named] | None = None,
    anew: Collection[str] = (),
    keys: Keys = none,
) -> None:
    """All packs of *manifest* are on the store, copied from *folder* where they were not there.

    One that was moved, with all that is needed of it, is there. One that is lost is, when *folder*
    has another one *instead* of it that has all that is needed. What another VM is to give is
    taken from there. Those of *anew* replace what is damaged. Raises PacksMissing before anything
    is copied, and as `shared.deliver`.
    """
    waiting: list[FileEntry] = []
    replaced: list[tuple[Path, Named]] = []
    lost: list[str] = []
    needs = _Needs(manifest, spool, keys)
    for pack in manifest.packs:
        needed = partial(needs.of, pack.blake3)
        if pack.blake3 in anew and _is_here(folder, pack.entry):
            waiting.append(pack.entry)
            continue
        if shared.arrived(root, manifest.vm, pack.entry) or _moved(root, manifest, pack, needed):
            continue
        if _is_here(folder, pack.entry):
            waiting.append(pack.entry)
        elif lending.lend(root, manifest.vm, pack, needed, progress):
            continue
        elif new := _instead(pack, folder, needed, instead or {}):
            replaced.append((root.shared(manifest.vm) / pack.blake3, new))
        else:
            lost.append(pack.blake3)
    if lost:
        raise PacksMissing(
            f"RAM that it shares with other snapshots is neither on the store nor here: pack "
            f"{in_words(lost)}",
            hint="no page images that are kept here have all of it: put the packs into shared/ "
            "from a copy of the store, or delete the snapshot",
            packs=tuple(lost),
        )
    for entry in waiting + [_entry(new) for _, new in replaced]:
        again = entry.blake3 in anew
        shared.deliver(root, manifest.vm, entry, folder, progress, anew=again)
    for old, new in replaced:
        _replace(old, new, keys, progress)


class _Needs:
    """The chunks that a spool needs of each pack; its index is read when somebody asks."""

    def __init__(self, manifest: Manifest, spool: Path, keys: Keys) -> None:
        self._manifest, self._path = manifest, spool / str(manifest.ram.index)
        self._keys = keys

    @cached_property
    def _all(self) -> dict[str, set[bytes]]:
        index = index_of(self._manifest, self._path, side=LocalFailed, keys=self._keys)
        found: dict[str, set[bytes]] = {one.blake3: set() for one in index.packs}
        for row in range(len(index)):
            found[index.pack(row).blake3].add(index.digest(row))
        return found

    def of(self, pack: str) -> set[bytes]:
        """Raises DigestMismatch, DamagedData, LocalFailed for the index."""
        return self._all.get(pack, set())


def _instead(
    pack: Pack, folder: Path, needed: Callable[[], set[bytes]], instead: Mapping[str, Named]
) -> Named | None:
    """The pack in *folder* that is to stand for *pack*, if it has all that is needed."""
    new = instead.get(pack.blake3)
    if new is None or not _is_here(folder, _entry(new)):
        return None
    return new if needed() <= table(folder / new.blake3, side=LocalFailed).keys() else None


def _replace(old: Path, new: Named, keys: Keys, progress: Progress) -> None:
    """The lost pack *old* leads to *new*, which is beside it now.

    What it was moved into before, and what is left of it, may be needed by others: it stays, as a
    part of one that has both. Raises StoreError; DamagedData where it cannot.
    """
    if follow := moved.trail(old, side=StoreError):
        old = old.with_name(follow[-1].blake3)
    if (there := moved.there(old)) is None:
        moved.write(old, new, side=StoreError)
    elif there.name != new.blake3:
        remaking.joined(old, there, old.with_name(new.blake3), keys, progress)


def _is_here(folder: Path, entry: FileEntry) -> bool:
    try:
        expect_size(folder / entry.blake3, entry, side=LocalFailed)
    except (LocalFailed, DamagedData):
        return False
    return True


def _entry(pack: Named) -> FileEntry:
    return FileEntry(name=f"shared/{pack.blake3}", bytes=pack.bytes, blake3=pack.blake3)


def _moved(
    root: StoreRoot, manifest: Manifest, pack: Pack, needed: Callable[[], set[bytes]]
) -> bool:
    """Whether what is needed of *pack* is on the store in another one."""
    try:
        path, other = moved.lies(root.shared(manifest.vm) / pack.blake3, side=StoreError)
    except DamagedData:
        return False
    if other is None:
        return False  # it is there, and was cut short
    return needed() <= table(path, side=StoreError).keys()


def lost(root: StoreRoot, vm: str, packs: Sequence[Named], progress: Progress) -> list[str]:
    """Which of *packs* the store has not, at a glance: neither it nor one that it was moved to."""
    found = []
    for number, pack in enumerate(packs, 1):
        try:
            path, other = moved.lies(root.shared(vm) / pack.blake3, side=StoreError)
            expect_size(path, _entry(other or pack), side=StoreError)
        except (DamagedData, StoreError):
            found.append(pack.blake3)
        progress(number, 0, f"looking at the RAM of {vm}")
    return found


def troubles(manifest: Manifest, shelf: Shelf) -> Iterator[tuple[str, SnapError]]:
    """What is wrong with the packs of *manifest* at a glance, by their names as listed."""
    for pack in manifest.packs:
        try:
            lying = shelf.pack(Named(blake3=pack.blake3, bytes=pack.bytes))
            expect_size(lying.path, lying.entry, side=lying.side)
        except (DamagedData, StoreError, LocalFailed) as failed:
            yield pack.entry.name, failed


def sizes(manifest: Manifest, shelf: Shelf) -> list[wire.Problem]:
    """As `troubles`, to be sent."""
    return [wire.Problem(file=name, what=str(odd)) for name, odd in troubles(manifest, shelf)]


def verify(
    manifest: Manifest,
    path: Path,
    shelf: Shelf,
    progress: Progress,
    checked: Checked,
    keys: Keys = none,
) -> list[wire.Problem]:
    """Read all packs, and see that the index *path* leads to chunks: what is wrong, by pack.

    Packs that *checked* has read are not read again; but chunks in those that are damaged are.
    Where the key is not here, packs are what the manifest says, and more cannot be told.
    """
    found: dict[str, str] = {}
    for pack in manifest.packs:
        try:
            lying = shelf.pack(Named(blake3=pack.blake3, bytes=pack.bytes))
            checked.check(lying, progress, keys)
        except (DamagedData, StoreError, LocalFailed) as failed:
            found[pack.entry.name] = str(failed)
    try:
        index = index_of(manifest, path, keys=keys)
    except KeyMissing:
        pass
    except (DamagedData, StoreError) as failed:
        found.setdefault(str(manifest.ram.index), str(failed))
    else:
        doubtful = _doubtful(index, shelf, found)
        for named, lost in _lost(index, doubtful, shelf, progress).items():
            name = f"shared/{named}"
            places = in_words([whereabouts(index, row) for row in lost])
            why = found.get(name, f"{name}: its digest is right, not so what the index says")
            found[name] = f"{why}; {len(lost)} chunks are lost: {places}"
    return [wire.Problem(file=name, what=what) for name, what in found.items()]


def _doubtful(index: Index, shelf: Shelf, wrong: Container[str]) -> list[int]:
    """The rows that are not where the table of a whole pack has this chunk."""
    rows: dict[int, list[int]] = {}
    for row, number in enumerate(index.pack_numbers):
        rows.setdefault(number, []).append(row)
    found = []
    for number, named in enumerate(index.packs):
        frames: Mapping[bytes, Frame] = {}
        moved_here = False
        if f"shared/{named.blake3}" not in wrong:
            lying = shelf.pack(named)
            moved_here = lying.table is not None
            frames = lying.table or table(lying.path, side=lying.side)
        for row in rows.get(number, ()):
            frame = frames.get(index.digest(row))
            place = index.offsets[row], index.lengths[row]
            if frame is None or not (moved_here or frame[:2] == place):
                found.append(row)
    return found


def _lost(
    index: Index, wanted: Sequence[int], shelf: Shelf, progress: Progress
) -> dict[str, list[int]]:
    """Those of the rows *wanted* whose chunks cannot be had, by the pack that the index names."""
    found: dict[str, list[int]] = {}
    rows = sorted(wanted, key=lambda row: (index.pack_numbers[row], index.offsets[row]))
    for at in range(0, len(rows), _PIECE):
        for row in _unread(index, shelf, rows[at : at + _PIECE]):
            found.setdefault(index.pack(row).blake3, []).append(row)
        progress(min(at + _PIECE, len(rows)), len(rows), "reading chunks of RAM")
    return found


def _unread(index: Index, shelf: Shelf, rows: Sequence[int]) -> Iterator[int]:
    try:
        for _ in shelf.chunks(index, rows):
            pass
    except (DamagedData, StoreError, LocalFailed):
        if len(rows) == 1:
            yield rows[0]
            return
        for row in rows:
            yield from _unread(index, shelf, [row])


def in_words(names: Sequence[str]) -> str:
    """Some of *names*, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
