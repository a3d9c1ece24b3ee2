"""The rest of `machine.json`: all that the machine is made of, beyond what a restore acts upon."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from qmpsnap.engine import firmware
from qmpsnap.engine.firmware import FirmwareFile
from qmpsnap.engine.roots import moment
from qmpsnap.errors import UNREADABLE, Blocked, ReplyMalformed, UsageError
from qmpsnap.host import hugepages, tasks
from qmpsnap.host.process import ProcessFacts
from qmpsnap.hypervisor.guest import system
from qmpsnap.hypervisor.guest.system import GuestSystem
from qmpsnap.hypervisor.machine import (
    binary,
    blocks,
    board,
    memory,
    network,
    objects,
    printed,
    processor,
    secrecy,
    tree,
)
from qmpsnap.hypervisor.machine import firmware as roms
from qmpsnap.hypervisor.machine.asking import Asking
from qmpsnap.hypervisor.machine.blocks import BlockDrive, BlockNode
from qmpsnap.hypervisor.machine.board import Board, Clock
from qmpsnap.hypervisor.machine.cmdline import CommandLine
from qmpsnap.hypervisor.machine.inventory import Inventory
from qmpsnap.hypervisor.machine.memory import Backend, MemoryLimits, MemoryModule, Node
from qmpsnap.hypervisor.machine.network import Card, NetworkBackend
from qmpsnap.hypervisor.machine.objects import IothreadSettings, Secret, ThrottleGroup
from qmpsnap.hypervisor.machine.processor import CpuModel, CpuSlot, Topology
from qmpsnap.hypervisor.machine.tree import Found, TreeDevice
from qmpsnap.hypervisor.monitor import Monitor, understood

T = TypeVar("T")
_WITHIN = 2.0  # seconds for the binary to say where it looks for firmware: it takes 0.1


class Pinned(msgspec.Struct, frozen=True, kw_only=True):
    """A thread of QEMU, and the host's CPUs that it may run on.

    *name*: the index of a vCPU, the id of an iothread, "main".
    """

    kind: Literal["vcpu", "iothread", "main"]
    name: str
    host_cpus: list[int] | None


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine is made of, as it was just before the point in time.

    None is what could not be learnt: *missing* has the question. What only the command line says
    (*numa_nodes*, *board*) is None when that is not known. *withheld* names the words of the
    command line that are secret, and so are in no file of a snapshot. *guest* is what the guest's
    agent says, None without one.
    """

    recorded_at: str
    cpu: CpuModel | None
    topology: Topology | None
    cpu_slots: list[CpuSlot] | None
    numa_nodes: list[Node] | None
    memory: MemoryLimits | None
    memory_backends: list[Backend] | None
    memory_modules: list[MemoryModule] | None
    device_tree: list[TreeDevice] | None
    network_cards: list[Card] | None
    network_backends: list[NetworkBackend] | None
    block_nodes: list[BlockNode] | None
    block_drives: list[BlockDrive] | None
    throttle_groups: list[ThrottleGroup] | None
    iothreads: list[IothreadSettings] | None
    pinning: list[Pinned] | None
    clock: Clock | None
    board: Board | None
    firmware: list[FirmwareFile] | None
    secrets: list[Secret] | None
    withheld: list[str]
    guest: GuestSystem | None
    missing: list[str]


@dataclass(frozen=True, slots=True)
class Subject:
    """The machine that is asked about. *flash*: the images of its pflash that nobody writes to.

    *line* is its command line, None if not known. *agent* is the socket of the guest's, None
    without one; a *deaf* one is not asked again.
    """

    seen: Inventory
    process: ProcessFacts | None
    line: CommandLine | None
    cwd: Path | None
    flash: Sequence[str]
    agent: Path | None
    deaf: bool


async def take(monitor: Monitor, subject: Subject) -> Details:
    """Ask QEMU, the host and the guest's agent; never while the guest is held.

    Each question is a small one: it keeps QEMU's main loop for less than some 3 ms. The agent has
    1.5 s in all, beside the others. Raises MonitorLost; all else that fails is missing.
    """
    asking, silent = Asking(monitor), list[str]()
    guest = asyncio.create_task(_guest(subject, silent))
    folders = asyncio.create_task(_folders(subject))
    try:
        found = _sound(asking, await _asked(_Careful(asking), subject, folders))
        return msgspec.structs.replace(
            found, guest=await guest, missing=list(dict.fromkeys([*asking.missing, *silent]))
        )
    finally:
        for task in (guest, folders):
            task.cancel()
        await asyncio.gather(guest, folders, return_exceptions=True)


def _sound(asking: Asking, found: Details) -> Details:
    """*found* without what could be written down, and would not be understood when it is read."""
    for field in msgspec.structs.fields(Details):
        try:
            msgspec.convert(msgspec.to_builtins(getattr(found, field.name)), field.type)
        except UNREADABLE:
            asking.missing.append(field.name)
            found = msgspec.structs.replace(found, **{field.name: None})
    return found


class _Careful:
    """Questions, an odd answer to which is as good as none."""

    def __init__(self, asking: Asking) -> None:
        self.asking = asking

    async def part(self, name: str, answer: Awaitable[T]) -> T | None:
        try:
            async with understood(name):
                return await answer
        except (ReplyMalformed, UsageError, OSError):
            self.asking.missing.append(name)
            return None


