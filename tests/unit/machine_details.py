"""The details of a machine that has one of everything, for tests that need no QEMU."""

from qmpsnap.engine.details import Details, Pinned
from qmpsnap.engine.firmware import FirmwareFile
from qmpsnap.hypervisor.guest.system import (
    GuestFilesystem,
    GuestInterface,
    GuestOs,
    GuestSystem,
    GuestZone,
)
from qmpsnap.hypervisor.machine.blocks import BlockDrive, BlockNode, Cache
from qmpsnap.hypervisor.machine.board import Board, Clock, FwCfg, Smbios
from qmpsnap.hypervisor.machine.limits import Limits
from qmpsnap.hypervisor.machine.memory import Backend, MemoryLimits, MemoryModule, Node
from qmpsnap.hypervisor.machine.network import Card, NetworkBackend
from qmpsnap.hypervisor.machine.objects import IothreadSettings, Secret, ThrottleGroup
from qmpsnap.hypervisor.machine.processor import CpuModel, CpuSlot, Topology
from qmpsnap.hypervisor.machine.tree import TreeDevice

GIB = 1 << 30
DETAILS = Details(
    recorded_at="2026-11-22T16:50:57.123Z",
    cpu=CpuModel(
        name="Haswell",
        expansion="static",
        features=["aes", "sse2"],
        features_off=["avx512f", "pcid"],
        unavailable=["pcid"],
        values={"family": 6, "vendor": "GenuineIntel"},
    ),
    topology=Topology(cpus=2, maxcpus=4, sockets=2, dies=1, clusters=1, cores=2, threads=1),
    cpu_slots=[CpuSlot(type="Haswell-x86_64-cpu", vcpus_count=1, props={"socket-id": 1})],
    numa_nodes=[Node(id=0, cpus=[0, 1], size_bytes=2 * GIB, memdev="m0", distances=[10])],
    memory=MemoryLimits(size_bytes=2 * GIB, slot_count=4, max_bytes=8 * GIB),
    memory_backends=[
        Backend(
            id="m0",
            type="memory-backend-memfd",
            size_bytes=2 * GIB,
            share=True,
            merge=True,
            dump=True,
            prealloc=False,
            reserve=True,
            policy="bind",
            host_nodes=[0],
            huge_page_bytes=None,
        )
    ],
    memory_modules=[
        MemoryModule(
            type="dimm",
            id="dimm0",
            size_bytes=GIB,
            address=4 * GIB,
            slot=0,
            node=0,
            memdev="m1",
            hotplugged=True,
        )
    ],
    device_tree=[
        TreeDevice(
            type="e1000",
            id="nic0",
            bus="pcie.0",
            bus_type="PCIE",
            address="05.0",
            parent="q35-pcihost",
            properties={"netdev": "n0"},
        )
    ],
    network_cards=[
        Card(id="nic0", model="e1000", mac="52:54:00:12:34:56", queue_count=1, backend="n0")
    ],
    network_backends=[
        NetworkBackend(
            id="n0",
            type="tap",
            interface="tap0",
            bridge=None,
            queue_count=1,
            options={"type": "tap", "ifname": "tap0"},
            told="ifname=tap0",
        )
    ],
    block_nodes=[
        BlockNode(
            node="d0",
            driver="qcow2",
            file="/images/base.qcow2",
            backing_file=None,
            read_only=False,
            virtual_size_bytes=GIB,
            cache=Cache(writeback=True, direct=False, no_flush=False),
            detect_zeroes="off",
            encrypted=False,
            format_specific={"type": "qcow2"},
            options={"driver": "qcow2"},
        )
    ],
    block_drives=[
        BlockDrive(
            name="",
            qdev="vd0",
            node="d0",
            removable=False,
            limits=Limits(iops_total=100),
            group="d0",
            options=None,
        )
    ],
    throttle_groups=[ThrottleGroup(id="tg0", limits=Limits(bps_total=1 << 20))],
    iothreads=[IothreadSettings(id="io0", poll_max_ns=32768, poll_grow=0, poll_shrink=0)],
    pinning=[Pinned(kind="vcpu", name="0", host_cpus=[0, 1])],
    clock=Clock(
        base="utc",
        clock="host",
        driftfix=None,
        guest_time="2026-11-22T16:50:57",
        host_time="2026-11-22T16:50:57.123Z",
    ),
    board=Board(
        uuid="11111111-2222-3333-4444-555555555555",
        fw_cfg=[FwCfg(name="opt/a", file=None, string="hello", gen_id=None)],
        smbios=[Smbios(type=1, file=None, fields={"serial": ["42"]})],
    ),
    firmware=[
        FirmwareFile(
            name="bios-256k.bin", path="/fw/bios-256k.bin", size_bytes=1 << 18, blake3="ab" * 32
        )
    ],
    secrets=[Secret(id="s0", type="secret", file="/etc/key", format="raw")],
    withheld=[],
    guest=GuestSystem(
        os=GuestOs(id="debian", pretty_name="Debian"),
        host_name="web",
        filesystems=[
            GuestFilesystem(
                name="vda1", mountpoint="/", type="ext4", used_bytes=1 << 20, total_bytes=GIB
            )
        ],
        interfaces=[GuestInterface(name="eth0", mac=None, addresses=["10.0.2.15/24"])],
        time_zone=GuestZone(name="UTC", offset_seconds=0),
    ),
    missing=["query-dirty-rate"],
)
