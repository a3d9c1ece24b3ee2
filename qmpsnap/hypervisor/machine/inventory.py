"""The only place that takes down what a running machine is made of."""

from __future__ import annotations

import msgspec

from qmpsnap.hypervisor import abilities
from qmpsnap.hypervisor.machine.asking import Asking
from qmpsnap.hypervisor.monitor import Monitor


class Version(msgspec.Struct, frozen=True, kw_only=True):
    qemu: str
    package: str


class Cpu(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    cpu_index: int
    qom_path: str
    thread_id: int
    qom_type: str | None = None
    props: dict[str, int | str] = {}


class MemorySize(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Bytes; *plugged_memory* is that of DIMMs."""

    base_memory: int
    plugged_memory: int | None = None


class MemoryBackend(msgspec.Struct, frozen=True, kw_only=True):
    """*size* is in bytes; a back end without an id is none of the user's."""

    size: int
    id: str | None = None
    share: bool | None = None
    prealloc: bool = False


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """*id* is the user's, or None; *path* is QOM's. *addr* is what -device calls `addr`."""

    path: str
    type: str
    id: str | None = None
    bus: str | None = None
    addr: str | None = None
    hotplugged: bool = False


class PciFunction(msgspec.Struct, frozen=True, kw_only=True):
    bus: int
    slot: int
    function: int
    vendor: int
    device: int
    qdev_id: str


class ChardevFacts(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    label: str
    filename: str
    frontend_open: bool


class Iothread(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    id: str
    thread_id: int


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """What QEMU says of its machine. None is what this QEMU could not tell: see *missing*."""

    version: Version
    status: str
    machine: str | None
    accelerator: str | None
    uuid: str | None
    name: str | None
    cpus: list[Cpu] | None
    cpu_type: str | None
    memory: MemorySize | None
    memory_backends: list[MemoryBackend] | None
    devices: list[DeviceFacts] | None
    pci: list[PciFunction] | None
    chardevs: list[ChardevFacts] | None
    iothreads: list[Iothread] | None
    missing: list[str]


async def take(monitor: Monitor) -> Inventory:
    """The inventory of the machine behind *monitor*; nothing is changed by asking.

    Raises MonitorLost, or ReplyMalformed where an answer is not what QEMU's schema promises.
    """
    asking = Asking(monitor)
    number, package = await abilities.version(monitor)
    cpus = await asking.ask("query-cpus-fast", list[Cpu])
    uuid = await asking.ask("query-uuid", dict[str, str])
    name = await asking.ask("query-name", dict[str, str])
    status = await monitor.query("query-status", _Status)
    return Inventory(
        version=Version(qemu=number, package=package),
        status=status.status,
        machine=_without_suffix(await asking.property("/machine", "type"), "-machine"),
        accelerator=await _accelerator(asking),
        uuid=(uuid or {}).get("UUID"),
        name=(name or {}).get("name"),
        cpus=cpus,
        cpu_type=await _cpu_type(asking, cpus),
        memory=await asking.ask("query-memory-size-summary", MemorySize),
        memory_backends=await asking.ask("query-memdev", list[MemoryBackend]),
        devices=await _devices(asking),
        pci=await _pci(asking),
        chardevs=await asking.ask("query-chardev", list[ChardevFacts]),
        iothreads=await asking.ask("query-iothreads", list[Iothread]),
        missing=asking.missing,
    )


async def _accelerator(asking: Asking) -> str | None:
    # query-accelerators came after 10.0; before, it is KVM or not
    newer = await asking.quietly("query-accelerators")
    if isinstance(newer, dict) and isinstance(enabled := newer.get("enabled"), str):
        return enabled
    kvm = await asking.ask("query-kvm", dict[str, bool])
    return None if kvm is None else "kvm" if kvm.get("enabled") else "tcg"


async def _cpu_type(asking: Asking, cpus: list[Cpu] | None) -> str | None:
    for cpu in cpus or []:
        return cpu.qom_type or await asking.property(cpu.qom_path, "type")
    return None


async def _devices(asking: Asking) -> list[DeviceFacts] | None:
    found = []
    for folder, named in (("/machine/peripheral", True), ("/machine/peripheral-anon", False)):
        listed = await asking.listed(folder)
        if listed is None:
            asking.missing.append(folder)
            return None
        children = [entry for entry in listed if entry.type.startswith("child<")]
        for entry in children:
            kind = entry.type[len("child<") : -1]
            facts = await _device(asking, f"{folder}/{entry.name}", kind)
            named_facts = msgspec.structs.replace(facts, id=entry.name)
            found.append(named_facts if named else facts)
    return found


async def _device(asking: Asking, path: str, kind: str) -> DeviceFacts:
    bus = await asking.quietly("qom-get", path=path, property="parent_bus")
    addr = await asking.quietly("qom-get", path=path, property="addr")
    plugged = await asking.quietly("qom-get", path=path, property="hotplugged")
    if isinstance(addr, int):  # of PCI devices: slot and function in one number; of DIMMs, bytes
        addr = (f"{addr >> 3:x}.{addr & 7}" if addr < 256 else hex(addr)) if addr >= 0 else None
    return DeviceFacts(
        path=path,
        type=kind,
        bus=bus.rpartition("/")[2] or None if isinstance(bus, str) else None,
        addr=addr if isinstance(addr, str) else None,
        hotplugged=plugged is True,
    )


async def _pci(asking: Asking) -> list[PciFunction] | None:
    buses = await asking.ask("query-pci", list[_Behind])
    if buses is None:
        return None
    found: list[PciFunction] = []
    waiting = [device for bus in buses for device in bus.devices]
    for one in waiting:
        id = one.id
        found.append(
            PciFunction(
                bus=one.bus, slot=one.slot, function=one.function, vendor=id.vendor,
                device=id.device, qdev_id=one.qdev_id,
            )
        )  # fmt: skip
        waiting += one.pci_bridge.devices  # behind a bridge there are more
    return found


class _PciId(msgspec.Struct, frozen=True):
    vendor: int
    device: int


class _Behind(msgspec.Struct, frozen=True):
    devices: list[_Pci] = []


class _Pci(msgspec.Struct, frozen=True):
    bus: int
    slot: int
    function: int
    id: _PciId
    qdev_id: str
    pci_bridge: _Behind = _Behind()


class _Status(msgspec.Struct, frozen=True):
    status: str


def _without_suffix(text: str | None, suffix: str) -> str | None:
    return None if text is None else text.removesuffix(suffix)
