"""The block graph of one QEMU: what hangs where, and which node of a disk takes the writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qmpsnap.errors import Blocked, CommandRefused
from qmpsnap.hypervisor.block.bitmap import Bitmap, listed
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.ids import NodeName

# Filters that a disk may wear above its format node, each with the name of its one child.
# Job filters (backup-top, mirror_top, commit_top) are no part of a disk: somebody is at work.
FILTERS = {
    "throttle": "file",
    "copy-on-read": "file",
    "compress": "file",
    "preallocate": "file",
    "blkdebug": "image",
}
PROTOCOLS = {"file", "host_device"}
_JOB_FILTERS = {"backup-top", "copy-before-write", "mirror_top", "commit_top", "cor_filter_bs"}


@dataclass(frozen=True, slots=True)
class Node:
    """One vertex. *filename* is as QEMU spells it: perhaps relative to QEMU's folder."""

    name: NodeName
    driver: str
    filename: str
    read_only: bool
    virtual_size: int
    actual_size: int
    detect_zeroes: str
    cache_direct: bool
    cache_no_flush: bool
    encrypted: bool = False
    children: tuple[tuple[str, NodeName], ...] = ()
    bitmaps: tuple[Bitmap, ...] = ()
    compat: str = ""  # of qcow2: "0.10" for version 2, "1.1" for version 3

    @property
    def keeps_bitmaps(self) -> bool:
        """Whether bitmaps can be persistent on it."""
        return self.driver == "qcow2" and self.compat != "0.10"

    def child(self, role: str) -> NodeName | None:
        return dict(self.children).get(role)


@dataclass(frozen=True, slots=True)
class Disk:
    """What the guest sees as one drive, and the chain of images under it.

    *device* is the drive's id (empty with -blockdev), *qdev* the path of its device in QOM,
    *filters* the nodes between device and *chain*; chain[0] is the node that takes the writes.
    An empty drive has no chain. *trouble* says why it cannot be snapshotted, if so.
    """

    device: str
    qdev: str
    removable: bool
    filters: tuple[Node, ...]
    chain: tuple[Node, ...]
    trouble: str = ""

    @property
    def name(self) -> str:
        """What people call it: the device's id, else the drive's, else the node's name."""
        parts = self.qdev.removesuffix("/virtio-backend").split("/")
        if "peripheral" in parts or len(parts) == 1:  # QEMU gives the bare id where there is one
            return parts[-1]
        return self.device or (self.chain[0].name if self.chain else self.qdev)

    @property
    def names(self) -> set[str]:
        """Every word that means this disk."""
        nodes = {node.name for node in (*self.filters, *self.chain)}
        return {self.name, self.device, self.qdev, *nodes} - {""}

    @property
    def top(self) -> Node:
        return self.chain[0]

    @property
    def read_only(self) -> bool:
        return bool(self.chain) and self.chain[0].read_only


@dataclass(frozen=True, slots=True)
class Graph:
    nodes: dict[str, Node]
    disks: tuple[Disk, ...]

    def path(self, name: NodeName) -> str:
        """The file of the protocol node at or under *name*; empty if there is none."""
        node = self.nodes[name]
        while (below := node.child("file")) is not None:
            node = self.nodes[below]
        return node.filename if node.driver in PROTOCOLS else ""

    def parents(self, name: NodeName) -> set[NodeName]:
        """The nodes that have *name* as a child of any role."""
        return {
            node.name
            for node in self.nodes.values()
            if any(child == name for _, child in node.children)
        }


async def query(monitor: Monitor) -> Graph:
    """Read the whole graph.

    Edges come from x-debug-query-block-graph (3.0 and later): before 10.1 nothing else tells
    what lies under a filter. Raises Blocked where a QEMU has it no more and no `children` either.
    """
    rows = await monitor.execute("query-named-block-nodes", {"flat": True})
    edges = _edges_in(rows) or await _debug_edges(monitor)
    nodes = {item["node-name"]: _node(item, edges) for item in rows}
    disks = [_disk(item, nodes) for item in await monitor.execute("query-block")]
    return Graph(nodes, tuple(disk for disk in disks if disk is not None))


