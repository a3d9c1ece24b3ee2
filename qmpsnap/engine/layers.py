"""The overlays of one snapshot in QEMU: laid before the point in time, or taken back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from qmpsnap import private
from qmpsnap.engine import folds
from qmpsnap.engine.plan import PlannedDisk
from qmpsnap.errors import LocalFailed, SnapError
from qmpsnap.host import qemu_img
from qmpsnap.host.journal import Entry
from qmpsnap.hypervisor.block import fold, graph, overlay
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.ids import NodeName


class Laid(msgspec.Struct, frozen=True):
    """An overlay as the journal remembers it: its node, the node it goes over, and their files."""

    node: str
    base: str
    path: str
    beneath: str


def remembered(disks: Iterable[PlannedDisk]) -> list[Laid]:
    return [
        Laid(
            disk.overlay.node,
            disk.site.disk.top.name,
            str(disk.overlay.path),
            disk.site.paths[0],
        )
        for disk in disks
    ]


def refuse_existing(disks: Sequence[PlannedDisk]) -> None:
    """Raises LocalFailed when an overlay's file is there: it is not ours to undo then."""
    for disk in disks:
        if os.path.lexists(disk.overlay.path):
            raise LocalFailed(f"{disk.overlay.path} exists already")


async def lay(monitor: Monitor, disks: Sequence[PlannedDisk]) -> None:
    """Make each overlay's file and open it in QEMU, unused. Raises LocalFailed, CommandRefused."""
    try:
        async with asyncio.TaskGroup() as group:
            for disk in disks:
                group.create_task(_make(disk))
    except BaseExceptionGroup as several:
        ours, others = several.split(SnapError)
        if ours is None or others is not None:
            raise
        raise _first(ours) from several
    for disk in disks:
        await overlay.add(monitor, disk.overlay)


def _first(group: BaseExceptionGroup[SnapError]) -> SnapError:
    one = group.exceptions[0]
    return _first(one) if isinstance(one, BaseExceptionGroup) else one


async def _make(disk: PlannedDisk) -> None:
    top = disk.site.disk.top
    await asyncio.to_thread(_make_folder, disk.overlay.path.parent)
    await qemu_img.create_overlay(
        disk.overlay.path, Path(disk.site.paths[0]), _format(top), top.virtual_size
    )


def _make_folder(folder: Path) -> None:
    try:
        private.folders(folder)
    except OSError as failed:
        raise LocalFailed(f"{folder}: {failed.strerror}") from failed


def _format(node: graph.Node) -> str:
    return node.driver if node.driver in {"qcow2", "raw"} else "raw"


async def take_back(
    monitor: Monitor, laid: Sequence[Laid], entry: Entry, *, may_be_live: bool
) -> list[str]:
    """Undo `lay`, and the transaction if it happened: decided by what the graph shows.

    An overlay that takes writes is folded into its base while the guest runs on. A file that
    QEMU does not know is deleted only if it can never have taken a write (not *may_be_live*).
    Gives the files that were kept for that reason. *entry* is the debt in which folds are noted.

    Raises JobFailed or MonitorError with the rest undone as far as possible.
    """
    kept = []
    for one in laid:
        seen = await graph.query(monitor)
        node = NodeName(one.node)
        if node not in seen.nodes:
            if may_be_live:
                kept += [one.path] if await asyncio.to_thread(os.path.exists, one.path) else []
                continue
        elif any(node == item.name for disk in seen.disks for item in disk.chain):
            await fold.fold(monitor, node, NodeName(one.base), told=folds.noting(entry, one.path))
        elif not await overlay.drop(monitor, node):
            kept.append(one.path)
            continue
        await asyncio.to_thread(unlink, Path(one.path))
    return kept


def unlink(path: Path) -> None:
    """Delete an overlay's file, if it is there. Raises LocalFailed."""
    try:
        path.unlink(missing_ok=True)
    except OSError as failed:
        raise LocalFailed(f"{path}: {failed.strerror}") from failed
