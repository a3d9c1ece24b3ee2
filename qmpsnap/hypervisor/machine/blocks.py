"""The only place that takes down the block graph for the record: nodes and drives with options."""

from __future__ import annotations

from typing import Any

import msgspec

from qmpsnap.hypervisor.machine import keyval, secrecy
from qmpsnap.hypervisor.machine.asking import Asking
from qmpsnap.hypervisor.machine.cmdline import CommandLine
from qmpsnap.hypervisor.machine.drives import slots
from qmpsnap.hypervisor.machine.keyval import Fields
from qmpsnap.hypervisor.machine.limits import Limits, of_drive
from qmpsnap.hypervisor.machine.options import Blockdev

Options = dict[str, Any]


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    writeback: bool
    direct: bool
    no_flush: bool


class BlockNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node of the block graph. *options* are those that the command line gives it, as JSON would
    have them; None for a node that was made otherwise. *format_specific* is what the driver says
    of the image (qapi: ImageInfoSpecific).
    """

    node: str
    driver: str
    file: str | None
    backing_file: str | None
    read_only: bool
    virtual_size_bytes: int | None
    cache: Cache | None
    detect_zeroes: str
    encrypted: bool
    format_specific: dict[str, Any] | None
    options: Options | None


class BlockDrive(msgspec.Struct, frozen=True, kw_only=True):
    """What a device of the guest has for a disk. *name* is the drive's, "" for one by -blockdev;
    *qdev* the device's id or QOM path; *node* None without a medium. *group* has its *limits*.
    *options* are those of its -drive.
    """

    name: str
    qdev: str | None
    node: str | None
    removable: bool
    limits: Limits | None
    group: str | None
    options: Options | None


class _Node(msgspec.Struct, rename={"node_name": "node-name"}):
    node_name: str
    drv: str
    ro: bool
    detect_zeroes: str
    encrypted: bool
    image: dict[str, Any]
    file: str | None = None
    backing_file: str | None = None
    cache: dict[str, bool] | None = None


async def nodes(asking: Asking, line: CommandLine | None) -> list[BlockNode] | None:
    found = await asking.ask("query-named-block-nodes", list[_Node], flat=True)
    if found is None:
        return None
    views = [Blockdev.of(option) for option in line.all("blockdev")] if line else []
    given = {view.node_name or "": _tree(view.fields) for view in views}
    return sorted((_node(one, given.get(one.node_name)) for one in found), key=lambda it: it.node)


async def drives(asking: Asking, line: CommandLine | None) -> list[BlockDrive] | None:
    found = await asking.ask("query-block", list[dict[str, Any]])
    if found is None:
        return None
    given = {slot.backend: _tree(slot.drive.fields) for slot in (slots(line) if line else [])}
    return [_drive(one, given.get(str(one.get("device")))) for one in found]


def _node(one: _Node, options: Options | None) -> BlockNode:
    cache = one.cache and {key.replace("-", "_"): value for key, value in one.cache.items()}
    return BlockNode(
        node=one.node_name,
        driver=one.drv,
        file=one.file and secrecy.of_image(one.file),
        backing_file=one.backing_file and secrecy.of_image(one.backing_file),
        read_only=one.ro,
        virtual_size_bytes=one.image.get("virtual-size"),
        cache=msgspec.convert(cache, Cache) if cache else None,
        detect_zeroes=one.detect_zeroes,
        encrypted=one.encrypted,
        format_specific=one.image.get("format-specific"),
        options=options,
    )


def _drive(one: dict[str, Any], options: Options | None) -> BlockDrive:
    inserted = one.get("inserted") or {}
    return BlockDrive(
        name=str(one.get("device") or ""),
        qdev=one.get("qdev"),
        node=inserted.get("node-name"),
        removable=bool(one.get("removable")),
        limits=of_drive(inserted) if inserted else None,
        group=inserted.get("group"),
        options=options,
    )


def _tree(fields: Fields) -> Options:
    return dict(keyval.nested(fields))
