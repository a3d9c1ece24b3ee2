"""What only people were meant to read: QEMU's words for networks and for the device tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpsnap.host import hugepages
from qmpsnap.hypervisor.machine.cmdline import parse
from qmpsnap.hypervisor.machine.memory import nodes
from qmpsnap.hypervisor.machine.network import parsed as networks
from qmpsnap.hypervisor.machine.tree import parsed as devices

MIB = 1 << 20
NETWORK = r"""hub 3
 \ hub0port1: n9: index=0,type=user,net=10.0.2.0,restrict=off
 \ p0: e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56
net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:11:22:33
 \ net0: index=0,type=tap,ifname=tap0,script=no,downscript=no
net0: index=1,type=nic,model=virtio-net-pci,macaddr=52:54:00:11:22:33
 \ net0: index=1,type=tap,ifname=tap0,script=no,downscript=no
lonely: index=0,type=user,net=10.0.3.0,restrict=off
something else
br: index=0,type=nic,model=rtl8139,macaddr=52:54:00:00:00:01
 \ b0: index=0,type=bridge,helper=/usr/lib/helper,br=br7
"""


def test_networks_with_queues_hubs_and_the_same_name_twice() -> None:
    found = {(one.name, one.type): one for one in networks(NETWORK.splitlines())}
    tap, card = found["net0", "tap"], found["net0", "nic"]
    assert (card.queues, card.peer, tap.queues, tap.peer) == (2, "net0", 2, "net0")
    assert tap.facts["ifname"] == "tap0"
    assert (found["e1000.0", "nic"].peer, found["p0", "hubport"].peer) == ("p0", "e1000.0")
    assert found["n9", "user"].peer == "hub0port1"
    assert found["lonely", "user"].peer is None
    assert (found["br", "nic"].peer, found["b0", "bridge"].facts["br"]) == ("b0", "br7")


TREE = """bus: main-system-bus
  type System
  dev: i440FX-pcihost, id ""
    bus: pci.0
      type PCI
      dev: virtio-scsi-pci, id "s0"
        addr = 04.0
        romfile = ""
        bus: virtio-bus
          type virtio-pci-bus
          dev: virtio-scsi-device, id ""
            seg_max_adjust = true
            bus: s0.0
              type SCSI
              dev: scsi-hd, id "d0"
                channel = 0 (0x0)
                scsi-id = 1 (0x1)
                lun = 7 (0x7)
                serial = "a = b"
      dev: e1000, id ""
        addr = 05.1
        rombar = 0 (0x0)
        romfile = "efi-e1000.rom"
      dev: VGA, id ""
        rombar = 1 (0x1)
        romfile = "vga.bin"
  dev: fw_cfg_io, id ""
    file_slots = 32 (0x20)
"""


def test_a_tree_with_buses_in_buses() -> None:
    found = {one.id or one.type: one for one in devices(TREE.splitlines())}
    disk = found["d0"]
    assert (disk.bus, disk.bus_type, disk.address) == ("s0.0", "SCSI", "0:1:7")
    assert (disk.parent, found["virtio-scsi-device"].parent) == ("virtio-scsi-device", "s0")
    assert disk.properties["serial"] == '"a = b"'
    assert (found["s0"].bus, found["s0"].bus_type, found["s0"].address) == ("pci.0", "PCI", "04.0")
    assert found["s0"].parent == "i440FX-pcihost"
    assert (found["fw_cfg_io"].bus, found["fw_cfg_io"].parent) == ("main-system-bus", None)
    roms = {name: one.romfile for name, one in found.items() if one.romfile}
    assert roms == {"VGA": "vga.bin"}  # rombar=0 loads none


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], []),
        (["-numa", "node,mem=64", "-numa", "node,mem=1G"], [(64 * MIB, [10, 20]),
                                                           (1 << 30, [20, 10])]),
        (["-numa", "node,nodeid=1", "-numa", "node,nodeid=0", "-numa", "dist,src=1,dst=0,val=30"],
         [(None, [10, 30]), (None, [30, 10])]),
    ],
)  # fmt: skip
def test_numa_as_it_is_spelled(words: list[str], told: list[tuple[int | None, list[int]]]) -> None:
    found = nodes(parse(["qemu", *words]), {}, {})
    assert [(one.size_bytes, one.distances) for one in found] == told


def test_huge_pages_that_are_free(tmp_path: Path) -> None:
    pool = tmp_path / "hugepages-2048kB"
    pool.mkdir()
    for name, count in (("free", 10), ("resv", 4), ("nr_overcommit", 3), ("surplus", 1)):
        (pool / f"{name}_hugepages").write_text(f"{count}\n")
    (tmp_path / "hugepages-1048576kB").mkdir()
    assert hugepages.free_bytes(tmp_path) == {2 * MIB: 8 * 2 * MIB}
    assert hugepages.of_file(tmp_path / "ram") is None
