"""What a `create` owes: written into the journal first, struck out when paid or undone."""

from __future__ import annotations

import asyncio
import logging
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qmpsnap.engine import folds, layers, offline, recover, survey
from qmpsnap.engine.identity import identity_of
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.phase import Phase, move
from qmpsnap.engine.plan import Plan
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import (
    GuestLeftStopped,
    GuestStillFrozen,
    MonitorAbsent,
    QemuGone,
    SnapError,
)
from qmpsnap.host import process as host_process
from qmpsnap.host.journal import Entry, Journal
from qmpsnap.host.process import ProcessFacts
from qmpsnap.hypervisor.abilities import capabilities
from qmpsnap.hypervisor.monitor import Monitor, connect, settle
from qmpsnap.hypervisor.vmstate.migration import query_parameters
from qmpsnap.store import local

log = logging.getLogger(__name__)
_DYING = 2.0  # seconds that a killed QEMU may take to be gone


@dataclass(slots=True)
class Debt:
    """The journal's entry of this snapshot, and how far it has come.

    *frozen*: the guest was frozen by us, and nobody has seen it thawed.
    """

    entry: Entry
    owed: recover.Owed
    phase: Phase = Phase.PLANNED
    frozen: bool = False

    async def note(self, phase: Phase) -> None:
        self.phase = move(self.phase, phase)
        await asyncio.to_thread(self.entry.note, phase.value)


async def journaled(
    roots: Roots, monitor: Monitor, made: Plan, facts: survey.Survey, *, of: str | None = None
) -> Debt:
    """Write down what is about to be changed; from here on `undo` or sealing ends it.

    *of* is the snapshot of which *made* is to be a revision.
    """
    before = await capabilities(monitor)
    parameters = await query_parameters(monitor, ("max-bandwidth", "downtime-limit"))
    owed = recover.Owed(
        phase=Phase.PLANNED.value,
        running=made.running,
        agent=str(facts.agent) if facts.agent else None,
        freeze=made.freeze,
        failure_safe=facts.abilities.background_safe,
        laid=layers.remembered(made.disks),
        capabilities=before,
        parameters=parameters,
        uuid=identity_of(facts).uuid,
        verb="refresh" if of else "create",
        of=of,
        bitmaps=[disk.bitmap for disk in made.disks if disk.bitmap is not None],
        process=host_process.identified(facts.process),
        sockets=_sockets() if any(disk.copied for disk in made.disks) else None,
    )
    await asyncio.to_thread(local.give_id, roots.local, made.vm, made.id)
    journal = Journal(roots.local.journal(made.vm))
    entry = await asyncio.to_thread(journal.open_entry, str(made.id), msgspec.to_builtins(owed))
    return Debt(entry, owed)


def _sockets() -> str:
    """A folder that is still to be made: a path that is short enough for a socket."""
    return str(Path(tempfile.gettempdir()) / f"qmpsnap-{secrets.token_hex(8)}")


async def given_up(roots: Roots, machine: Machine, monitor: Monitor, debt: Debt, id: str) -> None:
    """Undo; what cannot be undone now stays in the journal for `recover`."""

    async def undone(current: Monitor) -> None:
        await recover.server_ended(current, debt.owed)
        # a guest that was not frozen by us is not thawed: somebody else may hold it
        await recover.undo(
            roots, machine, current, debt.entry, debt.owed, debt.phase, thaw=debt.frozen
        )

    try:
        await settle(monitor, undone)
        await asyncio.to_thread(debt.entry.close)
    except QemuGone as gone:
        await _settled_offline(roots, machine, debt, gone)
    except (SnapError, TimeoutError) as trouble:
        _warn(machine, trouble)


async def _settled_offline(roots: Roots, machine: Machine, debt: Debt, gone: QemuGone) -> None:
    """What a guest that is no more wrote past its disks goes back into them at once.

    Else it would be missing when QEMU is started again. A QEMU that lives has locked them.
    """
    if (known := debt.owed.process) is None or not await _ended(known):
        _warn(machine, gone)
        return
    await folds.ended(debt.entry)
    try:
        for settled in await offline.settle_offline(roots, machine):
            log.warning("%s: %s: %s", machine.name, gone, "; ".join(settled.did))
    except SnapError as trouble:
        _warn(machine, trouble)


def _warn(machine: Machine, trouble: BaseException) -> None:
    log.warning("%s: not all could be undone: %s; `recover` goes on", machine.name, trouble)


async def given_up_later(roots: Roots, machine: Machine, debt: Debt, id: str) -> None:
    """As `given_up`, once the session with the VM has ended."""
    try:
        async with connect(machine.socket) as monitor:
            await given_up(roots, machine, monitor, debt, id)
    except MonitorAbsent as absent:
        await _settled_offline(roots, machine, debt, QemuGone(str(absent)))
    except (SnapError, TimeoutError) as trouble:
        _warn(machine, trouble)


async def _ended(known: ProcessFacts) -> bool:
    """Whether that process is gone, or ends within the time that a killed one may take."""
    return await asyncio.to_thread(host_process.ends, known, _DYING)


async def look_for_qemu(facts: survey.Survey, debt: Debt, failure: BaseException) -> None:
    """What *failure* says of the guest is true, or another error is raised in its place.

    GuestLeftStopped when only the socket has gone: nobody can continue the guest. QemuGone when
    nobody could thaw a guest that is no more.
    """
    known = facts.process
    if known is None:
        return
    if isinstance(failure, QemuGone) and debt.phase is Phase.HOLDING and not await _ended(known):
        raise GuestLeftStopped(
            f"QEMU, process {known.pid}, lives, but its monitor has gone: the guest may be stopped",
            hint="send `cont` over another monitor, then `qmpsnap recover`",
        ) from failure
    if isinstance(failure, GuestStillFrozen) and await _ended(known):
        raise QemuGone(f"QEMU, process {known.pid}, has ended while the guest was frozen") from None
