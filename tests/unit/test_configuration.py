"""`machine.json`: nothing may be missing from it, and what is, is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from qmpsnap.engine.configuration import decode, encode, schemas
from qmpsnap.engine.details import Details
from qmpsnap.engine.reconciliation import Reconciliation
from qmpsnap.errors import ManifestError
from qmpsnap.hypervisor.machine.inventory import (
    ChardevFacts,
    DeviceFacts,
    Iothread,
    MemoryBackend,
    PciFunction,
)
from tests.rig.qemu import ROOT
from tests.rig.schema import wrong
from tests.unit.machine_details import DETAILS
from tests.unit.test_comparison import inventory, machine

MACHINE = machine(
    of=inventory(
        devices=[DeviceFacts(path="/machine/peripheral/rng", type="virtio-rng-pci", id="rng")],
        pci=[PciFunction(bus=0, slot=1, function=0, vendor=2, device=3, qdev_id="rng")],
        chardevs=[ChardevFacts(label="serial0", filename="null", frontend_open=True)],
        iothreads=[Iothread(id="io0", thread_id=8)],
        memory_backends=[MemoryBackend(size=1 << 20)],
    ),
    details=DETAILS,
)
WHOLE = msgspec.structs.replace(
    MACHINE,
    hotplugged=["late"],
    reconciled=Reconciliation(
        options=[{"option": "device", "json": {"driver": "virtio-rng-pci", "id": "late"}}],
        origins={"drive:3": "drive:2"},
        troubles=[],
        notes=["netdev n1: a tap without vhost"],
    ),
)
# what QEMU calls things by, and not we
FREE = {"options", "origins", "props", "values", "properties", "format_specific", "fields"}
TREE = json.loads(encode(WHOLE))


def keys(tree: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """The way to each key; QEMU's own options and properties are free in what they say."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in pairs:
        here = (*path, key)
        if isinstance(tree, dict):
            yield here
        if isinstance(value, dict | list) and key not in FREE:
            yield from keys(value, *here)


KEYS = list(keys(TREE))


def test_it_comes_back_as_it_was() -> None:
    assert decode(encode(WHOLE), "machine.json") == WHOLE
    assert len(KEYS) > 200
    assert all(getattr(DETAILS, key) for key in Details.__struct_fields__ if key != "withheld")


@pytest.mark.parametrize("path", KEYS, ids=lambda path: ".".join(map(str, path)))
def test_each_key_that_is_taken_away_is_named(path: tuple[Any, ...]) -> None:
    tree = copy.deepcopy(TREE)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    with pytest.raises(ManifestError, match=f"web/machine.json: .*{path[-1]}"):
        decode(json.dumps(tree), "web/machine.json")


@pytest.mark.parametrize("number", range(len(TREE["options"])))
def test_an_option_without_its_name_is_told(number: int) -> None:
    tree = copy.deepcopy(json.loads(encode(MACHINE)))
    del tree["options"][number]["option"]
    with pytest.raises(ManifestError, match="not an option of a command line"):
        decode(json.dumps(tree), "machine.json").command_line()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": 99}, "version 99"),
        ({"format": "qmpsnap-usage"}, "'qmpsnap-usage'"),
        ({"hotplugged": None}, "hotplugged"),
        ({"inventory": {}}, "inventory"),
        ({"inventory": []}, "inventory"),
    ],
)
def test_what_it_may_not_say(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ManifestError, match=told):
        decode(json.dumps(TREE | change), "machine.json")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", encode(WHOLE)[:-9]])
def test_what_is_no_machine_at_all(text: bytes) -> None:
    with pytest.raises(ManifestError, match=r"^machine\.json: "):
        decode(text, "machine.json")


def test_of_what_came_and_went_the_command_line_is_another_one() -> None:
    line, _ = WHOLE.command_line()
    assert line.argv()[1:] == ["-device", '{"driver":"virtio-rng-pci","id":"late"}']
    tree = copy.deepcopy(TREE)
    del tree["reconciled"]["options"][0]["option"]
    with pytest.raises(ManifestError, match="not an option of a command line"):
        decode(json.dumps(tree), "machine.json").command_line()


def test_one_of_an_older_version_may_lack_what_came_later() -> None:
    tree = copy.deepcopy(TREE)
    del tree["inventory"]["memory_backends"][0]["prealloc"], tree["reconciled"], tree["details"]
    tree["version"] = 1
    older = msgspec.structs.replace(WHOLE, version=1, reconciled=None, details=None)
    assert decode(json.dumps(tree), "machine.json") == older
    assert older.command_line() == MACHINE.command_line()


def test_the_committed_schema_is_current() -> None:
    for word, schema in schemas().items():
        committed = ROOT / "docs/schemas" / f"{word}.json"
        assert json.loads(committed.read_text()) == schema, "run scripts/schemas"


def test_the_schema_takes_what_is_written_and_nothing_else() -> None:
    schema = schemas()["qmpsnap-machine"]
    assert wrong(TREE, schema) == []
    for key in TREE["details"]:
        other = copy.deepcopy(TREE)
        other["details"][key] = 7
        assert f"$.details.{key}" in " ".join(wrong(other, schema))
        del other["details"][key]
        assert f"$.details.{key} is missing" in wrong(other, schema)
