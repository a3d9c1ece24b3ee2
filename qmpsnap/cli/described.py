"""What `show --machine` prints: the main facts of a captured machine as readable tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmpsnap.cli.units import ABSENT

if TYPE_CHECKING:
    from qmpsnap.cli.render import Output
    from qmpsnap.engine.configuration import Configuration
    from qmpsnap.engine.details import Details

Facts = list[tuple[str, object]]


def show(out: Output, machine: Configuration) -> None:
    """Print *machine*; one of version 1 has less to tell."""
    seen, details = machine.inventory, machine.details
    package = f" ({machine.qemu_package})" if machine.qemu_package else ""
    out.facts([
        ("VM", machine.vm),
        ("QEMU", f"{machine.qemu_version}{package}, {machine.exe or 'not known which file'}"),
        ("machine type", machine.machine_type),
        ("accelerator", seen.accelerator),
        ("UUID", seen.uuid),
        *(_of(details) if details else [("details", "none: recorded by version 1")]),
        ("plugged", ", ".join(machine.hotplugged) or None),
        ("unplugged", ", ".join(machine.unplugged) or None),
    ])  # fmt: skip
    if details is not None:
        _tables(out, details)


def _of(details: Details) -> Facts:
    from qmpsnap.cli.render import in_bytes

    told: Facts = []
    if (cpu := details.cpu) is not None:
        refused = f"; not to be had: {', '.join(cpu.unavailable)}" if cpu.unavailable else ""
        told.append(("CPU model", f"{cpu.name}, {len(cpu.features)} features{refused}"))
    if (shape := details.topology) is not None:
        parts = (("socket", shape.sockets), ("core", shape.cores), ("thread", shape.threads))
        each = ", ".join(f"{count} {word}s" if count != 1 else f"1 {word}" for word, count in parts)
        told.append(("CPUs", f"{shape.cpus} of {shape.maxcpus}: {each}"))
    if (memory := details.memory) is not None:
        most = f", up to {in_bytes(memory.max_bytes)}" if memory.slot_count else ""
        slots = f" in {memory.slot_count} slots" if memory.slot_count else ""
        told.append(("memory", f"{in_bytes(memory.size_bytes)}{most}{slots}"))
    if (clock := details.clock) is not None:
        told.append(("clock", f"{clock.guest_time or ABSENT}, the host's {clock.host_time}"))
    if (board := details.board) is not None:
        items = [one.name for one in board.fw_cfg] + [f"SMBIOS {one.type}" for one in board.smbios]
        told.append(("tables", ", ".join(items) or None))
    return [*told, *_of_guest(details), *_of_words(details)]


def _of_guest(details: Details) -> Facts:
    from qmpsnap.cli.render import in_bytes

    guest = details.guest
    if guest is None:
        return []
    system = guest.os
    interfaces = [f"{one.name} {' '.join(one.addresses)}".strip() for one in guest.interfaces or []]
    mounts = [
        f"{one.mountpoint} ({one.type}, {in_bytes(one.used_bytes)} of {in_bytes(one.total_bytes)})"
        for one in guest.filesystems or []
    ]
    return [
        ("guest", (system.pretty_name or system.name or system.id) if system else None),
        ("kernel", system.kernel_release if system else None),
        ("host name", guest.host_name),
        ("time zone", guest.time_zone.name if guest.time_zone else None),
        ("interfaces", ", ".join(interfaces) or None),
        ("file systems", ", ".join(mounts) or None),
    ]


def _of_words(details: Details) -> Facts:
    secrets = [
        f"{one.id} ({one.file or one.dir or one.keyid or 'given on the command line'})"
        for one in details.secrets or []
    ]
    return [
        ("secrets", ", ".join(secrets) or None),
        ("left out", ", ".join(details.withheld) or None),
        ("not known", ", ".join(details.missing) or None),
    ]


def _tables(out: Output, details: Details) -> None:
    from qmpsnap.cli.render import in_bytes

    _table(out, ("MEMORY", "TYPE", "SIZE", "SHARE", "PREALLOC", "POLICY", "HUGE PAGES"), [
        [one.id or ABSENT, one.type or ABSENT, in_bytes(one.size_bytes), _yes(one.share),
         _yes(one.prealloc), " ".join([one.policy, *map(str, one.host_nodes)]),
         in_bytes(one.huge_page_bytes)]
        for one in details.memory_backends or []
    ])  # fmt: skip
    _table(out, ("NUMA NODE", "CPUS", "SIZE", "MEMORY", "DISTANCES"), [
        [str(one.id), _list(one.cpus), in_bytes(one.size_bytes), one.memdev or ABSENT,
         " ".join(map(str, one.distances))]
        for one in details.numa_nodes or []
    ])  # fmt: skip
    # those of the board itself are many, and always the same
    _table(out, ("DEVICE", "TYPE", "BUS", "ADDRESS", "NOT AS BY DEFAULT"), [
        [one.id or ABSENT, one.type, one.bus or ABSENT, one.address or ABSENT,
         " ".join(f"{key}={value}" for key, value in (one.properties or {}).items())]
        for one in details.device_tree or [] if one.id or one.properties
    ])  # fmt: skip
    behind = {one.id: one for one in details.network_backends or []}
    _table(out, ("CARD", "MODEL", "MAC", "QUEUES", "BACKEND", "TYPE", "ON THE HOST"), [
        [one.id, one.model, one.mac or ABSENT, str(one.queue_count), one.backend or ABSENT,
         back.type if (back := behind.get(one.backend or "")) else ABSENT,
         (back and (back.interface or back.bridge)) or ABSENT]
        for one in details.network_cards or []
    ])  # fmt: skip
    _table(out, ("NODE", "DRIVER", "SIZE", "CACHE", "FILE"), [
        [one.node, one.driver, in_bytes(one.virtual_size_bytes),
         "direct" if one.cache and one.cache.direct else "cached", one.file or ABSENT]
        for one in details.block_nodes or []
    ])  # fmt: skip
    _table(out, ("THREAD", "NAME", "HOST CPUS"), [
        [one.kind, one.name, _list(one.host_cpus)] for one in details.pinning or []
    ])  # fmt: skip
    _table(out, ("FIRMWARE", "SIZE", "FILE"), [
        [one.name, in_bytes(one.size_bytes), one.path or ABSENT] for one in details.firmware or []
    ])  # fmt: skip


def _table(out: Output, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if rows:
        out.line()
        out.table(head, rows)


def _yes(value: bool | None) -> str:
    return ABSENT if value is None else "yes" if value else "no"


def _list(numbers: Sequence[int] | None) -> str:
    return ABSENT if numbers is None else " ".join(map(str, numbers)) or "none"
