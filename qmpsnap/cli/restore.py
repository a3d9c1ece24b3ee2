"""`qmpsnap restore`: bring a VM back from a snapshot."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from qmpsnap.cli import options
from qmpsnap.cli import restore_options as given
from qmpsnap.cli.target import Call, choice, snapshot
from qmpsnap.cli.verb import verb

if TYPE_CHECKING:
    from qmpsnap.cli.render import Output
    from qmpsnap.engine.fitness import Fitness
    from qmpsnap.engine.restore import Ready, Restored

EPILOG = """\b
Examples:
  qmpsnap restore web --to /srv/back
  qmpsnap restore web 20261122T1650 --to /srv/back --detach
  qmpsnap restore web --to /srv/back --check
  qmpsnap restore web --to /srv/back --limits same --limits-parent /vms
  qmpsnap restore web --to /srv/many --clones 20 --detach
  qmpsnap restore web --to /srv/copy --cold --standalone --no-start
  qmpsnap restore web --to /srv/back --secret key0=/etc/keys/web

\b
Exit codes: 0 the machine ended by itself, or runs on with --detach, or --check found
nothing that blocks; 2 usage; 3 refused, or blocked; 4 failed, nothing is left behind;
6 the restored guest may need help; 7 damaged data found; 130 or 143 the machine was
ended by Ctrl-C or SIGTERM.
"""


@verb(insecure=True)
async def restore(
    call: Call,
    vm: options.Vm,
    id: options.Id = "latest",
    *,
    to: given.To,
    cold: given.Cold = False,
    eager: given.Eager = False,
    ram_in: given.RamIn = None,
    revision: given.Revision = None,
    standalone: given.Standalone = False,
    check: given.Check = False,
    no_start: given.NoStart = False,
    qmp_socket: given.QmpSocket = None,
    detach: given.Detach = False,
    clones: given.Clones = None,
    keep_macs: given.KeepMacs = False,
    qemu: given.Qemu = None,
    secret: given.Secret = None,
    limits: given.Limits = "none",
    limits_parent: given.LimitsParent = None,
) -> None:
    """Bring a VM back from a snapshot, beside the original, which may go on running.

    The snapshot is never written to: the new machine writes into DIR. Files and sockets of the
    captured machine move under DIR and keep their names.

    Before anything is built, the machine is compared with this host: what blocks is named, and
    refused; what merely differs is a warning. --check shows all that was compared, and stops there.

    With --limits each limit is shown with what was captured, measured and suggested, and why,
    before anything starts. One that cannot be set is refused. The control group goes when the
    machine ends.

    With --clones each machine has its own disks, sockets, MAC addresses and generation ID, and the
    time of the host where the guest's agent can set it. What a guest does not change is in memory
    once. One that cannot be started ends all. --check compares for a single one.
    """
    from functools import partial

    from qmpsnap.cli import cloned, limited
    from qmpsnap.engine.limiting import Choice
    from qmpsnap.engine.restore import Restoration
    from qmpsnap.errors import UsageError

    call.machine(vm, reach=False)
    engine, out = call.engine(), call.out
    out.expect_progress()
    wish = Restoration(
        to=to.absolute(),
        cold=cold,
        standalone=standalone,
        revision=revision,
        qmp=qmp_socket.absolute() if qmp_socket else None,
        qemu=qemu.absolute() if qemu else None,
        secrets=dict(map(_secret, secret or [])),
        limits=choice("--limits", Choice, limits),
        eager=eager,
        limits_parent=limits_parent,
        ram_in=ram_in.absolute() if ram_in else None,
    )
    if eager and cold:
        raise UsageError("--eager loads the RAM, and --cold goes without it: give one of them")
    if ram_in is not None and (eager or cold):
        raise UsageError("--ram-in maps the RAM, which --eager and --cold do not: give one of them")
    if clones is None and keep_macs:
        raise UsageError("--keep-macs: there are no clones", hint="with --clones N")
    if clones is not None and qmp_socket is not None:
        raise UsageError("--qmp-socket: each clone has its own, in its folder")
    if limits_parent is not None and wish.limits is Choice.NONE:
        raise UsageError("--limits-parent: there is no group to make", hint="with --limits same")
    if check:
        _show_fitness(out, await engine.check(vm, wish, snapshot(id)))
        return
    if clones is not None:
        asked = cloned.Asked(clones, keep_macs=keep_macs, start=not no_start, detach=detach)
        show = partial(_show_command, out)
        await cloned.restore(engine, out, vm, wish, snapshot(id), asked, show)
        return
    ready = await engine.prepare_restore(vm, wish, snapshot(id))
    for warning in ready.warnings:
        out.aside("warning", warning)
    for notice in ready.notices:
        out.notice(notice)
    if not out.json:
        limited.show(out, ready.limits)
    if no_start:
        _show_command(out, ready)
        if ready.memory.way == "mapped" and ram_in is None:
            out.notice(f"it maps pages in {ready.memory.folder}: the next create may remove them")
        return
    async with engine.restored(ready, detach=detach) as back:
        _show(out, back)
        if back.arriving is not None:
            out.notice("the machine runs, and its RAM still comes: until that file has gone")
        if not detach:
            out.notice("the machine runs; Ctrl-C ends it")
            await back.process.exited()
            out.notice("the machine has ended")


def _secret(word: str) -> tuple[str, Path]:
    from qmpsnap.errors import UsageError

    name, equals, path = word.partition("=")
    if not (name and equals and path):
        raise UsageError(f"--secret {word}: not ID=FILE")
    return name, Path(path).absolute()


def _show_fitness(out: Output, found: Fitness) -> None:
    from qmpsnap.cli import limited
    from qmpsnap.errors import Blocked

    if out.json:
        out.record(found)
    else:
        rows = [[it.what, it.captured, it.here, it.verdict, it.why] for it in found.rows]
        out.table(("WHAT", "CAPTURED", "HERE", "VERDICT", "WHY"), rows)
        for notice in found.notices:
            out.notice(notice)
        limited.show(out, found.limits)
    if not found.fits:
        names = ", ".join(row.what for row in found.rows if row.verdict == "blocks")
        raise Blocked(f"{found.vm} {found.id} cannot come back here: {names}")


def _show(out: Output, back: Restored) -> None:
    import msgspec

    from qmpsnap.cli import shapes

    shown = back.shown()
    if out.json:
        out.record(msgspec.convert(shown, shapes.Restored))
    else:
        out.facts([
            ("restored", f"{shown['id']} of {shown['vm']}{', cold' if shown['cold'] else ''}"),
            ("process", shown["pid"]),
            ("RAM", shown["ram"]),
            *([("arriving", shown["arriving"])] if shown["arriving"] else []),
            ("folder", shown["to"]),
            ("QMP", shown["qmp"]),
            ("agent", shown["agent"]),
            *(("control group", folder) for folder in shown["groups"]),
            *(("moved", f"{old} -> {new}") for old, new in shown["moved"].items()),
        ])  # fmt: skip
    out.flush()


def _show_command(out: Output, ready: Ready, clone: int | None = None) -> None:
    from qmpsnap.cli import shapes

    if out.json:
        prepared = shapes.Prepared(
            id=ready.pair.id,
            vm=ready.pair.vm,
            cold=ready.wish.cold,
            to=str(ready.wish.to),
            qmp=str(ready.qmp),
            argv=ready.argv,
            companions=ready.companions,
            moved=dict(ready.relocated.moved),
            notices=ready.notices,
            limits=ready.limits,
            clone=clone,
        )
        out.record(prepared)
    else:
        for words in ready.companions:
            out.line(shlex.join(words))
        out.line(shlex.join(ready.argv))
