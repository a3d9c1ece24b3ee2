"""Overlays of ours beneath which no snapshot keeps a file: they go back into it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from qmpsnap.engine import survey
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import UNREADABLE, ManifestError, MonitorLost, QemuGone
from qmpsnap.host import process as host_process
from qmpsnap.host.journal import Entry
from qmpsnap.host.process import ProcessFacts
from qmpsnap.hypervisor.block import fold, graph, overlay
from qmpsnap.hypervisor.monitor import Monitor, settle
from qmpsnap.ids import NodeName
from qmpsnap.store import local
from qmpsnap.store.points import read as read_points

log = logging.getLogger(__name__)


class Folding(msgspec.Struct, frozen=True, kw_only=True):
    """The journal's line of a fold: *files* go when it is done, which *process* was to do.

    *phase* `folding`: it is about to begin; `folded`: *files* are not needed any more.
    """

    phase: str
    files: list[str]
    process: ProcessFacts | None


async def fold_unkept(
    roots: Roots, machine: Machine, monitor: Monitor, debts: Sequence[Entry]
) -> list[str]:
    """Fold each disk's overlays of ours as far down as no snapshot keeps the file beneath.

    *debts* are those of the deletions that this is a part of: what is about to be folded is noted
    there, and what an earlier run of theirs had folded and not removed goes, too.

    Gives the files that went. Raises JobFailed with the disk concerned as it was.
    """
    layers = roots.local.layers(machine.name)
    facts = await survey.take(monitor, machine, layers)
    needed = await asyncio.to_thread(kept, roots, machine.name)
    if needed is None:
        return []
    gone = await _dropped(monitor, layers, needed)
    gone += await _forgotten(monitor, layers, needed, debts)
    for site in facts.sites:
        depth = 0
        while depth < site.layers and not needed & called(site.paths[depth + 1]):
            depth += 1
        if depth == 0:
            continue
        chain, files = site.disk.chain, list(site.paths[:depth])
        await _noted(debts, "folding", files, facts.process)
        try:
            await fold.fold(monitor, chain[0].name, chain[depth].name)
        except MonitorLost:
            # perhaps all was done, and only the answer was lost: nobody would find the files then
            with suppress(MonitorLost, QemuGone):
                if await settle(monitor, partial(fold.took_over, base=chain[depth].name)):
                    await asyncio.to_thread(_unlink, files)
            raise
        await _noted(debts, "folded", files, facts.process)
        await asyncio.to_thread(_unlink, files)
        gone += files
    return gone


async def _noted(
    debts: Sequence[Entry], phase: str, files: list[str], process: ProcessFacts | None
) -> None:
    known = msgspec.to_builtins(host_process.identified(process))
    for debt in debts[:1]:
        await asyncio.to_thread(debt.note, phase, files=files, process=known)


async def _forgotten(
    monitor: Monitor, layers: Path, needed: set[str], debts: Sequence[Entry]
) -> list[str]:
    """Remove what was folded when its deletion was cut off: QEMU knows nothing of it any more.

    That it is not in use proves nothing by itself: a QEMU that was started again without its
    newest overlay has none in use. That the fold was noted as done does, and so does the very QEMU
    that was to do it.
    """
    lines = [line for debt in debts for line in await asyncio.to_thread(_lines, debt)]
    if not lines:
        return []
    seen = await graph.query(monitor)
    used = {name for node in seen.nodes for name in called(seen.path(NodeName(node)))}
    gone: list[str] = []
    for line in lines:
        known = line.process is not None and host_process.still_runs(line.process)
        for path in map(Path, line.files):
            free = path.parent == layers and not called(str(path)) & (needed | used)
            if free and (known or line.phase == "folded") and path.exists():
                path.unlink()
                gone.append(str(path))
    return gone


def _lines(debt: Entry) -> list[Folding]:
    """What a deletion has noted of its folds."""
    said = [line for line in debt.read().lines if line.get("phase") in ("folding", "folded")]
    try:
        return msgspec.convert(said, list[Folding])
    except UNREADABLE as odd:
        raise ManifestError(f"{debt.path}: {odd}") from odd


def _unlink(paths: Iterable[str]) -> None:
    for path in paths:
        Path(path).unlink(missing_ok=True)


async def _dropped(monitor: Monitor, layers: Path, needed: set[str]) -> list[str]:
    """Close overlays of ours that a fold has left behind, broken off at its end; their files.

    QEMU still has them above what took over, and would take no snapshot of that.
    """
    seen = await graph.query(monitor)
    used = {node.name for disk in seen.disks for node in disk.chain}
    gone: list[str] = []
    for name in seen.nodes:
        freed, at = [], NodeName(name)
        while at not in used and Path(seen.path(at)).parent == layers:
            freed.append(seen.path(at))
            if (beneath := seen.nodes[at].child("backing")) is None:
                break  # it never took a disk's writes
            at = beneath
        if freed and at in used and not seen.parents(NodeName(name)):
            if not await overlay.drop(monitor, NodeName(name)):
                continue
            for path in freed:
                if not needed & called(path):
                    await asyncio.to_thread(Path(path).unlink, missing_ok=True)
                    gone.append(path)
    return gone


def kept(roots: Roots, vm: str) -> set[str] | None:
    """What the remaining snapshots keep; None when one of them cannot be read: it may keep all."""
    for facts in local.survey(roots.local, vm):
        if facts.problem is not None:
            log.warning("%s: nothing is folded, since %s", vm, facts.problem)
            return None
    points = read_points(roots.local, vm)
    if points.damaged:
        return None
    disks = [disk for point in points for disk in point.storage.disks]
    return {name for disk in disks for image in disk.chain for name in called(image.path)}


def called(path: str) -> set[str]:
    """A file by its name and by its inode: a restarted QEMU may spell its path otherwise."""
    try:
        found = Path(path).stat()
    except OSError:
        return {path}
    return {path, f"inode {found.st_dev}:{found.st_ino}"}
