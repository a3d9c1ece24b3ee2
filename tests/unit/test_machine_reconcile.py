"""What can be said of a changed command line without a QEMU."""

from __future__ import annotations

import pytest

from qmpsnap.hypervisor.machine.changes import changes, name_of
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option, parse
from qmpsnap.hypervisor.machine.defaults import kept
from qmpsnap.hypervisor.machine.inventory import DeviceFacts
from qmpsnap.hypervisor.machine.processors import Processors, Slot
from qmpsnap.hypervisor.machine.reconcile import Reconciled, numbered
from qmpsnap.hypervisor.machine.relocate import refusal
from tests.unit.test_comparison import inventory

ANON = "/machine/peripheral-anon/device"


def line(text: str) -> CommandLine:
    return parse(["qemu", *text.split()])


def test_devices_without_an_id_are_counted_as_qemu_makes_them() -> None:
    said = line(
        '-drive if=virtio,file=a -device {"driver":"nec-usb-xhci"} -device e1000 '
        "-device e1000,id=x -drive if=none,id=d,file=b -device virtio-blk-pci,drive=d"
    )
    there = [DeviceFacts(path=f"{ANON}[{n}]", type="any") for n in (0, 2, 3)]
    late = DeviceFacts(path=f"{ANON}[4]", type="any", hotplugged=True)
    # an id that was plugged again is not the device of the command line
    again = DeviceFacts(path="/machine/peripheral/x", type="any", id="x", hotplugged=True)
    found = changes(inventory(devices=[*there, again, late]), said)
    assert {index: one.path for index, one in found.there.items()} == {
        2: f"{ANON}[0]", 0: f"{ANON}[2]", 1: f"{ANON}[3]",
    }  # fmt: skip
    assert [name_of(said.options[index]) for index in found.gone] == ["x", "virtio-blk-pci"]
    assert found.plugged == (late, again)
    assert found.unclear == ()
    strange = DeviceFacts(path=f"{ANON}[9]", type="any")
    assert changes(inventory(devices=[strange]), said).unclear == (strange.path,)


def test_nothing_is_said_of_devices_that_are_not_known() -> None:
    assert not changes(inventory(devices=None), line("-device e1000,id=x"))


@pytest.mark.parametrize(
    ("before", "after", "added"),
    [
        ("-m 1", "-m 1 -device scsi-hd,drive=d", ["-drive", "index=2,media=cdrom"]),
        ("-cdrom a", "-cdrom a -device scsi-hd,drive=d", []),
        ("-device ide-hd,drive=d", "-m 1", ["-global", "scsi-cd.port_index=0"]),
        ("-m 1", "-netdev user,id=n", ["-net", "nic", "-net", "user"]),
        ("-netdev user,id=n", "-m 1", ["-net", "none"]),
        ("-netdev user,id=n", "-nic user", []),
        ("-nodefaults", "-nodefaults -netdev user,id=n -device scsi-hd,drive=d", []),
    ],
)
def test_what_qemu_adds_by_itself_stays_the_same(before: str, after: str, added: list[str]) -> None:
    found = kept(line(before), line(after))
    assert found.argv() == [*line(after).argv(), *added]


def test_cpus_before_the_first_gap_are_those_of_smp() -> None:
    at = "/machine/unattached/device"
    paths = [f"{at}[0]", f"{at}[3]", None, f"{at}[5]", None, "/machine/peripheral/late"]
    slots = [
        Slot("any-cpu", {"socket-id": 0, "core-id": n, "thread-id": 0}, path)
        for n, path in enumerate(paths)
    ]
    smp = {"cpus": 4, "maxcpus": 6, "sockets": 1, "dies": 1, "cores": 6, "threads": 1}
    cpus = Processors(tuple(slots), smp)
    assert [slot.props["core-id"] for slot in cpus.gone] == [2]
    found = cpus.spelled(line("-smp 4,maxcpus=6 -m 1"))
    assert found.argv()[1:] == [
        "-m", "1", "-smp", "2,maxcpus=6,sockets=1,cores=6,threads=1",
        "-device", '{"driver":"any-cpu","socket-id":0,"core-id":3,"thread-id":0}',
    ]  # fmt: skip
    whole = Processors((*slots[:2], slots[3]), smp | {"cpus": 3})
    assert whole.gone == []
    assert whole.spelled(found) == found


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (Option("device", '{"driver":"vfio-pci","id":"gpu","host":"00:02.0"}'), "device gpu: vfio"),
        (Option("netdev", "vhost-vdpa,id=n"), "netdev n: a network of type vhost-vdpa"),
        (Option("object", "input-linux,id=in,evdev=/dev/input/event0"), "object in: input-linux"),
        (Option("device", "e1000,id=nic"), ""),
    ],
)
def test_what_is_of_this_host_is_refused_before_the_snapshot(option: Option, told: str) -> None:
    said = refusal(line("-m 1"), option)
    assert said.startswith(told)
    assert bool(said) == bool(told)


def test_a_spare_network_holds_the_place_of_one_that_went() -> None:
    found = Reconciled(line("-netdev user,id=n1 -nic user"))
    assert numbered(found, set()) == numbered(found, {0, 1}) == found
    assert numbered(found, {0, 3}).line.argv()[5:] == [
        "-netdev", "user,id=qmpsnap-spare2,restrict=on",
        "-netdev", "user,id=qmpsnap-spare3,restrict=on",
    ]  # fmt: skip
    unspoken = Reconciled(line("-m 1"))
    assert numbered(unspoken, {0}) == unspoken
