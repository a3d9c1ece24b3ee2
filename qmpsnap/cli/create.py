"""`qmpsnap create`: take a paired snapshot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from qmpsnap.cli import options
from qmpsnap.cli.metered import MetricsFile, metered
from qmpsnap.cli.target import Call, choice, copying, duration
from qmpsnap.cli.verb import verb

if TYPE_CHECKING:
    from qmpsnap.cli.render import Output
    from qmpsnap.engine.created import CopiedDisk, Created
    from qmpsnap.engine.metrics import Run
    from qmpsnap.engine.plan import Plan
    from qmpsnap.engine.wishes import Wishes

EPILOG = """\b
Examples:
  qmpsnap create web
  qmpsnap create web --socket /run/web.sock --local /srv/snap --store /mnt/nas
  qmpsnap create web --ram none --quiesce agent --note "before the upgrade"
  qmpsnap create web --metrics-file /var/lib/node_exporter/qmpsnap-web.prom
  qmpsnap create web2 --ram-from web
  qmpsnap create web --dry-run

\b
Exit codes: 0 done; 2 usage; 3 refused, nothing touched; 4 failed, the guest as
before; 5 captured, waits in the spool; 6 the guest may need help; 130, 143.
"""


@verb()
async def create(
    call: Call,
    vm: options.Vm,
    level: Annotated[
        str,
        typer.Option(
            "--level",
            "-l",
            metavar="LEVEL",
            help="How the local half is made. `full` copies each disk, `inc` what changed since "
            "the last copy, `diff` what changed since the last full; auto takes an inc where that "
            "is sound, else a full of the disk concerned. `overlay` copies nothing: it freezes "
            "the disk where it lies and puts a new file on top, for good.",
        ),
    ] = "auto",
    ram: Annotated[
        str,
        typer.Option(
            metavar="MODE",
            help="How the RAM is taken: auto, live (in passes, the guest runs), background (the "
            "guest runs on while its old pages are saved), paused (the guest stands still) or "
            "none. auto: live, and background if that does not converge.",
        ),
    ] = "auto",
    quiesce: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="Freeze the guest's file systems: auto, agent or none. auto: by the guest agent "
            "where no RAM is taken and an agent answers.",
        ),
    ] = "auto",
    max_pause: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Longest time that the guest may stand still, or the snapshot fails with the "
            "guest untouched. Default: 200ms; no bound with --ram paused.",
            show_default=False,
        ),
    ] = None,
    max_freeze: options.MaxFreeze = "30s",
    pause: Annotated[
        str,
        typer.Option(metavar="TIME", help="The pause that `live` aims at, at most --max-pause."),
    ] = "20ms",
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            "-i",
            metavar="DISK",
            help="Take this disk only; may be repeated. A name as `info` prints it. "
            "Default: every disk that the guest can write.",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            "-x",
            metavar="DISK",
            help="Leave this disk out; may be repeated. A restore gives the guest an empty one. "
            "Default: none.",
            show_default=False,
        ),
    ] = None,
    compress: options.Compress = False,
    speed_limit: options.SpeedLimit = None,
    ram_from: Annotated[
        list[str] | None,
        typer.Option(
            "--ram-from",
            metavar="VM",
            help="What the newest snapshot of this VM has of the RAM is not stored again: for VMs "
            "of one image. The store needs to make hard links, or it is copied there. May be "
            "repeated. Default: `ram_from` of the configuration.",
            show_default=False,
        ),
    ] = None,
    encrypt: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="Encrypt: none, store (all files of the store half, with the key of this host "
            "that `keys` shows), or all (each image that is copied here, too; what `overlay` "
            "freezes is the guest's own disk, and is not). Default: `encrypt` of the "
            "configuration, else none.",
            show_default=False,
        ),
    ] = None,
    note: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help="Kept with the snapshot. Default: none.", show_default=False
        ),
    ] = "",
    rebind: Annotated[
        bool,
        typer.Option(
            "--rebind",
            help="This is another VM than the one that had the name; take it from now on. "
            "Default: refuse.",
            show_default=False,
        ),
    ] = False,
    metrics_file: MetricsFile = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what would be done, with the QMP transaction, and do nothing.",
            show_default=False,
        ),
    ] = False,
) -> None:
    """Take a paired snapshot of a running VM: disks and RAM of one instant.

    The guest stands still for some milliseconds, however large it is. Its disks are copied (or
    frozen) on this host; its RAM, devices and configuration go to the store. Prints the ID.
    """
    from qmpsnap.engine.created import Created
    from qmpsnap.engine.wishes import Encrypt, Level, Quiesce, RamChoice, Wishes
    from qmpsnap.errors import NotShipped

    wishes = Wishes(
        level=choice("--level", Level, level),
        ram=choice("--ram", RamChoice, ram),
        quiesce=choice("--quiesce", Quiesce, quiesce),
        max_pause=None if max_pause is None else duration("--max-pause", max_pause),
        max_freeze=duration("--max-freeze", max_freeze),
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        note=note,
        rebind=rebind,
        pause=duration("--pause", pause),
        copying=copying(compress, speed_limit),
        ram_from=call.ram_from(vm, ram_from),
        encrypt=choice("--encrypt", Encrypt, encrypt or call.encrypt(vm)),
    )
    engine, machine = call.engine(), call.machine(vm)
    if dry_run:
        _show_plan(call.out, await engine.plan(machine, wishes), wishes)
        return
    call.out.expect_progress()
    async with metered(call, metrics_file, engine, vm, "create") as run:
        try:
            made = await engine.create(machine, wishes)
        except NotShipped as waiting:
            if isinstance(waiting.created, Created):
                _measured(run, waiting.created)
                _show(call.out, waiting.created)
            raise
        _measured(run, made)
    _show(call.out, made)


def _measured(run: Run, made: Created) -> None:
    run.pause_ms, run.frozen_ms = made.pause_ms, made.frozen_ms
    written = made.bytes
    run.bytes = {"disks": written.disks, "vmstate": written.vmstate, "shipped": written.shipped}


def _show(out: Output, made: Created) -> None:
    from qmpsnap.cli.render import in_bytes, in_ms

    if out.json:
        out.record(made)
        return
    out.facts([
        ("snapshot", f"{made.id} of {made.vm}, {made.state}"),
        ("pause", in_ms(made.pause_ms)),
        ("frozen", in_ms(made.frozen_ms) if made.frozen_ms is not None else None),
        ("level", made.level),
        ("RAM", f"{made.ram} ({made.ram_reason})"),
        ("quiesce", made.quiesce),
        ("encryption", f"with the key {made.encryption}" if made.encryption else None),
        *[(disk, _copied(one)) for disk, one in made.disks.items()],
        ("bytes", f"{in_bytes(made.bytes.disks)} of disks, {in_bytes(made.bytes.vmstate)} of "
                  f"vmstate, {in_bytes(made.bytes.shipped)} shipped"),
        ("local", made.local),
        ("store", made.store),
    ])  # fmt: skip


def _copied(disk: CopiedDisk) -> str:
    told = f", encrypted with the key {disk.encryption}" if disk.encryption else ""
    return f"{disk.level} ({disk.reason}){told}"


def _show_plan(out: Output, plan: Plan, wishes: Wishes) -> None:
    import msgspec

    from qmpsnap.cli.shapes import Planned

    shown = plan.shown()
    if out.json:
        out.record(msgspec.convert(shown, Planned))
        return
    bound = "none" if plan.max_pause is None else f"{plan.max_pause * 1000:g} ms"
    out.facts([
        ("snapshot", f"{plan.id} of {plan.vm} (a dry run: nothing is done)"),
        ("level", plan.level.value),
        ("RAM", f"{', then '.join(mode.value for mode in plan.modes)} ({plan.why})"),
        ("quiesce", f"{'agent' if plan.freeze else 'none'} ({plan.freeze_why})"),
        ("max pause", bound),
        ("max freeze", f"{plan.max_freeze:g} s" if plan.freeze else None),
        ("note", wishes.note or None),
    ])  # fmt: skip
    out.line()
    out.table(
        ("DISK", "NODE", "LEVEL", "FREEZES", "OVERLAY"),
        [
            [one["disk"], one["node"], one["level"], one["frozen"], one["overlay"]]
            for one in shown["disks"]
        ],
    )
    for one in shown["disks"]:
        told = ", encrypted" if one["encrypted"] else ""
        out.line(f"{one['disk']}: {one['level']} ({one['level_reason']}){told}")
    for left in shown["left_out"]:
        out.line(f"left out: {left['disk']} ({left['reason']})")
    out.line()
    out.line("before the pause:")
    for command in shown["before"]:
        out.line(f"  {json.dumps(command)}")
    out.line("at the instant:")
    out.line(f"  {json.dumps(shown['at_the_instant'])}")
