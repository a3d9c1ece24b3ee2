"""Everything that is known of a VM before it is touched: the facts that `plan` decides from."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qmpsnap.engine.details import Details, Subject
from qmpsnap.engine.details import take as take_details
from qmpsnap.engine.machine import Machine
from qmpsnap.errors import UNREADABLE, LocalFailed, MonitorBusy, SnapError, VmBusy
from qmpsnap.host import process as host_process
from qmpsnap.host import qemu_img, ramfiles
from qmpsnap.host.process import ProcessFacts
from qmpsnap.host.ramfiles import Untouched
from qmpsnap.hypervisor import abilities
from qmpsnap.hypervisor.block import graph, job
from qmpsnap.hypervisor.guest import quiesce, runstate
from qmpsnap.hypervisor.machine import attach, inventory, reconcile
from qmpsnap.hypervisor.machine.drives import slots
from qmpsnap.hypervisor.machine.options import Blockdev, Device
from qmpsnap.hypervisor.machine.plugged_disks import Image
from qmpsnap.hypervisor.machine.relocate import refusals
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.hypervisor.vmstate import migration


@dataclass(frozen=True, slots=True)
class Site:
    """A disk of the VM with what only the host knows of it.

    *paths*: the absolute file of each node of the chain, "" where there is none. *layers*: how
    many of them, from the top, are overlays of ours. *origin*: its name on QEMU's command line,
    the node's, or the drive's (`drives.Slot.key`). *options*: its discard and aio, if given.
    *beside*: the folder of its top image, where a file can be put next to it.
    """

    disk: graph.Disk
    paths: tuple[str, ...]
    layers: int
    origin: str
    options: Mapping[str, str]
    beside: Path | None = None

    @property
    def name(self) -> str:
        """As `disk.name`, but never the name of an overlay of ours: that changes each time."""
        named_by_node = self.disk.chain and self.disk.name == self.disk.top.name
        return self.origin if named_by_node else self.disk.name

    @property
    def names(self) -> set[str]:
        """Every word that means this disk."""
        return self.disk.names | {self.name}

    @property
    def flash(self) -> bool:
        return "flash" in self.disk.qdev.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class Survey:
    """*problem* says why the command line could not be read, if so; *agent_trouble* is empty
    when the agent answered. *reconciled* is None where the command line says all of the machine, or
    is not known. *details*: asked for by whoever records them. *tied*: what keeps a captured state
    from being loaded into another machine. *untouched*: RAM in files that are memory."""

    machine: Machine
    state: runstate.RunState
    abilities: abilities.Abilities
    inventory: inventory.Inventory
    process: ProcessFacts | None
    attached: attach.Attached | None
    problem: str
    sites: tuple[Site, ...]
    jobs: tuple[str, ...]
    blocked_reasons: tuple[str, ...]
    ram_bytes: int
    agent: Path | None
    agent_trouble: str
    reconciled: reconcile.Reconciled | None = None
    details: Details | None = None
    tied: tuple[str, ...] = ()
    untouched: tuple[Untouched, ...] = ()


async def take(monitor: Monitor, machine: Machine, layers: Path) -> Survey:
    """Ask QEMU, the host and the agent; *layers* is the folder of our overlays.

    Raises VmBusy when a migration is under way, since capabilities are probed by setting them.
    """
    under_way = await migration.query(monitor)
    if under_way.status.startswith("postcopy"):
        raise VmBusy(f"its RAM is still coming ({under_way.status})")
    if not under_way.over:
        raise VmBusy(f"a migration is under way ({under_way.status})")
    able = await abilities.probe(monitor)
    seen = await inventory.take(monitor)
    process = await asyncio.to_thread(_process, machine.socket, seen)
    attached, problem = _attached(process)
    block = await graph.query(monitor)
    agent = machine.agent or (attached.agent if attached else None)
    cwd = Path(process.cwd if process and process.cwd else "/")
    plugged = {one.id for one in seen.devices or [] if one.id and one.hotplugged}
    sites = [_site(disk, block, attached, plugged, cwd, layers) for disk in block.disks]
    now = await _reconciled(monitor, seen, attached, block, sites)
    return Survey(
        machine=machine,
        state=await runstate.query(monitor),
        abilities=able,
        inventory=seen,
        process=process,
        attached=attached,
        problem=problem,
        sites=tuple(await asyncio.gather(*map(_readable_later, sites))),
        jobs=tuple(f"{one.type} {one.id}" for one in await job.at_work(monitor)),
        blocked_reasons=tuple(under_way.blocked_reasons),
        ram_bytes=_ram_bytes(seen),
        agent=agent,
        agent_trouble=await quiesce.is_answering(agent) if agent else "it has no agent socket",
        tied=_tied(attached, now),
        untouched=await asyncio.to_thread(_untouched, process),
        reconciled=now,
    )


def _untouched(process: ProcessFacts | None) -> tuple[Untouched, ...]:
    with suppress(LocalFailed):  # another user's: nobody can tell
        return tuple(ramfiles.untouched(process.pid)) if process is not None else ()
    return ()


def _tied(attached: attach.Attached | None, now: reconcile.Reconciled | None) -> tuple[str, ...]:
    if attached is None:
        return ()
    return tuple(refusals(now.line if now else attached.line, attached.cwd))


async def _reconciled(
    monitor: Monitor,
    seen: inventory.Inventory,
    attached: attach.Attached | None,
    block: graph.Graph,
    sites: Sequence[Site],
) -> reconcile.Reconciled | None:
    if attached is None:
        return None
    images = [Image(s.disk, s.origin, s.paths[s.layers] if s.paths else "") for s in sites]
    return await reconcile.reconcile(monitor, seen, attached.line, images, block.nodes)


async def detailed(monitor: Monitor, facts: Survey) -> Survey:
    """*facts* with all the details of the machine, for the record. Raises MonitorLost."""
    flash = [site for site in facts.sites if site.flash and site.disk.read_only]
    subject = Subject(
        seen=facts.inventory,
        process=facts.process,
        line=facts.attached.line if facts.attached else None,
        cwd=facts.attached.cwd if facts.attached else None,
        flash=[site.paths[0] for site in flash if site.paths],
        agent=facts.agent,
        deaf=bool(facts.agent_trouble),
    )
    return replace(facts, details=await take_details(monitor, subject))


def _ram_bytes(seen: inventory.Inventory) -> int:
    return seen.memory.base_memory + (seen.memory.plugged_memory or 0) if seen.memory else 0


def explain_busy(busy: MonitorBusy, socket: Path) -> MonitorBusy:
    """*busy* with the name of the client that holds the monitor, if it can be found out."""
    try:
        holder = host_process.holder_of_connection(socket)
    except SnapError:
        holder = None
    return MonitorBusy(f"{busy}; it serves {holder}") if holder else busy


def _process(socket: Path, seen: inventory.Inventory) -> ProcessFacts | None:
    """The process behind the socket; behind a proxy the vCPUs' threads lead to it."""
    try:
        pid = host_process.find_owner(socket)
        facts = host_process.describe(pid) if pid is not None else None
        if facts is not None and "qemu" in facts.name:
            return facts
        for cpu in seen.cpus or []:
            if (owner := host_process.of_thread(cpu.thread_id)) is not None:
                return host_process.describe(owner)
    except LocalFailed:
        return None
    return facts


