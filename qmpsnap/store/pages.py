"""The page images of snapshots on the local root: the only place that keeps and ends them.

They are a cache: all that is in them is on the store, too. `LOCAL/VM/ram/ID` has one file a block
of RAM, `0.pages` and so on, in the order of `ram.index`, or a link to where they are
(`pageplace`), and `pages.json`, written last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from qmpsnap.dialect import schema
from qmpsnap.errors import DamagedData, LocalFailed
from qmpsnap.ids import is_snapshot_id
from qmpsnap.store import pageplace, ramindex
from qmpsnap.store.copying import data_runs, extents
from qmpsnap.store.files import (
    Progress,
    digest_file,
    opened,
    publish,
    read_small,
    sync_folder,
    told,
)
from qmpsnap.store.filling import INDEX, image, place
from qmpsnap.store.head import readable, version_of
from qmpsnap.store.image import changed, examine_image
from qmpsnap.store.layout import GOING, LocalRoot
from qmpsnap.store.manifest import Digest, Image, Size
from qmpsnap.store.secret import Keys, none

NOTE = "pages.json"
_FORMAT, _NEWEST = "qmpsnap-pages", 2
_PAGE, _PIECE = 4096, 1 << 20


class PageImage(msgspec.Struct, frozen=True, kw_only=True):
    """The RAM block *block* in the file *image*, which has *stored_pages* that are not zero.

    The images are found by their places in the list. The path in *image* is for people: a name; an
    absolute one in version 1, which may be where they lay before the root was moved.
    """

    block: str
    stored_pages: Size
    image: Image


class Pages(msgspec.Struct, frozen=True, kw_only=True):
    """`pages.json`: all large RAM blocks of the snapshot *id*, and the BLAKE3 of its index."""

    format: Literal["qmpsnap-pages"] = "qmpsnap-pages"
    version: Annotated[int, msgspec.Meta(ge=1, le=_NEWEST)] = _NEWEST
    id: str
    index_blake3: Digest
    images: list[PageImage]


def seal(folder: Path, id: str, images: Sequence[tuple[str, Path, int]]) -> Pages:
    """*images* (block, file, pages that are not zero) and the index in *folder* are whole.

    All of it is durable afterwards. Raises LocalFailed.
    """
    _, index = digest_file(folder / INDEX, side=LocalFailed)
    for _, path, _ in images:
        with told(path, LocalFailed):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    listed = []
    for block, path, stored in images:
        seen = examine_image(path, "raw", path.stat().st_size)
        seen = msgspec.structs.replace(seen, path=path.name)
        listed.append(PageImage(block=block, stored_pages=stored, image=seen))
    note = Pages(id=id, index_blake3=index, images=listed)
    content = msgspec.json.format(msgspec.json.encode(note), indent=2) + b"\n"
    publish(folder / NOTE, content, side=LocalFailed)
    with told(folder, LocalFailed):
        sync_folder(folder.parent)
    return note


def found(folder: Path, index_blake3: str) -> Pages:
    """The page images in *folder*, all as they were sealed, by the name, size, inode and time.

    Their bytes are not read: `verify` does that. Raises DamagedData with the reason when they are
    not to be used, LocalFailed.
    """
    pages = read(folder)
    if pages.index_blake3 != index_blake3:
        raise DamagedData(f"{folder}: are the pages of another snapshot")
    for path, one in zip(_paths(folder, pages), pages.images, strict=True):
        if difference := changed(msgspec.structs.replace(one.image, path=str(path))):
            raise DamagedData(difference)
    return pages


def read(folder: Path) -> Pages:
    """What the note in *folder* says. Raises ManifestError, LocalFailed."""
    path = folder / NOTE
    content = read_small(path, side=LocalFailed)
    version_of(content, _FORMAT, _NEWEST, path)
    with readable(content, path):
        return msgspec.json.decode(content, type=Pages)


def indexes(root: LocalRoot, vm: str) -> list[Path]:
    """The index of each snapshot whose pages were kept here, newest first; those at hand."""
    return [path for one in reversed(_folders(root, vm)) if (path := one / INDEX).exists()]


def trim(
    root: LocalRoot, vm: str, keep: int, also: Collection[str] = (), *, but: Path | None = None
) -> bool:
    """Only the page images of the *keep* newest snapshots stay, and the newest one's index.

    Those of the snapshots *also* stay, too. What a run has left that was cut off goes, *but* for
    the folder that is being filled. The caller holds the VM's lock. A machine that runs on such
    pages keeps them until it ends. Gives whether any went. Raises LocalFailed.
    """
    folders = [one for one in _folders(root, vm) if (one / NOTE).exists()]
    kept = folders[max(0, len(folders) - keep) :]
    kept += [one for one in folders if one.name in also]
    gone = False
    with told(root.ram(vm), LocalFailed):
        for one in _folders(root, vm):
            if one in kept or one == but:
                continue
            if folders and one == folders[-1]:
                gone |= _only_index(one)
            else:
                _remove(one)
                gone = True
        for one in _going(root, vm):
            _end(one)
            gone = True
    return gone


def forget(root: LocalRoot, vm: str, id: str) -> None:
    """The snapshot *id* is no more: nor is what is kept of it here. Raises LocalFailed."""
    folder = root.ram(vm, id)
    with told(folder, LocalFailed):
        if folder.exists():
            _remove(folder)


def wrong(
    folder: Path, index_blake3: str, on_progress: Progress | None = None, keys: Keys = none
) -> list[str]:
    """Why the page images in *folder* are not what the index says, all that they hold read.

    Nothing is wrong where none are kept, nor with those that no restore would take. Raises
    LocalFailed, and KeyMissing where the index is encrypted.
    """
    try:
        pages = found(folder, index_blake3)
        index = ramindex.read(folder / INDEX, side=LocalFailed, keys=keys)
    except (DamagedData, LocalFailed):
        return []
    troubles, done = [], 0
    total = sum(block.bytes for block in index.blocks)
    for number, path in enumerate(_paths(folder, pages)):
        lost = stray = end = 0
        with opened(path, LocalFailed) as descriptor:
            for row in index.rows(number):
                at, length = index.span(number, row)
                stray += _pages(descriptor, end, at)
                content = os.pread(descriptor, length, at)
                lost += index.chunks.digest(content) != index.digest(row)
                end = at + length
                if on_progress is not None:
                    on_progress(done + at, total, f"reading {path.name}")
            stray += _pages(descriptor, end, index.blocks[number].bytes)
        done += index.blocks[number].bytes
        if lost:
            troubles.append(f"{path}: {lost} chunks are not what the index says (BLAKE3)")
        if stray:
            troubles.append(f"{path}: {stray} pages that have to be zero are not")
    return troubles


def _paths(folder: Path, pages: Pages) -> list[Path]:
    at = place(folder)
    return [image(at, number) for number in range(len(pages.images))]


def _pages(descriptor: int, start: int, end: int) -> int:
    """How many pages from *start* to *end*, in bytes, hold something. Raises OSError."""
    found = 0
    for first, length in extents(descriptor, end, start):
        for at in range(first, first + length, _PIECE):
            # a hole need not be one for ever: what is read through a mapping is there, on tmpfs
            content = os.pread(descriptor, min(_PIECE, first + length - at), at)
            if content != bytes(len(content)):
                runs = data_runs(content, _PAGE)
                found += sum(-(-(stop - begin) // _PAGE) for begin, stop in runs)
    return found


def _remove(folder: Path) -> None:
    _end(_aside(folder))


def _aside(folder: Path) -> Path:
    # gone in one step: a QEMU before 8.2 makes an empty file where it finds a folder and no image
    aside = folder.with_name(folder.name + GOING)
    folder.rename(aside)
    return aside


def _end(folder: Path) -> None:
    pageplace.ended(folder)
    shutil.rmtree(folder)


def _going(root: LocalRoot, vm: str) -> list[Path]:
    """What a run has left that was cut off while it removed images. Raises OSError."""
    return [one for one in root.ram(vm).glob(f"*{GOING}") if one.is_dir()]


def _only_index(folder: Path) -> bool:
    """Whether anything else was there."""
    if all(path.name in {INDEX, NOTE} for path in folder.iterdir()):
        return False
    aside = _aside(folder)
    folder.mkdir(0o700)
    for name in (INDEX, NOTE):  # without the note it is no more than a run that was cut off
        (aside / name).rename(folder / name)
    _end(aside)
    return True


def _folders(root: LocalRoot, vm: str) -> list[Path]:
    try:
        there = sorted(root.ram(vm).iterdir())
    except FileNotFoundError:
        return []
    return [one for one in there if is_snapshot_id(one.name) and one.is_dir()]


def schemas() -> dict[str, dict[str, object]]:
    """The JSON Schema of `pages.json`, by the word that it says of itself."""
    return {_FORMAT: schema(Pages)}