async def _asked(
    careful: _Careful, subject: Subject, folders: Awaitable[list[Path] | None]
) -> Details:
    asking, part, seen = careful.asking, careful.part, subject.seen
    line, withheld = secrecy.without(subject.line) if subject.line else (None, [])
    if line is None:
        asking.missing.append("the command line")
    cwd = subject.cwd or Path("/")
    at = seen.cpus[0].qom_path if seen.cpus else None
    kinds = await part("qom-list /objects", objects.types(asking))
    backends = await part("query-memdev", memory.backends(asking, kinds or {}, cwd))
    cards = await part("info network", network.take(asking, line))
    devices = await part("info qtree", tree.take(asking))
    names = await part("info roms", roms.loaded(asking, line, devices or [], subject.flash))
    return Details(
        recorded_at=moment(),
        cpu=await part("the CPU model", processor.model(asking, line, seen.cpu_type, at)),
        topology=await part("/machine smp", processor.topology(asking)),
        cpu_slots=await part("query-hotpluggable-cpus", processor.slots(asking)),
        numa_nodes=await part("-numa", _nodes(line, seen, backends)) if line else None,
        memory=await part("/machine memory", memory.limits(asking)),
        memory_backends=backends
        and await part("huge pages", asyncio.to_thread(_with_pages, backends)),
        memory_modules=await part("query-memory-devices", memory.modules(asking)),
        device_tree=None
        if devices is None
        else await part("device properties", _tree(asking, devices, seen)),
        network_cards=cards and cards[0],
        network_backends=cards and cards[1],
        block_nodes=await part("query-named-block-nodes", blocks.nodes(asking, line)),
        block_drives=await part("query-block", blocks.drives(asking, line)),
        throttle_groups=None
        if kinds is None
        else await part("throttle groups", objects.throttle_groups(asking, kinds)),
        iothreads=await part("query-iothreads", objects.iothreads(asking)),
        pinning=await part("CPU affinity", asyncio.to_thread(_pinned, subject)),
        clock=await part("rtc-time", board.clock(asking, line)),
        board=await part("the command line", _board(line)) if line else None,
        firmware=await part("firmware", _firmware(asking, subject, names, await folders)),
        secrets=None if kinds is None else await part("secrets", objects.secrets(asking, kinds)),
        withheld=withheld,
        guest=None,
        missing=[],
    )


async def _nodes(line: CommandLine, seen: Inventory, backends: list[Backend] | None) -> list[Node]:
    nodes = {cpu.cpu_index: int(cpu.props.get("node-id", 0)) for cpu in seen.cpus or []}
    return memory.nodes(line, nodes, {one.id or "": one.size_bytes for one in backends or []})


async def _tree(asking: Asking, devices: list[Found], seen: Inventory) -> list[TreeDevice]:
    kinds = frozenset(one.type for one in seen.devices or [])
    found = tree.typed(devices, await printed.changed(asking, devices, kinds))
    # DIMMs and CPUs are on no bus, and so in no tree
    known = {one.id for one in found}
    return found + [
        TreeDevice(type=one.type, id=one.id, address=one.addr)
        for one in seen.devices or []
        if one.id and one.id not in known
    ]


async def _board(line: CommandLine) -> Board:
    return board.board(line)


def _with_pages(backends: list[Backend]) -> list[Backend]:
    """With the size of the pages, which only the host knows for a file, and for its own choice."""
    found = []
    for one in backends:
        size = one.huge_page_bytes
        if one.mem_path is not None:
            size = hugepages.of_file(Path(one.mem_path))
        elif size == 0:
            size = hugepages.default()
        found.append(msgspec.structs.replace(one, huge_page_bytes=size))
    return found


def _pinned(subject: Subject) -> list[Pinned] | None:
    if subject.process is None:
        return None
    vcpus = [
        Pinned(kind="vcpu", name=str(cpu.cpu_index), host_cpus=tasks.affinity(cpu.thread_id))
        for cpu in subject.seen.cpus or []
    ]
    others = [
        Pinned(kind="iothread", name=one.id, host_cpus=tasks.affinity(one.thread_id))
        for one in subject.seen.iothreads or []
    ]
    main = tasks.affinity(subject.process.pid)
    return [*vcpus, *others, Pinned(kind="main", name="main", host_cpus=main)]


async def _firmware(
    asking: Asking, subject: Subject, names: list[str] | None, folders: list[Path] | None
) -> list[FirmwareFile] | None:
    if names is None:
        return None
    if folders is None:
        asking.missing.append("QEMU's folders of firmware")
    where = firmware.places(subject.line, subject.cwd or Path("/"), folders or [])
    found = await asyncio.to_thread(firmware.examine, names, where)
    asking.missing += [f"the digest of {one.name}" for one in found if one.blake3 is None]
    return found


async def _folders(subject: Subject) -> list[Path] | None:
    exe = subject.process.exe if subject.process else None
    if exe is None or not await asyncio.to_thread(_ours, Path(exe)):
        return None
    try:
        async with asyncio.timeout(_WITHIN):
            return await binary.folders(Path(exe))
    except (Blocked, TimeoutError):
        return None


def _ours(exe: Path) -> bool:
    """Whether it is safe to run it: nobody else can have written it."""
    try:
        status = exe.stat()
    except OSError:
        return False
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


async def _guest(subject: Subject, silent: list[str]) -> GuestSystem | None:
    if subject.agent is None:
        return None
    if subject.deaf:
        silent.append("the guest's agent")
        return None
    return await system.ask(subject.agent, silent)