def _edges_in(rows: list[dict[str, Any]]) -> dict[str, list[tuple[str, NodeName]]]:
    if not all("children" in item for item in rows):
        return {}
    return {
        item["node-name"]: [
            (child["child"], NodeName(child["node-name"]))
            for child in item["children"]
            if "node-name" in child
        ]
        for item in rows
    }


async def _debug_edges(monitor: Monitor) -> dict[str, list[tuple[str, NodeName]]]:
    try:
        graph = await monitor.execute("x-debug-query-block-graph")
    except CommandRefused as gone:
        raise Blocked(f"this QEMU does not tell its block graph: {gone}") from gone
    names = {item["id"]: item["name"] for item in graph["nodes"]}
    edges: dict[str, list[tuple[str, NodeName]]] = {}
    for edge in graph["edges"]:
        edges.setdefault(names[edge["parent"]], []).append(
            (edge["name"], NodeName(names[edge["child"]]))
        )
    return edges


def _node(item: dict[str, Any], edges: dict[str, list[tuple[str, NodeName]]]) -> Node:
    name = NodeName(item["node-name"])
    image, cache = item["image"], item.get("cache", {})
    return Node(
        name=name,
        driver=item["drv"],
        filename=image["filename"],
        read_only=item["ro"],
        virtual_size=image["virtual-size"],
        actual_size=image.get("actual-size", 0),
        detect_zeroes=item.get("detect_zeroes", "off"),
        cache_direct=cache.get("direct", False),
        cache_no_flush=cache.get("no-flush", False),
        encrypted=image.get("encrypted", False),
        children=tuple(edges.get(name, ())),
        bitmaps=listed(item),
        compat=image.get("format-specific", {}).get("data", {}).get("compat", ""),
    )


def _disk(item: dict[str, Any], nodes: dict[str, Node]) -> Disk | None:
    qdev, device = item.get("qdev", ""), item.get("device", "")
    if not qdev:
        return None  # a drive that no device shows to the guest
    inserted = item.get("inserted")
    if inserted is None:
        return Disk(device, qdev, item["removable"], (), ())
    node = nodes[inserted["node-name"]]
    filters: list[Node] = []
    trouble = ""
    while node.driver in FILTERS or node.driver in _JOB_FILTERS:
        if node.driver in _JOB_FILTERS:
            trouble = f"a {node.driver} filter ({node.name}) says that a job is at work on it"
        below = node.child(FILTERS.get(node.driver, "file")) or node.child("backing")
        if below is None:
            break
        filters.append(node)
        node = nodes[below]
    chain = [node]
    while (below := chain[-1].child("backing")) is not None:
        chain.append(nodes[below])
    return Disk(
        device,
        qdev,
        item["removable"],
        tuple(filters),
        tuple(chain),
        trouble or _trouble(chain, nodes),
    )


def _trouble(chain: list[Node], nodes: dict[str, Node]) -> str:
    for node in chain:
        if node.driver in PROTOCOLS:
            continue
        if node.driver not in {"qcow2", "raw"}:
            return f"node {node.name} has driver {node.driver}: only qcow2 and raw are supported"
        below = node.child("file")
        if below is None or nodes[below].driver not in PROTOCOLS:
            driver = nodes[below].driver if below else "nothing"
            return f"node {node.name} lies on {driver}: only files and host devices are supported"
        # what is recorded is a file and its format: a restore would open all of it, without a key
        if node.driver == "raw" and node.virtual_size != nodes[below].virtual_size:
            return f"node {node.name} shows only a part of its file"
        if node.child("data-file") is not None:
            return f"node {node.name} keeps its data in a file apart, which is not supported"
        if node.encrypted:
            return f"node {node.name} is encrypted, which is not supported"
    return ""
