"""Where page images go: the only place that decides on it, and looks whether there is memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from qmpsnap.engine.roots import Roots
from qmpsnap.errors import LocalFailed
from qmpsnap.host import filesystem, headroom
from qmpsnap.store import local, pageplace, pages
from qmpsnap.store.files import told
from qmpsnap.units import in_bytes

log = logging.getLogger(__name__)
_SPARE = 16  # a sixteenth of the host's memory stays free


def made(roots: Roots, vm: str, id: str, sizes: Sequence[int], *, here: bool = False) -> list[Path]:
    """New page images of *sizes*, in bytes, for the snapshot *id*, of zeros.

    Where the configuration wants them, if they fit there, which takes all of their size on a file
    system in memory; images of older snapshots give way first. Else beside their index, which is
    told. *here*: there in any case, as more than a cache. Raises LocalFailed. The caller holds the
    VM's lock.
    """
    folder, place = roots.local.ram(vm, id), roots.ram_images_in
    if place is not None and here:
        log.info("the page images of %s %s stay on the local root: packs depend on them", vm, id)
    elif place is not None and roots.ram_images and sizes:
        try:
            return _elsewhere(roots, place, vm, id, sizes)
        except LocalFailed as why:
            log.warning("the page images of %s %s stay on the local root: %s", vm, id, why)
    paths = pageplace.beside(folder, sizes)
    try:
        held(paths)  # for a local root in memory, too
    except LocalFailed as why:
        log.warning("whoever maps the RAM of %s %s has to find memory: %s", vm, id, why)
        return pageplace.beside(folder, sizes)
    return paths


def waiting(roots: Roots, vm: str) -> set[str]:
    """The snapshots that wait for packs of another VM: should these go, their own are made of the
    page images. Raises LocalFailed."""
    return {
        one.id
        for one in local.survey(roots.local, vm)
        if one.paired is None and one.spooled and any(pack.origin for pack in one.spooled.packs)
    }


def held(paths: Sequence[Path]) -> None:
    """The page images *paths*, all in one folder, take no more memory when they are mapped.

    Raises LocalFailed when there is none for them, on a file system that is memory.
    """
    if not paths or not filesystem.examine(paths[0].parent).in_memory:
        return
    with told(paths[0].parent, LocalFailed):
        lacking = {path: pageplace.lacking(path) for path in paths}
    _expect_memory(sum(lacking.values()))
    for path in paths:
        if lacking[path]:  # its time would change, and it would be taken for another
            pageplace.allocated(path)


def _elsewhere(roots: Roots, place: Path, vm: str, id: str, sizes: Sequence[int]) -> list[Path]:
    folder, whole = roots.local.ram(vm, id), filesystem.examine(place).in_memory
    if place.is_dir():
        with told(place, LocalFailed):
            pageplace.sweep(place)
    try:
        return _within(place, folder, sizes, whole=whole)
    except LocalFailed:
        kept = waiting(roots, vm)
        if not pages.trim(roots.local, vm, roots.ram_images - 1, kept, but=folder):
            raise
    return _within(place, folder, sizes, whole=whole)


def _within(place: Path, folder: Path, sizes: Sequence[int], *, whole: bool) -> list[Path]:
    if whole:
        _expect_memory(sum(sizes))
    return pageplace.within(place, folder, sizes, whole=whole)


def _expect_memory(wanted: int) -> None:
    """Raises LocalFailed when taking *wanted* bytes leaves the host, or us, too little."""
    host = headroom.look()
    free = host.memory_free_bytes - host.memory_total_bytes // _SPARE
    # it counts for the control group that we are in, whoever uses it later
    for one in host.ceilings:
        free = min(free, one.limit_bytes - one.used_bytes)
    if wanted > free:
        left = in_bytes(max(0, free))
        raise LocalFailed(f"they take {in_bytes(wanted)} of memory, and {left} are to spare")
