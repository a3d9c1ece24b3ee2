"""The changes of a disk as a qcow2 over an older image: the only place that writes that format.

The format is QEMU's docs/interop/qcow2.txt, version 3, with clusters of 64 KiB:

    header | data and L2 tables, in the guest's order | L1 table | refcount blocks | refcount table

Every cluster of the file is used exactly once, so every refcount is 1.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from qmpsnap.errors import LocalFailed
from qmpsnap.store.clusters import CLUSTER, CLUSTER_BITS, Read, batches, clusters, whole
from qmpsnap.store.copying import data_runs
from qmpsnap.store.files import Progress, partial
from qmpsnap.store.sink import Sink, Terms, expect_room

_TABLE = CLUSTER // 8  # entries of an L2 table, and of a cluster of the other tables
_REFCOUNT_ORDER = 4  # 16 bits each
_REFCOUNTS = CLUSTER * 8 >> _REFCOUNT_ORDER  # a block of them
_USED_ONCE = struct.pack(">H", 1)
_COPIED = 1 << 63  # the refcount is 1: may be written in place
_READS_AS_ZEROS = 1
_SECTOR = 512
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT = 0xE2792ACA
_LONGEST_NAME = 1023
_L1_MOST = 32 << 20  # bytes: QEMU opens no larger table


def write(
    dst: Path,
    *,
    virtual_size: int,
    backing: str | None,
    backing_format: str,
    extents: Sequence[tuple[int, int]],
    read: Read,
    reserve: int,
    limit: int | None,
    cancelled: Callable[[], bool],
    on_progress: Progress | None,
) -> int:
    """Make *dst* a qcow2 that holds *extents* of a disk and is *backing* elsewhere; its bytes.

    Blocks. *extents*, offsets and lengths in bytes in any order, are rounded out to clusters and
    cut off at *virtual_size*; the content comes from *read*, a few MiB at a time, in rising order.
    *backing* is written as it is: relative to *dst*'s folder, or absolute; None: elsewhere the disk
    is zeros. The file is whole, mode 0600, durable; *limit*, *reserve*, *cancelled* and
    *on_progress* are those of `copying.copy`.

    Raises LocalFailed, which names the file, also when *dst* exists; Cancelled; what *read* raises
    (an OSError as LocalFailed). No *dst* is left behind then.
    """
    head = _Head(dst, virtual_size, backing, backing_format)
    runs = clusters(extents, virtual_size)
    data = sum(end - start for start, end in runs)
    if os.path.lexists(dst):
        raise LocalFailed(f"{dst}: exists")
    with partial(dst, LocalFailed) as descriptor:
        expect_room(dst, _at_most(runs, head.l1_entries), reserve)
        terms = Terms(limit, reserve, cancelled, on_progress)
        what = f"writing {dst.name}"
        with Sink(descriptor, dst, terms, total=data * CLUSTER, what=what) as sink:
            sink.look(0)
            _Writer(sink, head).fill(runs, whole(dst, read, virtual_size))
        return sink.written


def at_most(extents: Sequence[tuple[int, int]], virtual_size: int) -> int:
    """The bytes that `write` takes for *extents* if none of their clusters reads as zeros."""
    return _at_most(clusters(extents, virtual_size), _l1_entries(virtual_size))


def _l1_entries(virtual_size: int) -> int:
    return max(1, -(-virtual_size // (_TABLE * CLUSTER)))


def _at_most(runs: list[tuple[int, int]], l1_entries: int) -> int:
    """The bytes of the file if none of the clusters reads as zeros."""
    tables = {at for start, end in runs for at in range(start // _TABLE, (end - 1) // _TABLE + 1)}
    used = 1 + sum(end - start for start, end in runs) + len(tables) + _whole(l1_entries * 8)
    return (used + sum(_refcount_clusters(used))) * CLUSTER


def _whole(size: int) -> int:
    """The clusters that *size* bytes take."""
    return -(-size // CLUSTER)


def _refcount_clusters(used: int) -> tuple[int, int]:
    """The refcount blocks, and clusters of their table, for *used* clusters and for themselves."""
    blocks = table = 1
    while blocks * _REFCOUNTS < used + blocks + table:
        blocks = -(-(used + blocks + table) // _REFCOUNTS)
        table = _whole(blocks * 8)
    return blocks, table


class _Head:
    """The first cluster, as far as it is known from the start."""

    def __init__(
        self, dst: Path, virtual_size: int, backing: str | None, backing_format: str
    ) -> None:
        self.l1_entries = _l1_entries(virtual_size)
        if self.l1_entries * 8 > _L1_MOST:
            raise LocalFailed(f"{dst}: a qcow2 of 64 KiB clusters holds no {virtual_size} bytes")
        self._name, self._extensions = b"", _EXTENSION.pack(0, 0)
        if backing is not None:
            self._stand_on(dst, backing, backing_format.encode())
        self._size = -(-virtual_size // _SECTOR) * _SECTOR  # QEMU counts a disk in sectors

    def _stand_on(self, dst: Path, backing: str, format: bytes) -> None:
        self._name = os.fsencode(backing)
        if not 0 < len(self._name) <= _LONGEST_NAME:
            raise LocalFailed(f"{dst}: the backing file's name has {len(self._name)} bytes")
        if ":" in backing.partition("/")[0]:  # QEMU would take it for a protocol
            raise LocalFailed(f"{dst}: the backing file's name needs a ./ in front: {backing}")
        named = _EXTENSION.pack(_BACKING_FORMAT, len(format))
        self._extensions = named + format.ljust(-(-len(format) // 8) * 8, b"\0") + self._extensions

    def packed(self, l1: int, refcounts: int, refcount_clusters: int) -> bytes:
        """The cluster, with the offsets of the two tables."""
        fixed = _HEADER.pack(
            *(b"QFI\xfb", 3),
            *(_HEADER.size + len(self._extensions) if self._name else 0, len(self._name)),
            *(CLUSTER_BITS, self._size),
            *(0, self.l1_entries, l1),  # 0: not encrypted
            *(refcounts, refcount_clusters),
            *(0, 0),  # internal snapshots
            *(0, 0, 0),  # features
            *(_REFCOUNT_ORDER, _HEADER.size),
        )
        return (fixed + self._extensions + self._name).ljust(CLUSTER, b"\0")


class _Writer:
    """Fills the file from its second cluster on; the tables in memory are L1 and one L2."""

    def __init__(self, sink: Sink, head: _Head) -> None:
        self._sink, self._head = sink, head
        self._next = 1  # cluster of the file
        self._l1 = array("Q", bytes(8 * head.l1_entries))
        self._l2 = array("Q", bytes(CLUSTER))
        self._l2_index = -1
        self._done = 0

    def fill(self, runs: list[tuple[int, int]], read: Read) -> None:
        """Data, tables and header, the header last."""
        for batch in batches(runs, self._sink.step // CLUSTER, _TABLE):
            pieces = [(at * CLUSTER, count * CLUSTER) for at, count in batch]
            for (at, count), content in zip(batch, read(pieces), strict=True):
                if at // _TABLE != self._l2_index:
                    self._flush_l2()
                    self._l2_index = at // _TABLE
                self._put(at, content)
                self._done += count * CLUSTER
            self._sink.look(self._done)
        self._flush_l2()
        l1 = self._append(_big_endian(self._l1))
        blocks, table_clusters = _refcount_clusters(self._next)
        used = self._next + blocks + table_clusters
        offsets = array("Q")
        for block in range(blocks):
            counted = min(_REFCOUNTS, used - block * _REFCOUNTS)
            offsets.append(self._append(_USED_ONCE * counted))
        table = self._append(_big_endian(offsets))
        assert self._next == used
        self._sink.pwrite(self._head.packed(l1, table, table_clusters), 0)

    def _put(self, cluster: int, content: bytes | bytearray) -> None:
        """The guest's clusters from *cluster* on: data where there is a one in them."""
        first = cluster % _TABLE
        count = len(content) // CLUSTER
        self._l2[first : first + count] = array("Q", [_READS_AS_ZEROS]) * count
        for start, end in data_runs(content, CLUSTER):
            offset = self._append(memoryview(content)[start:end])
            for step in range(0, end - start, CLUSTER):
                self._l2[first + (start + step) // CLUSTER] = (offset + step) | _COPIED

    def _flush_l2(self) -> None:
        if self._l2_index >= 0:
            self._l1[self._l2_index] = self._append(_big_endian(self._l2)) | _COPIED
            self._l2 = array("Q", bytes(CLUSTER))

    def _append(self, content: bytes | memoryview) -> int:
        """Write *content* at the end, filled up to whole clusters; its offset."""
        offset = self._next * CLUSTER
        self._next += _whole(len(content))
        short = self._next * CLUSTER - offset - len(content)
        self._sink.pwrite(content, offset)
        if short:
            self._sink.pwrite(bytes(short), offset + len(content))
        return offset


def _big_endian(entries: array[int]) -> bytes:
    if sys.byteorder == "little":
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()
