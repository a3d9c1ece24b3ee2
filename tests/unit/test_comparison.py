"""The verdicts on a host, from facts that no test machine has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qmpsnap.engine.comparison import Captured, Row, compare
from qmpsnap.engine.configuration import Configuration
from qmpsnap.engine.half import Pair
from qmpsnap.engine.here import Here
from qmpsnap.engine.restoration import Ready, Restoration, places, ready
from qmpsnap.engine.roots import Roots
from qmpsnap.host.headroom import Ceiling, Headroom
from qmpsnap.hypervisor.machine import records
from qmpsnap.hypervisor.machine.binary import Binary
from qmpsnap.hypervisor.machine.cmdline import parse
from qmpsnap.hypervisor.machine.inventory import (
    Cpu,
    Inventory,
    MemoryBackend,
    MemorySize,
    Version,
)
from qmpsnap.store.layout import LocalRoot, StoreRoot
from qmpsnap.store.manifest import LeftOut, Storage
from qmpsnap.store.remote import Store
from tests.rig.halves import HOST, ID, manifest, storage

GIB = 1 << 30
LINE = ["-M", "q35", "-m", "2G", "-nodefaults", "-device", "virtio-rng-pci"]
DISK = ["-blockdev", "driver=qcow2,node-name=d0,file.driver=file,file.filename=/images/base.qcow2"]
QEMU = Binary(
    path=Path("/bin/sh"),
    version="10.0.2",
    machines=frozenset({"pc-q35-10.0", "q35"}),
    cpus=frozenset({"qemu64", "host", "Haswell"}),
    devices=frozenset({"virtio-rng-pci", "vhost-vsock-pci", "virtio-net-pci"}),
    accelerators=frozenset({"kvm", "tcg"}),
)
ROOM = Headroom(
    memory_total_bytes=16 * GIB,
    memory_free_bytes=8 * GIB,
    swap_free_bytes=0,
    cpu_count=4,
    ceilings=(),
)
HERE = Here(
    id=HOST,
    binary=QEMU,
    binary_trouble="",
    headroom=ROOM,
    free_bytes=100 * GIB,
    troubles={},
    tap_trouble="",
    interfaces=frozenset({"lo", "br0"}),
    copied_bytes=0,
)


def inventory(**other: Any) -> Inventory:
    cpu = Cpu(cpu_index=0, qom_path="/machine/unattached/device[0]", thread_id=7)
    whole = Inventory(
        version=Version(qemu="10.0.2", package=""),
        status="running",
        machine="pc-q35-10.0",
        accelerator="tcg",
        uuid=None,
        name=None,
        cpus=[cpu, msgspec.structs.replace(cpu, cpu_index=1)],
        cpu_type="qemu64-x86_64-cpu",
        memory=MemorySize(base_memory=2 * GIB),
        memory_backends=None,
        devices=[],
        pci=None,
        chardevs=None,
        iothreads=None,
        missing=[],
    )
    return msgspec.structs.replace(whole, **other)


def machine(*more: str, of: Inventory | None = None, **other: Any) -> Configuration:
    line = parse(["/bin/sh", *LINE, *DISK, *more])
    whole = Configuration(
        vm="web",
        qemu_version="10.0.2",
        qemu_package="",
        machine_type="pc-q35-10.0",
        exe="/bin/sh",
        cwd="/",
        options=records.as_json(line),
        hotplugged=[],
        unplugged=[],
        inventory=of or inventory(),
    )
    return msgspec.structs.replace(whole, **other)


def wanted(given: Configuration, wish: Restoration, half: Storage | None = None) -> Ready:
    roots = Roots(LocalRoot(Path("/local")), Store(StoreRoot(Path("/store"))))
    sealed = manifest([], "ab" * 32)
    disk = msgspec.structs.replace(storage().disks[0], origin="d0")
    half = half or storage(disks=[disk])
    pair = Pair(roots, "web", ID, half, sealed, "seal", spooled=False)
    assert places(pair, wish.to)
    return ready(pair, wish, given)


def rows(
    given: Configuration | None = None,
    here: Here = HERE,
    *,
    used: int | None = GIB,
    host: str = HOST,
    **wish: Any,
) -> dict[str, Row]:
    """By what they are about; none of them is about the same."""
    given = given or machine()
    start = wanted(given, Restoration(Path("/back"), **wish))
    found = compare(Captured(given, start, used, host), here)
    assert all(bool(row.why) == (row.verdict != "ok") for row in found)
    by_name = {row.what: row for row in found}
    assert len(by_name) == len(found)
    return by_name


def odd(found: dict[str, Row]) -> dict[str, str]:
    return {what: row.verdict for what, row in found.items() if row.verdict != "ok"}


def test_a_host_like_the_captured_one_is_fine() -> None:
    found = rows()
    assert odd(found) == {}
    assert {"QEMU", "machine type", "CPU model", "accelerator", "memory", "disk space"} <= set(
        found
    )
    assert found["CPU model"].captured == "qemu64"


BINARIES: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"version": "11.1.3"}, {"QEMU version": "differs"}),
    ({"version": "9.2.4"}, {"QEMU version": "differs"}),
    ({"machines": frozenset({"q35"})}, {"machine type": "blocks"}),
    ({"cpus": frozenset({"host"})}, {"CPU model": "blocks"}),
    ({"cpus": frozenset()}, {}),
    ({"devices": frozenset({"e1000"})}, {"devices": "blocks"}),
    ({"accelerators": frozenset({"kvm"})}, {"accelerator": "blocks"}),
]


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize(("other", "expected"), BINARIES)
def test_another_qemu(other: dict[str, Any], expected: dict[str, str], cold: bool) -> None:
    here = replace(HERE, binary=replace(QEMU, **other))
    assert odd(rows(here=here, cold=cold)) == expected


def test_a_qemu_that_does_not_run() -> None:
    found = rows(here=replace(HERE, binary=None, binary_trouble="/bin/sh: is no QEMU"))
    assert odd(found) == {"QEMU": "blocks"}
    assert found["QEMU"].why == "/bin/sh: is no QEMU"
    assert "memory" in found


MIB = 1 << 20
MEMORY: list[tuple[int, int, int | None, bool, str]] = [
    # free, swap, used, cold
    (8 * GIB, 0, GIB, False, "ok"),
    (GIB, 0, GIB, False, "differs"),  # it may grow to its 2 GiB
    (GIB - MIB, 0, GIB, False, "blocks"),
    (GIB - MIB, MIB, GIB, False, "differs"),
    (GIB - MIB, 0, GIB, True, "differs"),
    (2 * GIB, 0, None, False, "ok"),
    (2 * GIB - MIB, 0, None, False, "blocks"),
]


@pytest.mark.parametrize(("free", "swap", "used", "cold", "verdict"), MEMORY)
def test_memory(free: int, swap: int, used: int | None, cold: bool, verdict: str) -> None:
    here = replace(HERE, headroom=replace(ROOM, memory_free_bytes=free, swap_free_bytes=swap))
    found = rows(here=here, used=used, cold=cold)
    assert odd(found) == ({} if verdict == "ok" else {"memory": verdict})
    if verdict == "blocks":
        assert "only" in found["memory"].why
        assert "free" in found["memory"].why


def test_memory_that_is_taken_at_once_counts_in_full() -> None:
    full = inventory(memory_backends=[MemoryBackend(size=2 * GIB, id="m", prealloc=True)])
    here = replace(HERE, headroom=replace(ROOM, memory_free_bytes=GIB + MIB))
    assert odd(rows(machine(of=full), here, used=MIB)) == {"memory": "blocks"}
    assert odd(rows(machine(of=inventory()), here, used=MIB)) == {"memory": "differs"}


def test_memory_of_which_nothing_is_known() -> None:
    assert odd(rows(machine(of=inventory(memory=None)), used=None)) == {"memory": "differs"}


CEILINGS: list[tuple[Ceiling, int, bool, str]] = [
    (Ceiling("/g", 4 * GIB, GIB), 0, False, "ok"),
    (Ceiling("/g", 2 * GIB, GIB), 0, False, "differs"),
    (Ceiling("/g", 2 * GIB, GIB + 1), 0, False, "blocks"),
    (Ceiling("/g", 2 * GIB, GIB + 1), 0, True, "differs"),
    (Ceiling("/g", 2 * GIB, GIB + 1), GIB, False, "differs"),  # the rest is swapped
    (Ceiling("/g", 2 * GIB, GIB + 1, swap_bytes=0), GIB, False, "blocks"),  # it may not be
]


@pytest.mark.parametrize(("ceiling", "swap", "cold", "verdict"), CEILINGS)
def test_a_group_of_ours_with_a_limit(
    ceiling: Ceiling, swap: int, cold: bool, verdict: str
) -> None:
    above = Ceiling("/", 100 * GIB, GIB)
    room = replace(ROOM, swap_free_bytes=swap, ceilings=(ceiling, above))
    found = rows(here=replace(HERE, headroom=room), cold=cold)
    assert odd(found) == ({} if verdict == "ok" else {"memory limit of /g": verdict})
    assert found["memory limit of /"].verdict == "ok"


KVM = {"/dev/kvm": "/dev/kvm: Permission denied"}
ACCELERATORS: list[tuple[list[str], str, dict[str, str], bool, str]] = [
    (["-accel", "kvm"], "kvm", {}, False, "ok"),
    (["-enable-kvm"], "kvm", KVM, False, "blocks"),
    (["-enable-kvm"], "kvm", KVM, True, "blocks"),  # QEMU would not start
    (["-M", "accel=kvm:tcg"], "kvm", KVM, False, "blocks"),
    (["-M", "accel=kvm:tcg"], "kvm", KVM, True, "differs"),
    (["-accel", "kvm", "-accel", "tcg"], "tcg", {}, False, "differs"),
    (["-accel", "kvm", "-accel", "tcg"], "tcg", KVM, False, "ok"),
    ([], "tcg", KVM, False, "ok"),
    (["-accel", "xen"], "xen", {}, False, "blocks"),
]


@pytest.mark.parametrize(("words", "was", "troubles", "cold", "verdict"), ACCELERATORS)
def test_accelerators(
    words: list[str], was: str, troubles: dict[str, str], cold: bool, verdict: str
) -> None:
    given = machine(*words, of=inventory(accelerator=was))
    found = rows(given, replace(HERE, troubles=troubles), cold=cold)
    assert odd(found) == ({} if verdict == "ok" else {"accelerator": verdict})
    if verdict == "blocks" and troubles:
        assert "Permission denied" in found["accelerator"].why


def test_the_model_host_is_that_of_the_host_it_ran_on() -> None:
    given = machine("-cpu", "host,migratable=off")
    assert odd(rows(given)) == {}
    assert odd(rows(given, host="f" * 32)) == {"CPU model": "differs"}
    assert odd(rows(machine("-cpu", "Haswell,-rtm"), host="f" * 32)) == {}
    assert odd(rows(machine("-cpu", "Cooperlake"))) == {"CPU model": "blocks"}


def test_fewer_processors() -> None:
    here = replace(HERE, headroom=replace(ROOM, cpu_count=1))
    assert odd(rows(here=here)) == {"CPUs": "differs"}


@pytest.mark.parametrize(
    ("free", "standalone", "verdict"),
    [
        (100 * GIB, False, "ok"),
        (256 << 10, False, "blocks"),
        (16 * MIB, False, "differs"),  # the guest's writes
        (GIB, False, "ok"),
        (GIB - MIB, True, "blocks"),
        (GIB + MIB, True, "differs"),
        (2 * GIB, True, "ok"),
    ],
)
def test_disk_space(free: int, standalone: bool, verdict: str) -> None:
    here = replace(HERE, free_bytes=free, copied_bytes=GIB)
    found = rows(here=here, standalone=standalone)
    assert odd(found) == ({} if verdict == "ok" else {"disk space": verdict})


def test_an_empty_disk_takes_room_too() -> None:
    left = LeftOut(device="vdb", reason="-x", origin="d1", virtual_size_bytes=GIB)
    more = ["-blockdev", "driver=qcow2,node-name=d1,file.driver=file,file.filename=/images/b"]
    given = machine(*more)
    disk = msgspec.structs.replace(storage().disks[0], origin="d0")
    half = storage(disks=[disk], left_out=[left])
    start = wanted(given, Restoration(Path("/back")), half)
    here = replace(HERE, free_bytes=400 * MIB)
    found = compare(Captured(given, start, GIB, HOST), here)
    assert {row.what: row.verdict for row in found}["disk space"] == "differs"
    assert odd(rows(here=here)) == {}


def test_files_that_the_machine_reads() -> None:
    words = ("-kernel", "/boot/vmlinuz", "-bios", "sea.bin", "-L", "/fw", "-initrd", "/boot/i")
    given = machine(*words)
    assert rows(given)["files it reads"].captured == "3"
    troubles = {"/boot/i": "is missing", "sea.bin": "is in none of QEMU's folders"}
    found = rows(given, replace(HERE, troubles=troubles))
    assert odd(found) == {"file /boot/i": "blocks", "file sea.bin": "blocks"}
    assert found["file /boot/i"].why == "/boot/i is missing"


def test_what_it_writes_is_no_file_to_be_there() -> None:
    words = [
        *("-serial", "file:/old/console.log", "-D", "/old/log", "-pidfile", "/old/pid"),
        *("-trace", "file=/old/trace", "-object", "filter-dump,id=f,netdev=n,file=/old/dump"),
        *("-netdev", "user,id=n", "-object", "memory-backend-file,id=m,size=1M,mem-path=/shm/m"),
    ]
    given = machine(*words)
    start = wanted(given, Restoration(Path("/back")))
    assert start.relocated.reads == ("/shm",)
    assert rows(given)["files and sockets of its own"].captured == "5"


def test_networks() -> None:
    given = machine("-netdev", "bridge,id=n0", "-netdev", "bridge,id=n1,br=virbr7",
                    "-netdev", "tap,id=n2,vhost=on", "-netdev", "user,id=n3")  # fmt: skip
    found = rows(given)
    assert odd(found) == {"netdev n1": "blocks"}
    assert "virbr7" in found["netdev n1"].why
    slow = replace(HERE, troubles={"/dev/vhost-net": "there is no /dev/vhost-net"})
    assert odd(rows(given, slow))["netdev n2"] == "differs"
    poor = replace(HERE, tap_trouble="making a tap interface takes CAP_NET_ADMIN")
    assert odd(rows(given, poor))["netdev n2"] == "blocks"
    assert odd(rows(given, poor, isolated=True, cold=True)) == {}  # it is on no network then


def test_a_device_that_needs_a_node_of_the_host() -> None:
    given = machine("-device", "vhost-vsock-pci,guest-cid=3")
    assert odd(rows(given)) == {}
    here = replace(HERE, troubles={"/dev/vhost-vsock": "there is no /dev/vhost-vsock"})
    found = rows(given, here)
    assert odd(found) == {"devices": "blocks"}
    assert found["devices"].why == "there is no /dev/vhost-vsock"


def test_a_monitor_whose_path_is_too_long() -> None:
    assert odd(rows(qmp=Path("/", "x" * 106))) == {}
    assert odd(rows(qmp=Path("/", "x" * 107))) == {"QMP socket": "blocks"}


def test_a_machine_whose_type_nobody_knows() -> None:
    bare = [one for one in machine().options or [] if one["option"] != "M"]
    found = rows(machine(machine_type=None, options=bare))
    assert odd(found) == {"machine type": "differs"}


@pytest.mark.parametrize(
    ("free", "verdict"), [(GIB - MIB, "blocks"), (GIB + MIB, "differs"), (2 * GIB, "ok")]
)
def test_disks_that_are_decrypted_need_room_whatever_else_is_copied(
    free: int, verdict: str
) -> None:
    found = rows(here=replace(HERE, free_bytes=free, decrypted_bytes=GIB))
    assert odd(found) == ({} if verdict == "ok" else {"disk space": verdict})
