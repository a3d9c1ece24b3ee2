"""Whether this host can take a captured machine: rows of verdicts from facts; asks nobody."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.engine import likeness
from qmpsnap.engine.configuration import Configuration
from qmpsnap.engine.here import Here
from qmpsnap.engine.restoration import Ready
from qmpsnap.engine.room import growth
from qmpsnap.engine.verdict import Row as Row
from qmpsnap.engine.verdict import row
from qmpsnap.host.headroom import Ceiling
from qmpsnap.hypervisor.machine.binary import Binary
from qmpsnap.hypervisor.machine.cmdline import CommandLine
from qmpsnap.hypervisor.machine.options import Device, Machine, accelerators, fields_of
from qmpsnap.hypervisor.machine.relocation.scene import SOCKET_PATH
from qmpsnap.units import in_bytes

_OVERLAY = 256 << 10  # bytes of a new overlay, of an empty disk's image, and of their folder
_DEFAULT_BRIDGE = "br0"  # net/net.c
_NODES = {"vhost-vsock": "/dev/vhost-vsock"}  # devices that cannot do without a node of the host


@dataclass(frozen=True, slots=True)
class Captured:
    """What is brought back. *used_bytes*: memory of the VM's process, swap included, if known.

    *host*: where it was captured.
    """

    machine: Configuration
    ready: Ready
    used_bytes: int | None
    host: str

    @property
    def line(self) -> CommandLine:
        return self.ready.relocated.cmdline

    @property
    def cold(self) -> bool:
        return self.ready.wish.cold


def compare(captured: Captured, here: Here) -> list[Row]:
    """Every row, in the order in which people would look."""
    rows = [_qemu(captured, here)]
    if here.binary is not None:
        rows += [
            _version(captured, here.binary),
            _machine_type(captured, here.binary),
            *_model(captured, here, here.binary),
            _accelerator(captured, here, here.binary),
            _devices(captured, here, here.binary),
        ]
    rows += likeness.compare(captured.machine.details, here, cold=captured.cold)
    rows += [_memory(captured, here)]
    rows += [_under(captured, here, one) for one in here.headroom.ceilings]
    rows += [_cpus(captured, here), _disk_space(captured, here), *_files(captured, here)]
    return [*rows, *_networks(captured, here), *_sockets(captured)]


def _qemu(captured: Captured, here: Here) -> Row:
    path = captured.line.binary
    return row("QEMU", captured.machine.exe, path, blocks=here.binary_trouble)


def _version(captured: Captured, binary: Binary) -> Row:
    was, now = captured.machine.qemu_version, binary.version
    why = ""
    if _number(now) < _number(was):
        why = f"{now} is older than {was}, and may not know what that has saved"
    elif was != now:
        why = f"{now} is newer than {was}; a machine of the same type is made to come back on it"
    return row("QEMU version", was, now, differs=why)


def _machine_type(captured: Captured, binary: Binary) -> Row:
    wanted = next((Machine.of(one).type for one in captured.line.all("machine")), None)
    if wanted is None:
        return row("machine type", None, None, differs="which one it was is not known")
    known = wanted in binary.machines
    why = "" if known else f"QEMU {binary.version} has no machine type {wanted}"
    return row("machine type", wanted, wanted if known else "none", blocks=why)


def _model(captured: Captured, here: Here, binary: Binary) -> Iterator[Row]:
    given = [option.value or "" for option in captured.line.all("cpu")]
    model = given[-1].partition(",")[0] if given else _model_of(captured.machine)
    if model is None:
        return
    if binary.cpus and model not in binary.cpus:
        yield row("CPU model", model, "none", blocks=f"QEMU {binary.version} has no {model}")
        return
    why = ""
    if model == "host" and captured.host != here.id:
        why = "its features are those of the host it ran on; this is another host"
    yield row("CPU model", model, model, differs=why)


def _accelerator(captured: Captured, here: Here, binary: Binary) -> Row:
    asked = accelerators(captured.line)
    trouble = {one: f"QEMU {binary.version} has no {one}" for one in asked}
    trouble |= dict.fromkeys(binary.accelerators, "")
    trouble["kvm"] = trouble.get("kvm") or here.troubles.get("/dev/kvm", "")
    was, now = captured.machine.inventory.accelerator, None
    now = next((one for one in asked if not trouble[one]), None)
    if now is None:
        why = "; ".join(trouble[one] for one in asked)
        return row("accelerator", was or asked[0], "none", blocks=why)
    if was in (None, now):
        return row("accelerator", was, now)
    why = f"it ran on {was}, and would run on {now}: {trouble.get(str(was)) or 'as asked'}"
    if was == "kvm" and not captured.cold:
        return row("accelerator", was, now, blocks=f"{why}; what KVM has saved only KVM takes")
    return row("accelerator", was, now, differs=why)


def _devices(captured: Captured, here: Here, binary: Binary) -> Row:
    drivers = {Device.of(option).driver or "" for option in captured.line.all("device")} - {""}
    unknown = sorted(drivers - binary.devices)
    why = f"QEMU {binary.version} has no {', '.join(unknown)}" if unknown else ""
    for start, node in _NODES.items():
        if any(one.startswith(start) for one in drivers) and node in here.troubles:
            why = why or here.troubles[node]
    known = f"{len(drivers) - len(unknown)} known"
    return row("devices", f"{len(drivers)} drivers", known, blocks=why)


def _memory(captured: Captured, here: Here) -> Row:
    ram, needed = _ram(captured.machine), _needed(captured)
    room = here.headroom
    told = f"{in_bytes(room.memory_free_bytes)} free, {in_bytes(room.swap_free_bytes)} of swap"
    if needed is None:
        why = "how much memory the VM used is not known"
        return row("memory", None, told, differs=why)
    was = f"{in_bytes(needed)} used of {in_bytes(ram)} RAM"
    free = room.memory_free_bytes
    if needed > free:
        why = f"the VM used {in_bytes(needed)}, and only {in_bytes(free)} are free"
        if captured.cold or needed <= free + room.swap_free_bytes:
            return row("memory", was, told, differs=f"{why}: this host would swap")
        return row("memory", was, told, blocks=f"{why}, also with swap")
    why = f"the guest's RAM may grow to {in_bytes(ram)}" if ram and ram > free else ""
    return row("memory", was, told, differs=why)


def _under(captured: Captured, here: Here, ceiling: Ceiling) -> Row:
    needed, ram = _needed(captured), _ram(captured.machine)
    left = max(0, ceiling.limit_bytes - ceiling.used_bytes)
    swap = here.headroom.swap_free_bytes
    swap = swap if ceiling.swap_bytes is None else min(swap, ceiling.swap_bytes)
    what = f"memory limit of {ceiling.group}"
    told = f"{in_bytes(left)} left of {in_bytes(ceiling.limit_bytes)}"
    if needed is not None and needed > left:
        why = f"the VM used {in_bytes(needed)}, and this group of ours has {in_bytes(left)} left"
        if captured.cold or needed <= left + swap:
            return row(what, in_bytes(needed), told, differs=why)
        return row(what, in_bytes(needed), told, blocks=why)
    why = f"the guest's RAM may grow to {in_bytes(ram)}" if ram and ram > left else ""
    return row(what, in_bytes(needed), told, differs=why)


def _cpus(captured: Captured, here: Here) -> Row:
    cpus = captured.machine.inventory.cpus
    count = None if cpus is None else len(cpus)
    now = here.headroom.cpu_count
    why = "fewer than the guest has: it will be slower" if count and count > now else ""
    return row("CPUs", None if count is None else str(count), str(now), differs=why)


def _disk_space(captured: Captured, here: Here) -> Row:
    ready, storage = captured.ready, captured.ready.pair.storage
    sizes = [one.virtual_size_bytes for one in storage.disks]
    empty = [one.virtual_size_bytes for one in storage.left_out if one.virtual_size_bytes]
    needed = _OVERLAY * (1 + len(sizes) + len(empty))
    needed += here.copied_bytes if ready.wish.standalone else 0
    needed += here.decrypted_bytes
    needed += sum(one.bytes for one in ready.fetched)
    if ready.memory.lacking and ready.wish.to in (ready.memory.folder or Path()).parents:
        needed += sum(one.stored_pages << 12 for one in ready.pair.manifest.ram.images)
    was = f"{in_bytes(needed)} written at once, {in_bytes(sum(sizes) + sum(empty))} in all"
    told = f"{in_bytes(here.free_bytes)} free"
    if here.free_bytes < needed:
        why = f"{ready.wish.to}: {in_bytes(needed)} are needed, {told}"
        return row("disk space", was, told, blocks=why)
    soon = needed + sum(map(growth, [*sizes, *empty]))
    why = f"{ready.wish.to}: a guest that writes much fills it up, and is stopped then"
    return row("disk space", was, told, differs=why if here.free_bytes < soon else "")


def _files(captured: Captured, here: Here) -> Iterator[Row]:
    relocated = captured.ready.relocated
    names = [*relocated.reads, *relocated.roms]
    wrong = [name for name in names if name in here.troubles]
    if len(names) > len(wrong):
        count = str(len(names) - len(wrong))
        yield row("files it reads", count, count)
    for name in wrong:
        why = f"{name} {here.troubles[name]}"
        yield row(f"file {name}", "read", "-", blocks=why)


def _networks(captured: Captured, here: Here) -> Iterator[Row]:
    for option in captured.line.all("netdev", "nic", "net"):
        fields = fields_of(option)
        name = f"{option.name} {fields.get('id') or fields.get('type')}"
        if fields.get("type") == "bridge":
            bridge = fields.get("br") or _DEFAULT_BRIDGE
            there = bridge in here.interfaces
            why = "" if there else f"there is no bridge {bridge} on this host"
            yield row(name, bridge, bridge if there else "none", blocks=why)
        elif fields.get("type") == "tap":
            why = "" if not here.tap_trouble else f"{name}: {here.tap_trouble}"
            slow = here.troubles.get("/dev/vhost-net", "") if fields.on("vhost") else ""
            yield row(name, "tap", "a tap of its own", blocks=why, differs=slow)


def _sockets(captured: Captured) -> Iterator[Row]:
    qmp, moved = captured.ready.qmp, captured.ready.relocated.moved
    why = ""
    if len(str(qmp).encode()) > SOCKET_PATH:
        why = f"{qmp}: a socket's path has at most {SOCKET_PATH} bytes"
    yield row("QMP socket", None, str(qmp), blocks=why)
    if moved:
        here = f"{len(moved)} under {captured.ready.wish.to}"
        yield row("files and sockets of its own", str(len(moved)), here)


def _ram(machine: Configuration) -> int | None:
    memory = machine.inventory.memory
    return None if memory is None else memory.base_memory + (memory.plugged_memory or 0)


def _needed(captured: Captured) -> int | None:
    """What the new process will hold: as much as the old one did, or all that it takes at once."""
    ram = _ram(captured.machine)
    backends = captured.machine.inventory.memory_backends or []
    if any(one.prealloc for one in backends) or captured.line.has("mem-prealloc"):
        return max(ram or 0, captured.used_bytes or 0) or None
    return ram if captured.used_bytes is None else captured.used_bytes


def _model_of(machine: Configuration) -> str | None:
    # a QOM type: Haswell-v4-x86_64-cpu
    kind = machine.inventory.cpu_type or ""
    return kind.removesuffix("-cpu").rpartition("-")[0] or None if kind.endswith("-cpu") else None


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