def _attached(process: ProcessFacts | None) -> tuple[attach.Attached | None, str]:
    if process is None or not process.argv or process.cwd is None:
        return None, "the QEMU process, and so its command line, could not be found on this host"
    try:
        started = host_process.started(process.pid)
        return attach.facts(process.argv, Path(process.cwd), started=started), ""
    except SnapError as odd:
        return None, str(odd)


def _site(
    disk: graph.Disk,
    block: graph.Graph,
    attached: attach.Attached | None,
    plugged: Collection[str],
    cwd: Path,
    layers: Path,
) -> Site:
    paths = tuple(_absolute(block.path(node.name), cwd) for node in disk.chain)
    ours = 0
    while ours < len(paths) - 1 and Path(paths[ours]).parent == layers:
        ours += 1
    origin: str = disk.chain[ours].name if disk.chain else disk.device
    options: dict[str, str] = {}
    if attached is not None:
        origin, options = _on_command_line(disk, origin, attached, plugged)
    return Site(disk, paths, ours, origin, options, _beside(paths))


def _beside(paths: tuple[str, ...]) -> Path | None:
    if not paths or not paths[0]:
        return None
    top = Path(paths[0])
    with suppress(OSError):
        return top.parent if top.is_file() and os.access(top.parent, os.W_OK) else None
    return None


