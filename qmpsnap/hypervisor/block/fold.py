"""Folding: overlays of a running disk go back into what lies beneath (active block-commit)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from enum import StrEnum

from qmpsnap.errors import CommandRefused, JobFailed
from qmpsnap.hypervisor.block import bitmap, graph, overlay, transaction
from qmpsnap.hypervisor.block.bitmap import Bitmap
from qmpsnap.hypervisor.block.job import end, job
from qmpsnap.hypervisor.block.job import query as query_jobs
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.ids import NodeName

log = logging.getLogger(__name__)
_PREFIX = "fold-"


class Stage(StrEnum):
    """How far a fold has come, as it is told before the step that makes it true.

    What a disk reads as is in its overlay up to the pivot, and in what lies beneath from then on.
    """

    FOLDING = "folding"  # the base is about to be written to; the overlay still has all
    PIVOTING = "pivoting"  # the base is about to take the guest's writes
    FOLDED = "folded"  # the base has all, and the overlay is no more needed


Told = Callable[[Stage], Awaitable[None]]


async def _untold(_: Stage) -> None:
    pass


async def fold(
    monitor: Monitor,
    top: NodeName,
    base: NodeName,
    *,
    within: float = 3600,
    told: Told = _untold,
) -> list[NodeName]:
    """Commit the active node *top* and all between it and *base* into *base*; give what is free.

    *base* must be kept by no snapshot and no clone: its content changes. The guest runs on all
    the while. Decided by the graph, since a cancelled commit also ends as BLOCK_JOB_COMPLETED
    (QEMU 7.2 to 11.1).

    Bitmaps of ours are on *base* afterwards, and say there what they said before together with
    the layers above them. A layer between that has some is a stop on the way, so that they
    record what is committed into it; the disk may be left there by a failure. A bitmap that
    *base* has already records by itself, in its place.

    *told* is called before each stage; what it raises ends the fold there. Raises JobFailed, with
    the disk as it was, or shorter by the layers above a stop; CommandRefused.
    """
    disk = _disk_of(await graph.query(monitor), top)
    before = [node.name for node in disk.chain] if disk is not None else []
    if disk is None or base not in before:
        raise JobFailed(f"{base} does not lie under {top}")
    depth = before.index(base)
    _refuse_busy(disk.chain[:depth])
    stops = [node.name for node in disk.chain[1:depth] if _carried(node)]
    await told(Stage.FOLDING)
    async with asyncio.timeout(within):
        for stop in stops:
            await _commit(monitor, top, stop, _untold)
            top = stop
        await _commit(monitor, top, base, told)
    return before[:depth]


async def took_over(monitor: Monitor, base: NodeName) -> bool:
    """Whether a disk writes to *base* now: nothing above it is needed then."""
    disk = _disk_of(await graph.query(monitor), base)
    return disk is not None and disk.top.name == base


async def broken_off(monitor: Monitor) -> None:
    """End the folds that an engine left at work when it died; the graph shows how far they came.

    A commit that is cancelled when it is ready leaves the disk as it was.
    """
    for one in await query_jobs(monitor):
        if one.id.startswith(_PREFIX):
            await end(monitor, one.id)


async def _commit(monitor: Monitor, top: NodeName, base: NodeName, told: Told) -> None:
    """One block-commit; of the layers that it frees, only *top* may have bitmaps of ours."""
    disk = _disk_of(await graph.query(monitor), top)
    if disk is None or base not in (names := [node.name for node in disk.chain]):
        raise JobFailed(f"{base} lies no more under {top}")
    depth = names.index(base)
    # "Need a root block node": where a filter lies above, that one is it
    root = disk.filters[0].name if disk.filters else top
    arguments = {"device": root, "top-node": top, "base-node": base}
    # a job's name begins with a letter, and has no `#` as QEMU's own node names do
    name = f"{_PREFIX}{top.removeprefix('#')}"
    async with job(monitor, "block-commit", name, arguments) as it:
        await it.reaches("ready")
        await _carry(monitor, disk.chain[0], disk.chain[depth])
        await told(Stage.PIVOTING)
        await it.complete()
        await it.reaches("concluded")
    if not await took_over(monitor, base):
        raise JobFailed(f"the commit of {top} ended without {base} taking over")
    await told(Stage.FOLDED)
    for node in names[:depth]:
        # nodes that a -drive or a backing string opened go by themselves
        await overlay.drop(monitor, node)


def _carried(node: graph.Node) -> list[Bitmap]:
    return [one for one in node.bitmaps if one.ours and one.usable]


def _refuse_busy(freed: tuple[graph.Node, ...]) -> None:
    for node in freed:
        for one in _carried(node):
            if one.busy:
                raise JobFailed(f"bitmap {one.name} on {node.name} is in use: an export or a job")


async def _carry(monitor: Monitor, top: graph.Node, base: graph.Node) -> None:
    """Give *base*, which the ready commit has made writable, the bitmaps of ours on *top*.

    What the guest writes meanwhile cannot slip through: before the merge *top*'s bitmap sees it,
    and the copy on *base* when the commit brings it down. A commit that is then broken off
    leaves on *base* a copy that says too much at most: all above it counts as changed anyway.

    What QEMU does not allow is left out: the next increment finds no bitmap, and says so.
    """
    there = {one.name: one for one in base.bitmaps}
    for one in _carried(top):
        if (old := there.get(one.name)) is not None:
            if old.usable:
                continue  # it has recorded the commit
            await bitmap.remove(monitor, base.name, one.name)
        add = transaction.AddBitmap(base.name, one.name, base.keeps_bitmaps, one.granularity)
        merge = transaction.MergeBitmap(base.name, one.name, top.name)
        try:
            await transaction.commit(monitor, [add, merge])
        except CommandRefused as refused:
            log.warning("bitmap %s is lost with %s: %s", one.name, top.name, refused)


def _disk_of(seen: graph.Graph, node: NodeName) -> graph.Disk | None:
    for disk in seen.disks:
        if any(item.name == node for item in disk.chain):
            return disk
    return None
