"""Folding: overlays of a running disk go back into what lies beneath (active block-commit)."""

from __future__ import annotations

import asyncio

from qmpsnap.errors import JobFailed
from qmpsnap.hypervisor.block import graph, overlay
from qmpsnap.hypervisor.block.job import end, job
from qmpsnap.hypervisor.block.job import query as query_jobs
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.ids import NodeName

_PREFIX = "fold-"


async def fold(
    monitor: Monitor, top: NodeName, base: NodeName, *, within: float = 3600
) -> list[NodeName]:
    """Commit the active node *top* and all between it and *base* into *base*; give what is free.

    *base* must be kept by no snapshot and no clone: its content changes. The guest runs on all
    the while. Decided by the graph, since a cancelled commit also ends as BLOCK_JOB_COMPLETED
    (QEMU 7.2 to 11.1).

    Raises JobFailed, with the disk as it was; CommandRefused.
    """
    disk = _disk_of(await graph.query(monitor), top)
    before = [node.name for node in disk.chain] if disk is not None else []
    if disk is None or base not in before:
        raise JobFailed(f"{base} does not lie under {top}")
    # "Need a root block node": where a filter lies above, that one is it
    root = disk.filters[0].name if disk.filters else top
    arguments = {"device": root, "top-node": top, "base-node": base}
    async with (
        asyncio.timeout(within),
        job(monitor, "block-commit", f"{_PREFIX}{top}", arguments) as it,
    ):
        await it.reaches("ready")
        await it.complete()
        await it.reaches("concluded")
    after = _disk_of(await graph.query(monitor), base)
    if after is None or after.top.name != base:
        raise JobFailed(f"the commit of {top} ended without {base} taking over")
    freed = before[: before.index(base)]
    for node in freed:
        # nodes that a -drive or a backing string opened go by themselves
        await overlay.drop(monitor, node)
    return freed


async def broken_off(monitor: Monitor) -> None:
    """End the folds that an engine left at work when it died; the graph shows how far they came.

    A commit that is cancelled when it is ready leaves the disk as it was.
    """
    for one in await query_jobs(monitor):
        if one.id.startswith(_PREFIX):
            await end(monitor, one.id)


def _disk_of(seen: graph.Graph, node: NodeName) -> graph.Disk | None:
    for disk in seen.disks:
        if any(item.name == node for item in disk.chain):
            return disk
    return None
