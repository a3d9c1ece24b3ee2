"""`qmpsnap restore`: bring a VM back from a snapshot."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmpsnap.cli import options
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


@verb()
async def restore(
    call: Call,
    vm: options.Vm,
    id: options.Id = "latest",
    *,
    to: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder for all that is new: images, sockets, logs. Empty, or not there yet.",
            show_default=False,
        ),
    ],
    cold: Annotated[
        bool,
        typer.Option(
            "--cold",
            help="Boot from the disks, without the RAM. Default: go on where the guest was.",
            show_default=False,
        ),
    ] = False,
    eager: Annotated[
        bool,
        typer.Option(
            "--eager",
            help="Load all RAM into QEMU's own memory before the guest runs. Default: map it, "
            "and read each page when the guest touches it.",
            show_default=False,
        ),
    ] = False,
    revision: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Revision of the local half. Default: the one of the vmstate.",
            show_default=False,
        ),
    ] = None,
    standalone: Annotated[
        bool,
        typer.Option(
            "--standalone",
            help="Copy the disks in full. Default: thin overlays that need the snapshot.",
            show_default=False,
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Only compare the captured machine with this host, in a table. Default: compare, "
            "and restore if nothing blocks.",
            show_default=False,
        ),
    ] = False,
    no_start: Annotated[
        bool,
        typer.Option(
            "--no-start",
            help="Build the images and print the command line. Default: start it.",
            show_default=False,
        ),
    ] = False,
    qmp_socket: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Where the new QEMU's QMP monitor listens. Default: qmp.sock in DIR.",
            show_default=False,
        ),
    ] = None,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach",
            help="Return once the guest runs, and leave it running; its RAM may still come then. "
            "Default: stay until the machine ends; Ctrl-C ends it.",
            show_default=False,
        ),
    ] = False,
    clones: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Start N machines, in DIR/1 to DIR/N, which share the pages of the RAM: all, or "
            "none. Default: one machine, in DIR.",
            show_default=False,
        ),
    ] = None,
    keep_macs: Annotated[
        bool,
        typer.Option(
            "--keep-macs",
            help="Clones have the MAC addresses of the original. Default: each has its own.",
            show_default=False,
        ),
    ] = False,
    qemu: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="QEMU binary to use. Default: the one that the VM ran on.",
            show_default=False,
        ),
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID=FILE",
            help="File to read -object secret ID from, for one that the VM was given on its "
            "command line, which no snapshot holds; may be repeated. Default: where it was.",
            show_default=False,
        ),
    ] = None,
    limits: Annotated[
        str,
        typer.Option(
            metavar="same|none|suggest",
            help="Start QEMU in a control group of its own: with the limits that held for the "
            "captured VM, or with such as follow from what it used. Default: none.",
            show_default=False,
        ),
    ] = "none",
    limits_parent: Annotated[
        str | None,
        typer.Option(
            metavar="GROUP",
            help="The group in which that one is made, as in /proc/PID/cgroup. Default: our own, "
            "on v2 the nearest that has no processes and hands the controllers down.",
            show_default=False,
        ),
    ] = None,
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
    )
    if eager and cold:
        raise UsageError("--eager loads the RAM, and --cold goes without it: give one of them")
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
