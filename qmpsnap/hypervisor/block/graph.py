"""The block graph of one QEMU: what hangs where, and which node of a disk takes the writes."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from qmpsnap.errors import Blocked, CommandRefused
from qmpsnap.hypervisor.block.bitmap import Bitmap
from qmpsnap.hypervisor.monitor import Monitor, understood
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
    what lies under a filter. Raises Blocked where a QEMU has it no more and no `children` either,
    ReplyMalformed for a graph that cannot be, such as one that runs in a circle.
    """
    flat = {"flat": True}
    rows = await monitor.query("query-named-block-nodes", list[_Row], flat)
    edges = _edges_in(rows) or await _debug_edges(monitor)
    nodes: dict[str, Node] = {row.node_name: _node(row, edges) for row in rows}
    drives = await monitor.query("query-block", list[_Drive])
    async with understood("query-named-block-nodes"):
        _refuse_circles(nodes)
        disks = [_disk(drive, nodes) for drive in drives]
    return Graph(nodes, tuple(disk for disk in disks if disk is not None))


class _Cache(msgspec.Struct, frozen=True, rename="kebab"):
    direct: bool = False
    no_flush: bool = False


class _Data(msgspec.Struct, frozen=True):
    compat: str = ""


class _Specific(msgspec.Struct, frozen=True):
    data: _Data = _Data()


class _Image(msgspec.Struct, frozen=True, rename="kebab"):
    filename: str
    virtual_size: int
    actual_size: int = 0
    encrypted: bool = False
    format_specific: _Specific = _Specific()


class _Child(msgspec.Struct, frozen=True, rename="kebab"):
    child: str
    node_name: NodeName | None = None


class _Row(
    msgspec.Struct, frozen=True, rename={"node_name": "node-name", "bitmaps": "dirty-bitmaps"}
):
    node_name: NodeName
    drv: str
    ro: bool
    image: _Image
    detect_zeroes: str = "off"
    cache: _Cache = _Cache()
    bitmaps: tuple[Bitmap, ...] = ()
    children: list[_Child] | None = None


class _Inserted(msgspec.Struct, frozen=True, rename="kebab"):
    node_name: NodeName


class _Drive(msgspec.Struct, frozen=True):
    removable: bool
    device: str = ""
    qdev: str = ""
    inserted: _Inserted | None = None


class _Vertex(msgspec.Struct, frozen=True):
    id: int
    name: str


class _Edge(msgspec.Struct, frozen=True):
    parent: int
    child: int
    name: str


class _Debug(msgspec.Struct, frozen=True):
    nodes: list[_Vertex]
    edges: list[_Edge]


def _edges_in(rows: list[_Row]) -> dict[str, list[tuple[str, NodeName]]]:
    if any(row.children is None for row in rows):
        return {}
    return {
        row.node_name: [
            (child.child, child.node_name)
            for child in row.children or []
            if child.node_name is not None
        ]
        for row in rows
    }


async def _debug_edges(monitor: Monitor) -> dict[str, list[tuple[str, NodeName]]]:
    try:
        graph = await monitor.query("x-debug-query-block-graph", _Debug)
    except CommandRefused as gone:
        raise Blocked(f"this QEMU does not tell its block graph: {gone}") from gone
    names = {vertex.id: vertex.name for vertex in graph.nodes}
    edges: dict[str, list[tuple[str, NodeName]]] = {}
    async with understood("x-debug-query-block-graph"):
        for edge in graph.edges:
            edges.setdefault(names[edge.parent], []).append(
                (edge.name, NodeName(names[edge.child]))
            )
    return edges


def _refuse_circles(nodes: dict[str, Node]) -> None:
    """Raises ValueError for a node that is beneath itself, LookupError for one that is not there.

    Whoever goes down from a node comes to an end then.
    """
    waiting = {name: len({child for _, child in node.children}) for name, node in nodes.items()}
    above: dict[str, list[str]] = {name: [] for name in nodes}
    for name, node in nodes.items():
        for child in {child for _, child in node.children}:
            above[child].append(name)
    ends = [name for name, count in waiting.items() if not count]
    for name in ends:
        for parent in above[name]:
            waiting[parent] -= 1
            ends += [parent] if not waiting[parent] else []
    if len(ends) < len(nodes):
        raise ValueError(f"{min(nodes.keys() - set(ends))} is beneath itself")


def _node(row: _Row, edges: dict[str, list[tuple[str, NodeName]]]) -> Node:
    return Node(
        name=row.node_name,
        driver=row.drv,
        filename=row.image.filename,
        read_only=row.ro,
        virtual_size=row.image.virtual_size,
        actual_size=row.image.actual_size,
        detect_zeroes=row.detect_zeroes,
        cache_direct=row.cache.direct,
        cache_no_flush=row.cache.no_flush,
        encrypted=row.image.encrypted,
        children=tuple(edges.get(row.node_name, ())),
        bitmaps=tuple(one for one in row.bitmaps if one.name),
        compat=row.image.format_specific.data.compat,
    )


def _disk(drive: _Drive, nodes: dict[str, Node]) -> Disk | None:
    qdev, device = drive.qdev, drive.device
    if not qdev:
        return None  # a drive that no device shows to the guest
    if drive.inserted is None:
        return Disk(device, qdev, drive.removable, (), ())
    node = nodes[drive.inserted.node_name]
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
        drive.removable,
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
