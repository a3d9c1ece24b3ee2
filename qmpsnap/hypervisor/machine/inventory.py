"""The only place that takes down what a running machine is made of."""

from __future__ import annotations

from typing import Any

import msgspec

from qmpsnap.errors import ReplyMalformed
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
    version = await monitor.execute("query-version")
    cpus = await asking.ask("query-cpus-fast", list[Cpu])
    uuid = await asking.ask("query-uuid", dict[str, str])
    name = await asking.ask("query-name", dict[str, str])
    status = await monitor.execute("query-status")
    return Inventory(
        version=_version(version),
        status=str(status["status"]),
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
    if isinstance(newer, dict) and "enabled" in newer:
        return str(newer["enabled"])
    kvm = await asking.ask("query-kvm", dict[str, bool])
    return None if kvm is None else "kvm" if kvm.get("enabled") else "tcg"


async def _cpu_type(asking: Asking, cpus: list[Cpu] | None) -> str | None:
    for cpu in cpus or []:
        return cpu.qom_type or await asking.property(cpu.qom_path, "type")
    return None


async def _devices(asking: Asking) -> list[DeviceFacts] | None:
    found = []
    for folder, named in (("/machine/peripheral", True), ("/machine/peripheral-anon", False)):
        listed = await asking.quietly("qom-list", path=folder)
        if listed is None:
            asking.missing.append(folder)
            return None
        children = [entry for entry in listed if str(entry["type"]).startswith("child<")]
        for entry in children:
            kind = str(entry["type"])[len("child<") : -1]
            facts = await _device(asking, f"{folder}/{entry['name']}", kind)
            named_facts = msgspec.structs.replace(facts, id=str(entry["name"]))
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
        bus=str(bus).rpartition("/")[2] or None if bus else None,
        addr=str(addr) if addr is not None else None,
        hotplugged=plugged is True,
    )


async def _pci(asking: Asking) -> list[PciFunction] | None:
    buses = await asking.ask("query-pci", list[dict[str, Any]])
    if buses is None:
        return None
    found: list[PciFunction] = []
    waiting = [device for bus in buses for device in bus.get("devices", [])]
    while waiting:
        one = waiting.pop(0)
        found.append(_function(one))
        waiting += one.get("pci_bridge", {}).get("devices", [])  # behind a bridge there are more
    return found


def _function(raw: dict[str, Any]) -> PciFunction:
    try:
        return msgspec.convert(raw | raw["id"], PciFunction)
    except (KeyError, TypeError, msgspec.ValidationError) as odd:
        raise ReplyMalformed(f"query-pci: {odd}") from odd


def _version(raw: dict[str, Any]) -> Version:
    number = raw["qemu"]
    text = f"{number['major']}.{number['minor']}.{number['micro']}"
    return Version(qemu=text, package=str(raw.get("package", "")))


def _without_suffix(text: str | None, suffix: str) -> str | None:
    return None if text is None else text.removesuffix(suffix)
