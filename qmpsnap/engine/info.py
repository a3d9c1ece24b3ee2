"""What is possible with a VM, and why not: the answer of `info`."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qmpsnap.engine import survey
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.plan import plan
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.wishes import RamChoice, Wishes
from qmpsnap.errors import MonitorBusy, SnapError
from qmpsnap.hypervisor.monitor import connect
from qmpsnap.ids import SnapshotId


class DiskInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A drive that the guest sees. *names* are what -i and -x take; *layers* are ours."""

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


class Possibility(msgspec.Struct, frozen=True, kw_only=True):
    """Whether *what* can be done, and the reason if not, or the way it would be done."""

    what: str
    possible: bool
    why: str


class Info(msgspec.Struct, frozen=True, kw_only=True):
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


async def info(roots: Roots, machine: Machine) -> Info:
    """Ask the VM; nothing is changed. Raises MonitorAbsent, MonitorBusy, VmBusy."""
    layers = roots.local.layers(machine.name)
    try:
        async with connect(machine.socket) as monitor:
            facts = await survey.take(monitor, machine, layers)
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
        disks=[_disk(site) for site in facts.sites],
        possibilities=[_possible(facts, choice, layers) for choice in RamChoice],
        restorable=facts.attached is not None,
        restorable_why=facts.problem,
    )


def _disk(site: survey.Site) -> DiskInfo:
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
