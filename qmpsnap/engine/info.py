"""What is possible with a VM, and why not: the answer of `info`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from qmpsnap.engine import allowance, arrivals, owning, survey
from qmpsnap.engine.allowance import Allowance
from qmpsnap.engine.copy import private_folder
from qmpsnap.engine.levels import Chosen, Since, choose
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.plan import plan
from qmpsnap.engine.ram import no_memory
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.wishes import Level, Quiesce, RamChoice, Wishes
from qmpsnap.errors import Blocked, MonitorBusy, SnapError
from qmpsnap.hypervisor.block import bitmap
from qmpsnap.hypervisor.monitor import Monitor, connect
from qmpsnap.hypervisor.nbd import dirty
from qmpsnap.ids import SnapshotId, disk_labels
from qmpsnap.store.lease import Standing, in_words
from qmpsnap.store.points import Points
from qmpsnap.store.points import read as read_points

# Each level, and what it does where no more is to be said of it
_LEVELS = {
    Level.FULL: "copies all of it",
    Level.INC: "",
    Level.DIFF: "",
    Level.OVERLAY: "copies nothing; the VM goes on in a new file",
}


class Possibility(msgspec.Struct, frozen=True, kw_only=True):
    """Whether *what* can be done, and the reason if not, or the way it would be done."""

    what: str
    possible: bool
    why: str


class Blocker(msgspec.Struct, frozen=True, kw_only=True):
    """What is in the way. *of*: of a `snapshot`, of the `ram`, of a `restore`, or of a disk."""

    of: str
    why: str


class BitmapInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A dirty bitmap of the disk, on the image *node*; *standing* is what it is good for."""

    name: str
    node: str
    standing: str
    dirty_bytes: int


class DiskInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A drive that the guest sees. *names* are what -i and -x take; *layers* are ours.

    *level* is what `create --level auto` would make of it, *levels* what is to be said of each;
    *changed_bytes* what an increment would copy, if that was asked for and there can be one.
    """

    name: str
    names: list[str]
    node: str | None
    format: str | None
    virtual_size_bytes: int | None
    files: list[str]
    filters: list[str]
    layers: int
    taken: bool
    why: str
    level: str = ""
    level_why: str = ""
    bitmaps: list[BitmapInfo] = []
    changed_bytes: int | None = None
    levels: list[Possibility] = []


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """*blockers*: everything that rules something out. *limits*: what the VM's control groups leave
    for a snapshot. *lease*: the other host that the VM belongs to on the store, if that tells."""

    vm: str
    qemu_version: str
    qemu_package: str
    machine: str | None
    accelerator: str | None
    pid: int | None
    state: str
    ram_bytes: int
    agent: str | None
    agent_trouble: str
    disks: list[DiskInfo]
    possibilities: list[Possibility]
    restorable: bool
    restorable_why: str
    blockers: list[Blocker] = []
    limits: Allowance | None = None
    lease: Standing | None = None


async def info(
    roots: Roots, machine: Machine, *, changes: bool = False, sealed: bool | None = None
) -> Info:
    """Ask the VM; nothing is changed. *changes*: count what the next increment would copy.

    *sealed*: whether the next copies are to be encrypted, as for `choose`.

    Raises MonitorAbsent, MonitorBusy, VmBusy (also when its NBD server is somebody else's, and
    *changes* were asked for).
    """
    asking = asyncio.create_task(owning.rival(roots, machine.name))
    try:
        found = await _asked(roots, machine, changes=changes, sealed=sealed)
        lease = await asking
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    if lease is None:
        return found
    held = Blocker(of="snapshot", why=f"{machine.name} is not this host's: {in_words(lease)}")
    return msgspec.structs.replace(found, lease=lease, blockers=[held, *found.blockers])


async def _asked(roots: Roots, machine: Machine, *, changes: bool, sealed: bool | None) -> Info:
    layers = roots.local.layers(machine.name)
    points = await asyncio.to_thread(read_points, roots.local, machine.name)
    await asyncio.to_thread(arrivals.refuse, roots, machine)
    changed: dict[str, int] = {}
    try:
        async with connect(machine.socket) as monitor:
            facts = await survey.take(monitor, machine, layers)
            chosen, levels = await asyncio.to_thread(_levels, facts, points, sealed=sealed)
            if changes:
                for name, one in chosen.items():
                    if one.since is not None:
                        changed[name] = await _changed(monitor, facts, name, one.since)
    except MonitorBusy as busy:
        raise survey.explain_busy(busy, machine.socket) from busy
    return Info(
        vm=machine.name,
        qemu_version=facts.abilities.version,
        qemu_package=facts.abilities.package,
        machine=facts.inventory.machine,
        accelerator=facts.inventory.accelerator,
        pid=facts.process.pid if facts.process else None,
        state=facts.state.value,
        ram_bytes=facts.ram_bytes,
        agent=str(facts.agent) if facts.agent else None,
        agent_trouble=facts.agent_trouble,
        disks=[
            _disk(site, chosen.get(site.name), changed.get(site.name), levels.get(site.name, []))
            for site in facts.sites
        ],
        possibilities=[
            *(_possible(facts, choice, layers) for choice in RamChoice),
            _quiesce(facts, layers),
        ],
        blockers=await asyncio.to_thread(blockers, facts),
        limits=await asyncio.to_thread(allowance.look, facts),
        restorable=facts.attached is not None,
        restorable_why=facts.problem,
    )


def _levels(
    facts: survey.Survey, points: Points, *, sealed: bool | None
) -> tuple[dict[str, Chosen], dict[str, list[Possibility]]]:
    """What `auto` would choose for each disk, and which levels there are for it."""
    taken = [site for site in facts.sites if site.disk.chain and not site.disk.read_only]
    labels = {site.name: disk_labels([site.name])[0] for site in taken}
    chosen = {
        one.name: choose(Level.AUTO, one, labels[one.name], points, sealed=sealed) for one in taken
    }
    several = {
        one.name: [_level(level, one, labels[one.name], points, sealed=sealed) for level in _LEVELS]
        for one in taken
    }
    return chosen, several


def _level(
    level: Level, site: survey.Site, label: str, points: Points, *, sealed: bool | None
) -> Possibility:
    if site.disk.trouble:
        return Possibility(what=level.value, possible=False, why=site.disk.trouble)
    try:
        why = choose(level, site, label, points, sealed=sealed).reason
    except Blocked as refused:
        told = str(refused).partition(" is possible: ")[2] or str(refused)
        return Possibility(what=level.value, possible=False, why=told)
    return Possibility(what=level.value, possible=True, why=_LEVELS[level] or why)


async def _changed(monitor: Monitor, facts: survey.Survey, name: str, since: Since) -> int:
    site = next(site for site in facts.sites if site.name == name)
    with private_folder() as folder:
        ranges = await dirty.changed(
            monitor,
            folder / "changes",
            site.disk.top.name,
            bitmap=since.bitmap,
            layers=since.layers,
        )
    return sum(length for _, length in ranges)


def _bitmaps(site: survey.Site) -> list[BitmapInfo]:
    return [
        BitmapInfo(
            name=one.name,
            node=node.name,
            standing=str(bitmap.classify([node], one.name)[0]),
            dirty_bytes=one.count,
        )
        for node in site.disk.chain
        for one in node.bitmaps
    ]


def _disk(
    site: survey.Site, chosen: Chosen | None, changed: int | None, levels: list[Possibility]
) -> DiskInfo:
    disk = site.disk
    why = disk.trouble or ("empty drive" if not disk.chain else "")
    why = why or ("read-only" if disk.read_only else "")
    return DiskInfo(
        name=site.name,
        names=sorted(site.names),
        node=disk.top.name if disk.chain else None,
        format=disk.top.driver if disk.chain else None,
        virtual_size_bytes=disk.top.virtual_size if disk.chain else None,
        files=list(site.paths),
        filters=[node.driver for node in disk.filters],
        layers=site.layers,
        taken=not why,
        why=why,
        level=chosen.level.value if chosen and not why else "",
        level_why=chosen.reason if chosen and not why else "",
        bitmaps=_bitmaps(site),
        changed_bytes=changed,
        levels=levels,
    )


def _possible(facts: survey.Survey, choice: RamChoice, layers: Path) -> Possibility:
    what = f"--ram {choice}"
    try:
        made = plan(facts, Wishes(ram=choice), SnapshotId("20000101T000000000Z"), layers)
    except SnapError as refused:
        return Possibility(what=what, possible=False, why=str(refused))
    why = made.why if choice is RamChoice.AUTO else ""
    if choice is RamChoice.BACKGROUND and not facts.abilities.background_safe:
        why = "works, but must not fail half-way on this QEMU: it is never chosen by itself"
    return Possibility(what=what, possible=True, why=why)


def _quiesce(facts: survey.Survey, layers: Path) -> Possibility:
    wish = Wishes(ram=RamChoice.NONE, quiesce=Quiesce.AGENT)
    try:
        plan(facts, wish, SnapshotId("20000101T000000000Z"), layers)
    except SnapError as refused:
        return Possibility(what="--quiesce agent", possible=False, why=str(refused))
    return Possibility(what="--quiesce agent", possible=True, why="the agent answers")


def blockers(facts: survey.Survey) -> list[Blocker]:
    """Everything that rules out a snapshot, its RAM, a restore of it, or one of its disks."""
    found = [Blocker(of="snapshot", why=f"QEMU is busy with {one}") for one in facts.jobs]
    try:
        allowance.refuse(facts)
    except Blocked as refused:
        found.append(Blocker(of="snapshot", why=str(refused)))
    found += [Blocker(of="ram", why=one) for one in (*facts.blocked_reasons, *facts.tied)]
    found += [Blocker(of="ram", why=one) for one in no_memory(facts)]
    if facts.reconciled is not None:
        found += [Blocker(of="ram", why=one) for one in facts.reconciled.troubles]
    if facts.problem:
        found.append(Blocker(of="restore", why=facts.problem))
    for site in facts.sites:
        if site.disk.trouble:
            found.append(Blocker(of=f"disk {site.name}", why=site.disk.trouble))
    return found
