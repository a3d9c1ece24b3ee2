"""What random histories have found: the shortest of each, that it may not come back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.histories.history import MIB, Operation
from tests.histories.world import carried_out
from tests.rig.qemu import binary

_DISKS = [
    {"kind": "qcow2", "size": 4 * MIB + 37 * 512, "unmap": True},
    {"kind": "raw", "size": 4 * MIB, "unmap": False},
]


def _create(level: str, **other: Any) -> Operation:
    asked = {"level": level, "ram": "none", "include": [], "compress": False, "meanwhile": []}
    return ["create", {**asked, **other}]


def _fault(inner: Operation, how: str, at: str | int, **other: Any) -> Operation:
    return ["fault", inner, {"how": how, "at": at, "later": False, "delivered": True, **other}]


_WRITE: Operation = ["write", [["data", 0, 65000, 3000, 7], ["data", 1, 513, 70000, 9]]]
_FOUND: dict[str, list[Operation]] = {
    "a VM started on our overlay, restored": [
        _create("overlay"), _WRITE, ["restart"], _create("full"),
    ],
    "the overlay that a VM was started on, folded": [
        _create("overlay"), _WRITE, ["restart"], ["delete", 0], _create("full"),
    ],
    "a kill between the seal and the digests": [
        _WRITE, _fault(_create("full"), "engine at note", "after closed"), ["check"],
    ],
    "a kill between the two names of a manifest": [
        _WRITE, _fault(_create("full"), "engine at call", "unlink storage.json.partial"), ["check"],
    ],
    "a monitor that is back only after a while": [
        _create("full"), _fault(_create("inc"), "cut", "transaction", dead=True), ["check"],
    ],
    "a cut at the end of a fold": [
        _create("overlay"), _WRITE, _fault(["delete", 0], "cut", "job-dismiss"), _create("full"),
    ],
    "a cut at the end of a fold of what a VM was started on": [
        _create("overlay"), _WRITE, _create("overlay"), ["restart"], ["delete", 0],
        _fault(["delete", 0], "cut", "job-dismiss"), _create("full"),
    ],
    "a kill when QEMU has closed what was folded": [
        _create("overlay"), _WRITE, _fault(["delete", 0], "engine at command", "blockdev-del"),
        ["check"],
    ],
    "a kill in a merge": [
        _create("full"), _WRITE, _create("inc"), _WRITE, _create("inc"),
        _fault(["prune", 1, True], "engine at call", "rename v0.qcow2.partial"), ["check"],
    ],
}  # fmt: skip


@pytest.mark.parametrize("found", _FOUND)
async def test_it_does_not_come_back(found: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1, logger="qemu.qmp")
    told = {"disks": _DISKS, "operations": _FOUND[found]}
    await carried_out(told, binary("7.2"), Path("/dev/shm"))
