"""The only place that takes down the guest's memory: its backends, its modules, its NUMA nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from qmpsnap.hypervisor.machine.asking import Asking
from qmpsnap.hypervisor.machine.cmdline import CommandLine
from qmpsnap.hypervisor.machine.keyval import Fields
from qmpsnap.hypervisor.machine.options import fields_of
from qmpsnap.hypervisor.machine.sizes import in_bytes

_SAME_NODE, _OTHER_NODE = 10, 20  # numa.h: what QEMU takes for a distance that nobody gave


class MemoryLimits(msgspec.Struct, frozen=True, kw_only=True):
    """`-m`: what the guest starts with, and how far it may be extended."""

    size_bytes: int
    slot_count: int
    max_bytes: int | None = None


class Backend(msgspec.Struct, frozen=True, kw_only=True):
    """A memory backend; one without an *id* is none of the user's.

    *host_nodes* and *policy* bind it to NUMA nodes of the host. *mem_path*, absolute, is that of a
    backend on a file. *huge_page_bytes*: the size of the huge pages it is made of, 0 for the
    host's own choice, None without huge pages; of a file in `hugetlbfs` it is not told here.
    """

    id: str | None
    type: str | None
    size_bytes: int
    share: bool | None
    merge: bool
    dump: bool
    prealloc: bool
    reserve: bool | None
    policy: str
    host_nodes: list[int]
    mem_path: str | None = None
    huge_page_bytes: int | None = None


class MemoryModule(msgspec.Struct, frozen=True, kw_only=True):
    """A memory device, such as a DIMM, whether plugged at run time or from the start."""

    type: str
    id: str | None
    size_bytes: int | None
    address: int | None
    slot: int | None
    node: int | None
    memdev: str | None
    hotplugged: bool | None


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A NUMA node of the guest. *cpus* are the indexes of those that are there now. *distances*
    has the way to each node, in the order of their numbers.
    """

    id: int
    cpus: list[int]
    size_bytes: int | None
    memdev: str | None
    distances: list[int]


class _Configured(msgspec.Struct, rename="kebab"):
    size: int
    slots: int = 0
    max_size: int | None = None


class _Memdev(msgspec.Struct, rename="kebab"):
    size: int
    merge: bool
    dump: bool
    prealloc: bool
    policy: str
    host_nodes: list[int]
    id: str | None = None
    share: bool | None = None
    reserve: bool | None = None


class _Module(msgspec.Struct):
    type: str
    data: dict[str, Any]


async def limits(asking: Asking) -> MemoryLimits | None:
    raw = await asking.value("/machine", "memory")
    if raw is None:
        return None
    told = msgspec.convert(raw, _Configured)
    return MemoryLimits(size_bytes=told.size, slot_count=told.slots, max_bytes=told.max_size)


async def backends(asking: Asking, types: dict[str, str], cwd: Path) -> list[Backend] | None:
    """All of them, by id. *types* are those of the objects under /objects; *cwd* is QEMU's."""
    listed = await asking.ask("query-memdev", list[_Memdev])
    if listed is None:
        return None
    found = [await _backend(asking, one, types.get(one.id or ""), cwd) for one in listed]
    return sorted(found, key=lambda one: one.id or "")


async def modules(asking: Asking) -> list[MemoryModule] | None:
    listed = await asking.ask("query-memory-devices", list[_Module])
    if listed is None:
        return None
    return [
        MemoryModule(
            type=one.type,
            id=one.data.get("id"),
            size_bytes=one.data.get("size"),
            address=one.data.get("addr", one.data.get("memaddr")),
            slot=one.data.get("slot"),
            node=one.data.get("node"),
            memdev=str(one.data.get("memdev", "")).rpartition("/")[2] or None,
            hotplugged=one.data.get("hotplugged"),
        )
        for one in listed
    ]


def nodes(line: CommandLine, cpus: dict[int, int], sizes: dict[str, int]) -> list[Node]:
    """The nodes that -numa makes: none without it.

    *cpus* has the node of each CPU's index, *sizes* the bytes of each backend.
    """
    given = [fields_of(option) for option in line.all("numa")]
    made: dict[int, Fields] = {}
    for fields in given:
        if fields.get("type") == "node":
            made[int(fields.get("nodeid") or len(made))] = fields
    far = _distances(given)
    return [
        Node(
            id=number,
            cpus=sorted(index for index, node in cpus.items() if node == number),
            size_bytes=sizes.get(fields.get("memdev") or "", in_bytes(fields.get("mem"), bare="m")),
            memdev=fields.get("memdev"),
            distances=[_distance(far, number, other) for other in sorted(made)],
        )
        for number, fields in sorted(made.items())
    ]


async def _backend(asking: Asking, one: _Memdev, kind: str | None, cwd: Path) -> Backend:
    path = f"/objects/{one.id}"
    mem_path = huge = None
    if kind == "memory-backend-file":
        mem_path = await asking.property(path, "mem-path")
    elif kind == "memory-backend-memfd" and await asking.value(path, "hugetlb"):
        huge = await asking.value(path, "hugetlbsize")
    return Backend(
        id=one.id,
        type=kind,
        size_bytes=one.size,
        share=one.share,
        merge=one.merge,
        dump=one.dump,
        prealloc=one.prealloc,
        reserve=one.reserve,
        policy=one.policy,
        host_nodes=one.host_nodes,
        mem_path=str(cwd / mem_path) if mem_path else None,
        huge_page_bytes=huge,
    )


def _distances(given: list[Fields]) -> dict[tuple[str | None, str | None], int]:
    ways = [fields for fields in given if fields.get("type") == "dist"]
    return {(one.get("src"), one.get("dst")): int(one.get("val") or 0) for one in ways}


def _distance(far: dict[tuple[str | None, str | None], int], here: int, there: int) -> int:
    if here == there:
        return _SAME_NODE
    ways = ((str(here), str(there)), (str(there), str(here)))  # one way stands for both
    return next((far[way] for way in ways if way in far), _OTHER_NODE)
