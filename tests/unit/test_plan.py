"""What a snapshot will do, from facts made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qmpsnap.engine.info import blockers
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.plan import MAX_PAUSE, Plan, plan
from qmpsnap.engine.survey import Site, Survey
from qmpsnap.engine.wishes import Quiesce, RamChoice, Wishes
from qmpsnap.errors import Blocked, SnapError, UsageError, VmBusy
from qmpsnap.hypervisor.abilities import Abilities, Tracking
from qmpsnap.hypervisor.block.graph import Disk, Node
from qmpsnap.hypervisor.guest.runstate import RunState
from qmpsnap.hypervisor.machine.attach import Attached, facts
from qmpsnap.hypervisor.machine.inventory import DeviceFacts, Inventory, Version
from qmpsnap.hypervisor.vmstate.session import RamMode
from qmpsnap.ids import NodeName, SnapshotId

ID = SnapshotId("20261122T165057123Z")
LAYERS = Path("/local/web/layers")


def _node(name: str, **other: Any) -> Node:
    sizes = {"virtual_size": 1 << 30, "actual_size": 1 << 20}
    flags = {"read_only": False, "cache_direct": False, "cache_no_flush": False}
    fields = {"driver": "qcow2", "filename": f"/images/{name}", "detect_zeroes": "off", **sizes}
    return Node(name=NodeName(name), **{**fields, **flags, **other})


def _site(name: str, *, qdev: str = "", trouble: str = "", **node: Any) -> Site:
    disk = Disk(
        device="",
        qdev=qdev or f"/machine/peripheral/{name}/virtio-backend",
        removable=False,
        filters=(),
        chain=(_node(f"n-{name}", **node),),
        trouble=trouble,
    )
    return Site(disk, (f"/images/{name}",), 0, f"n-{name}", {})


def _attached() -> Attached:
    return facts(["qemu-system-x86_64", "-M", "pc", "-m", "64"], Path("/"))


def _inventory(*devices: str) -> Inventory:
    unknown = dict.fromkeys(
        name for name in Inventory.__struct_fields__ if name not in {"version", "status"}
    )
    found = [DeviceFacts(path=f"/machine/peripheral/{type}", type=type) for type in devices]
    return Inventory(
        version=Version(qemu="10.0.2", package=""),
        status="running",
        **{**unknown, "devices": found, "missing": []},  # type: ignore[arg-type]
    )


_NEW = Abilities("10.0.2", "", True, True, "", True, True, Tracking.SOUND)
_OLD = Abilities("7.2.22", "", False, True, "", False, False, Tracking.SOUND)
_EMULATED = replace(_OLD, tracking=Tracking.ONE_PASS)
_BETWEEN = Abilities("8.2.2", "", True, True, "", True, False, Tracking.UNSOUND)


def _survey(*sites: Site, **other: Any) -> Survey:
    whole: dict[str, Any] = {
        "machine": Machine("web"),
        "state": RunState.RUNNING,
        "abilities": _NEW,
        "inventory": _inventory(),
        "process": None,
        "attached": _attached(),
        "problem": "",
        "sites": sites or (_site("vda"),),
        "jobs": (),
        "blocked_reasons": (),
        "ram_bytes": 64 << 20,
        "agent": Path("/run/ga"),
        "agent_trouble": "",
    }
    return Survey(**{**whole, **other})


def _plan(facts: Survey, **wishes: Any) -> Plan:
    return plan(facts, Wishes(**wishes), ID, LAYERS)


_BLOCKED = replace(_NEW, background=False, background_trouble="RAM lies on ext4")
_PAUSED = {"state": RunState.PAUSED}


@pytest.mark.parametrize(
    ("facts", "asked", "modes"),
    [
        ({}, RamChoice.AUTO, ["live", "background"]),
        ({"abilities": _OLD}, RamChoice.AUTO, ["live"]),
        ({"abilities": _EMULATED}, RamChoice.AUTO, ["live"]),
        ({"abilities": _EMULATED}, RamChoice.LIVE, ["live"]),
        ({"abilities": _BETWEEN}, RamChoice.AUTO, ["background"]),
        ({"abilities": _BETWEEN}, RamChoice.BACKGROUND, ["background"]),
        ({"abilities": _BETWEEN}, RamChoice.PAUSED, ["paused"]),
        ({"abilities": _BETWEEN}, RamChoice.NONE, ["none"]),
        (
            {"abilities": replace(_BETWEEN, background=False, background_trouble="no")},
            RamChoice.AUTO,
            ["paused"],
        ),
        ({"abilities": _BLOCKED}, RamChoice.AUTO, ["live"]),
        ({"inventory": _inventory("vhost-user-blk-pci")}, RamChoice.AUTO, ["live"]),
        ({}, RamChoice.LIVE, ["live"]),
        ({}, RamChoice.PAUSED, ["paused"]),
        ({}, RamChoice.NONE, ["none"]),
        ({"abilities": _OLD}, RamChoice.BACKGROUND, ["background"]),
        (_PAUSED, RamChoice.AUTO, ["background"]),
        (_PAUSED, RamChoice.BACKGROUND, ["background"]),
        (_PAUSED, RamChoice.NONE, ["none"]),
    ],
)
def test_the_ram_mode_follows_from_what_qemu_can(
    facts: dict[str, Any], asked: RamChoice, modes: list[str]
) -> None:
    made = _plan(_survey(**facts), ram=asked)
    assert made.modes == tuple(RamMode(mode) for mode in modes)
    assert made.why


@pytest.mark.parametrize(
    ("facts", "wishes", "kind", "words"),
    [
        ({"abilities": _BLOCKED}, {"ram": RamChoice.BACKGROUND}, Blocked, "RAM lies on ext4"),
        (
            {"inventory": _inventory("vfio-pci")},
            {"ram": RamChoice.BACKGROUND},
            Blocked,
            "writes RAM unseen",
        ),
        (_PAUSED, {"ram": RamChoice.LIVE}, Blocked, "the guest is paused"),
        ({"abilities": _BETWEEN}, {"ram": RamChoice.LIVE}, Blocked, "QEMU 8.2.2 loses writes"),
        ({**_PAUSED, "abilities": _OLD}, {}, Blocked, "cannot save a paused guest"),
        ({**_PAUSED, "abilities": _BLOCKED}, {}, Blocked, "RAM lies on ext4"),
        ({"attached": None, "problem": "no /proc"}, {}, Blocked, "no /proc"),
        ({"blocked_reasons": ("vfio says no",)}, {}, Blocked, "vfio says no"),
        ({"state": RunState.OTHER}, {}, Blocked, "the guest is other"),
        ({"state": RunState.POSTMIGRATE}, {"ram": RamChoice.NONE}, Blocked, "postmigrate"),
        ({"jobs": ("commit j0",)}, {}, VmBusy, "commit j0"),
        ({}, {"exclude": ("nope",)}, UsageError, "there are: vda"),
        ({}, {"include": ("nope",)}, UsageError, "'nope'"),
        ({"sites": (_site("vda", trouble="on NBD"),)}, {}, Blocked, "vda: on NBD"),
        ({"agent_trouble": "deaf"}, {"quiesce": Quiesce.AGENT}, Blocked, "no freeze: deaf"),
        (
            _PAUSED,
            {"quiesce": Quiesce.AGENT, "ram": RamChoice.NONE},
            Blocked,
            "paused guest's agent",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    facts: dict[str, Any], wishes: dict[str, Any], kind: type[SnapError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        _plan(_survey(**facts), **wishes)


@pytest.mark.parametrize("facts", [{"attached": None}, {"blocked_reasons": ("no",)}])
def test_without_ram_more_is_possible(facts: dict[str, Any]) -> None:
    assert _plan(_survey(**facts), ram=RamChoice.NONE).modes == (RamMode.NONE,)


@pytest.mark.parametrize(
    ("facts", "wishes", "freeze"),
    [
        ({}, {"ram": RamChoice.NONE}, True),
        ({}, {"ram": RamChoice.LIVE}, False),
        ({}, {"ram": RamChoice.LIVE, "quiesce": Quiesce.AGENT}, True),
        ({}, {"ram": RamChoice.NONE, "quiesce": Quiesce.NONE}, False),
        ({"agent_trouble": "deaf"}, {"ram": RamChoice.NONE}, False),
        (_PAUSED, {"ram": RamChoice.NONE}, False),
    ],
)
def test_the_guest_is_frozen_where_that_helps(
    facts: dict[str, Any], wishes: dict[str, Any], freeze: bool
) -> None:
    made = _plan(_survey(**facts), **wishes)
    assert made.freeze is freeze
    assert made.freeze_why


@pytest.mark.parametrize(
    ("wishes", "bound", "pause"),
    [
        ({}, MAX_PAUSE, 0.02),
        ({"max_pause": 0.01}, 0.01, 0.005),
        ({"max_pause": 5.0}, 5.0, 0.02),
        ({"ram": RamChoice.PAUSED}, None, 0.02),
        ({"ram": RamChoice.PAUSED, "max_pause": 1.0}, 1.0, 0.02),
    ],
)
def test_the_pause_is_bounded(wishes: dict[str, Any], bound: float | None, pause: float) -> None:
    made = _plan(_survey(), **wishes)
    assert (made.max_pause, made.pause) == (bound, pause)


def test_disks_are_left_out_with_a_reason() -> None:
    empty = replace(_site("cd0").disk, chain=())
    flash = _site("fw", qdev="/machine/system.flash0")
    sites = (
        _site("vda"),
        _site("vdb"),
        _site("ro", read_only=True),
        Site(empty, (), 0, "cd0", {}),
        flash,
    )
    made = _plan(_survey(*sites), exclude=("n-vdb",))
    assert [disk.site.disk.name for disk in made.disks] == ["vda", flash.disk.name]
    left = {item.device: (item.reason, item.virtual_size_bytes) for item in made.left_out}
    assert left == {
        "vdb": ("excluded", 1 << 30),
        "ro": ("read-only", None),
        "cd0": ("empty drive", None),
    }
    # flash belongs to the machine: it is taken with whatever disk was asked for
    made = _plan(_survey(*sites), include=("vdb",))
    assert [disk.site.disk.name for disk in made.disks] == ["vdb", flash.disk.name]


def test_a_disk_in_trouble_may_be_left_out() -> None:
    sites = (_site("vda"), _site("vdb", trouble="on NBD"))
    assert len(_plan(_survey(*sites), exclude=("vdb",)).disks) == 1


def test_the_plan_is_shown_as_json_that_says_what_is_sent() -> None:
    made = _plan(_survey(_site("vda"), _site("vdb", driver="raw", cache_direct=True)))
    shown = msgspec.json.decode(msgspec.json.encode(made.shown()))
    assert [command["execute"] for command in shown["before"]] == ["blockdev-add"] * 2
    actions = shown["at_the_instant"]["arguments"]["actions"]
    assert [action["data"] for action in actions] == [
        {"node": "n-vda", "overlay": f"vda-{ID}"},
        {"node": "n-vdb", "overlay": f"vdb-{ID}"},
    ]
    second = shown["before"][1]["arguments"]
    assert second["file"]["cache"] == {"direct": True, "no-flush": False}
    assert second["file"]["filename"] == f"{LAYERS}/vdb-{ID}.qcow2"
    assert second["backing"] is None
    assert shown["max_pause_ms"] == 200


def test_everything_in_the_way_is_named() -> None:
    assert blockers(_survey()) == []
    facts = _survey(
        _site("vda"),
        _site("vdb", trouble="on NBD"),
        jobs=("stream job0",),
        blocked_reasons=("vfio says no",),
        problem="no command line",
    )
    assert {one.of: one.why for one in blockers(facts)} == {
        "snapshot": "QEMU is busy with stream job0",
        "ram": "vfio says no",
        "restore": "no command line",
        "disk vdb": "on NBD",
    }
