"""Overlay images as nodes of a running QEMU, added before the point in time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qmpsnap.errors import CommandRefused
from qmpsnap.hypervisor.block import graph
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.ids import NodeName


@dataclass(frozen=True, slots=True)
class Overlay:
    """A qcow2 file that shall take the writes of *over*, with that node's own way of caching.

    *discard* and *aio* are known from the command line only; empty leaves QEMU's default.
    """

    node: NodeName
    path: Path
    over: graph.Node
    options: Mapping[str, str] = field(default_factory=dict)

    def wire(self) -> dict[str, object]:
        """The arguments of blockdev-add. No backing: the transaction gives it one."""
        cache = {"direct": self.over.cache_direct, "no-flush": self.over.cache_no_flush}
        file: dict[str, object] = {
            "driver": "file",
            "filename": str(self.path),
            "cache": cache,
        }
        if aio := self.options.get("aio"):
            file["aio"] = aio
        node: dict[str, object] = {
            "driver": "qcow2",
            "node-name": self.node,
            "backing": None,
            "file": file,
            "cache": cache,
            "detect-zeroes": self.over.detect_zeroes,
        }
        if discard := self.options.get("discard"):
            node["discard"] = file["discard"] = discard
        return node


async def add(monitor: Monitor, overlay: Overlay) -> None:
    """Open the overlay's file as a node that nothing uses yet."""
    await monitor.execute("blockdev-add", overlay.wire())


async def drop(monitor: Monitor, node: NodeName) -> bool:
    """Close *node*; False if it is in use or was not there."""
    try:
        await monitor.execute("blockdev-del", {"node-name": node})
    except CommandRefused:
        return False
    return True
