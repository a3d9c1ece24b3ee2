import pytest

from qmpsnap.errors import ManifestError, UsageError
from qmpsnap.hypervisor.machine.attach import facts
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option, parse
from qmpsnap.hypervisor.machine.drives import slots
from qmpsnap.hypervisor.machine.keyval import format
from qmpsnap.hypervisor.machine.options import (
    Blockdev,
    Chardev,
    Device,
    Drive,
    Machine,
    Memory,
    Netdev,
    Object,
    applied_sets,
    guest_name,
)
from qmpsnap.hypervisor.machine.records import as_json, from_json
from tests.unit.machine_lines import CAPTURED

VIEWS = [Machine, Memory, Blockdev, Drive, Device, Chardev, Netdev, Object]


@pytest.mark.parametrize("argv", CAPTURED.values(), ids=CAPTURED)
def test_options_as_records_give_the_same_command_line(argv):
    line = parse(argv)
    assert from_json(line.binary, as_json(line)) == line


def test_options_records_are_typed():
    line = parse(
        ["qemu", "-blockdev", '{"driver":"file","read-only":true}', "-m", "256", "-S", "-netdev",
         "user,id=n,hostfwd=a,hostfwd=b", "-append", "x=1", "-chardev", "null,mux"]
    )  # fmt: skip
    assert as_json(line) == [
        {"option": "blockdev", "json": {"driver": "file", "read-only": True}},
        {"option": "m", "keyval": {"size": "256"}},
        {"option": "S"},
        {"option": "netdev", "keyval": {"type": "user", "id": "n", "hostfwd": ["a", "b"]}},
        {"option": "append", "text": "x=1"},
        {"option": "chardev", "keyval": {"backend": "null", "mux": True}},
    ]


@pytest.mark.parametrize(
    "record", [{}, {"option": "m", "keyval": {"size": 1}}, {"option": 1}, {"option": "m", "x": 1}]
)
def test_options_records_of_somebody_else_are_damaged_data(record):
    with pytest.raises(ManifestError):
        from_json("qemu", [record])


@pytest.mark.parametrize("view", VIEWS)
def test_options_views_keep_the_text(view):
    text = '{"driver":"x","id":"y","n":[1,{"a":null}]}' if view in (Blockdev, Device) else "a=1,b"
    option = Option(view.NAME, text)
    assert view.of(option).option() == option


def test_options_short_drives_are_drives():
    assert format(Drive.of(Option("hdb", "a,b")).fields) == "index=1,media=disk,file=a,,b"
    assert Drive.of(Option("cdrom", "a")).read_only
    assert Drive.of(Option("pflash", "a")).interface == "pflash"
    assert not Drive.of(Option("drive", "file=a,readonly=off")).read_only


def test_options_set_is_written_into_its_option():
    line = parse(
        ["qemu", "-drive", "id=a,if=none", "-drive", "id=b,if=none", "-set", "drive.b.file=x,y=z"]
    )
    assert applied_sets(line).argv()[1:] == [
        "-drive", "id=a,if=none", "-drive", "id=b,if=none,file=x,,y=z",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "setting", ["drive.c.file=x", "drive.a", "nothing.a.b=c", "device.a.x=1", "drive..x=1"]
)
def test_options_set_that_qemu_refuses_is_refused(setting):
    line = parse(["qemu", "-drive", "id=a", "-device", '{"driver":"x","id":"a"}', "-set", setting])
    with pytest.raises(UsageError, match="-set"):
        applied_sets(line)


def test_options_guest_name_is_the_last_one():
    assert guest_name(parse(["q", "-name", "a", "-name", "guest=b,process=c"])) == "b"
    assert guest_name(CommandLine("q")) is None


def test_options_drives_have_the_names_that_qemu_gives():
    line = parse(
        ["q", "-drive", "if=virtio", "-drive", "if=virtio,index=3", "-cdrom", "x", "-drive",
         "if=none", "-drive", "if=none,id=mine", "-drive", "media=cdrom", "-fdb", "y"]
    )  # fmt: skip
    names = ["virtio0", "virtio3", "ide1-cd0", "none0", "mine", "ide0-cd0", "floppy1"]
    assert [slot.backend for slot in slots(line)] == names
    assert [slot.key for slot in slots(line)][2:5] == ["drive:2", "drive:3", "mine"]


def test_options_attach_finds_the_sockets(tmp_path):
    argv = CAPTURED["agent"]
    found = facts(argv, tmp_path)
    assert found.name == "web"
    assert found.agent == tmp_path / "qga.sock"
    assert found.qmp == (tmp_path / "mon,1.sock", tmp_path / "old.sock")