async def _readable_later(site: Site) -> Site:
    """*site*, its disk in trouble when its images lead elsewhere than QEMU was told to read.

    A restore finds what lies beneath an image by the image's own header; `backing=` on the command
    line may have said something else.
    """
    if site.disk.read_only or site.disk.trouble:
        return site
    for index in range(site.layers, len(site.paths)):
        if site.disk.chain[index].driver != "qcow2":
            continue
        path = site.paths[index]
        beneath = site.paths[index + 1] if index + 1 < len(site.paths) else ""
        try:
            named = (await qemu_img.info(Path(path), "qcow2")).backing or ""
        except LocalFailed as failed:
            return replace(site, disk=replace(site.disk, trouble=str(failed)))
        if not await asyncio.to_thread(_same_file, _plain(named), beneath):
            trouble = f"{path} names {named or 'no backing file'}, not {beneath or 'none'}"
            return replace(site, disk=replace(site.disk, trouble=f"{trouble} as QEMU has it"))
    return site


def _same_file(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other) if one and other else one == other


def _plain(name: str) -> str:
    """The file that a backing string means, also where QEMU spelled it as JSON."""
    if not name.startswith("json:"):
        return name.removeprefix("file:")
    try:
        tree = json.loads(name.removeprefix("json:"))
    except UNREADABLE:
        return name
    found = None
    if isinstance(tree, dict):
        found = tree.get("file.filename") or tree.get("filename") or tree.get("file")
    return str(found.get("filename", name) if isinstance(found, dict) else found or name)


def _absolute(filename: str, cwd: Path) -> str:
    return str(cwd / filename) if filename else ""


def _on_command_line(
    disk: graph.Disk, node: str, attached: attach.Attached, plugged: Collection[str]
) -> tuple[str, dict[str, str]]:
    for slot in slots(attached.line):
        if disk.device and slot.backend == disk.device:
            fields = slot.drive.fields
            return slot.key, _some(fields.get("discard"), fields.get("aio"))
    given = [Blockdev.of(option) for option in attached.line.all("blockdev")]
    # a VM that its user has started on an overlay of ours names that one, not what is beneath
    for name in (layer.name for layer in disk.chain):
        for blockdev in given:
            if blockdev.node_name == name:
                fields = blockdev.fields
                aio = fields.get("file.aio") or fields.get("aio")
                return name, _some(fields.get("discard"), aio)
    # and that one is gone once it was folded: only the device still names it, unless another
    # one was plugged under its id
    for option in attached.line.all("device"):
        device = Device.of(option)
        drive = device.fields.get("drive")
        if drive is not None and device.id == disk.name and device.id not in plugged:
            return drive, {}
    # one that came at run time; the nodes of a drive have no name that an option could give them
    return disk.device or node, {}


def _some(discard: str | None, aio: str | None) -> dict[str, str]:
    found = {"discard": discard, "aio": aio}
    return {name: value for name, value in found.items() if value}
