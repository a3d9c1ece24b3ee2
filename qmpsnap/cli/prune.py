"""`qmpsnap prune`: remove what a retention policy no longer keeps."""

from __future__ import annotations

from typing import Annotated

import typer

from qmpsnap.cli import options
from qmpsnap.cli.target import Call, duration
from qmpsnap.cli.verb import verb

EPILOG = """\b
Of each of the newest N hours, days, weeks, months or years that have a snapshot
at all, the newest one is kept; one snapshot may count for several. Periods are
those of UTC, weeks begin on Monday. Kept besides, and not counted: what is not
paired. Kept besides: what is protected, what restored machines stand on.

\b
DECISION is keep; remove; or images: it is no snapshot any more, but its images
stay, for others stand on them. An image that one other stands on is merged into
that one, on the side, and goes then.

\b
Examples:
  qmpsnap prune web --keep-last 24 --keep-daily 14 --keep-monthly 12
  qmpsnap prune web --keep-within 30d --keep-yearly 5 --dry-run
  qmpsnap prune web --keep-last 1 --no-merge --json

\b
Exit codes: 0 done; 2 usage, or no rule was given; 3 no such VM, or it is busy;
4 failed, or an image could not be merged: once more goes on; 6 the guest may
need help; 7 damaged data found; 130, 143.
"""


@verb()
async def prune(
    call: Call,
    vm: options.Vm,
    keep_last: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Keep the N newest. Default: 0.", show_default=False),
    ] = 0,
    keep_hourly: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Keep the newest of each of N hours. Default: 0.",
            show_default=False,
        ),
    ] = 0,
    keep_daily: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Keep the newest of each of N days. Default: 0.",
            show_default=False,
        ),
    ] = 0,
    keep_weekly: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Keep the newest of each of N weeks. Default: 0.",
            show_default=False,
        ),
    ] = 0,
    keep_monthly: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Keep the newest of each of N months. Default: 0.",
            show_default=False,
        ),
    ] = 0,
    keep_yearly: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Keep the newest of each of N years. Default: 0.",
            show_default=False,
        ),
    ] = 0,
    keep_within: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Keep all that were taken within this time before the newest one: 12h, 30d, 8w. "
            "Default: no such rule.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what would be done and why, do nothing.", show_default=False
        ),
    ] = False,
    no_merge: Annotated[
        bool,
        typer.Option(
            "--no-merge",
            help="Keep every image that others stand on as it is. Default: merge where one does.",
            show_default=False,
        ),
    ] = False,
) -> None:
    """Remove the snapshots of a VM that no rule keeps, both halves of each, and say why.

    At least one rule has to be given. No chain is ever broken. A running VM goes on, on fewer
    layers.
    """
    from qmpsnap.engine.retention import Policy
    from qmpsnap.errors import LocalFailed, VmUnknown

    policy = Policy(
        last=keep_last,
        hourly=keep_hourly,
        daily=keep_daily,
        weekly=keep_weekly,
        monthly=keep_monthly,
        yearly=keep_yearly,
        within=None if keep_within is None else duration("--keep-within", keep_within),
    )
    machine, engine, out = call.machine(vm, reach=False), call.engine(), call.out
    if machine.qmp is None and not engine.roots.local.vm(vm).is_dir():
        raise VmUnknown(f"nothing is known of a VM {vm!r}")
    out.expect_progress()
    done = await engine.prune(machine, policy, dry_run=dry_run, merging=not no_merge)
    if out.json:
        for fate in done.fates:
            out.record(fate)
    else:
        rows = [
            [
                fate.id,
                (fate.taken_at or "-").replace("T", " ").partition(".")[0],
                fate.state,
                fate.decision,
                "; ".join(fate.reasons),
            ]
            for fate in done.fates
        ]
        out.table(("ID", "TAKEN", "STATE", "DECISION", "WHY"), rows)
        for path in done.folded:
            out.line(f"folded: {path}")
    counts = [sum(one.decision == word for one in done.fates) for word in ("keep", "remove")]
    would = "would be " if dry_run else ""
    out.notice(f"{would}kept: {counts[0]}; removed: {counts[1]}")
    if any(one.state == "untrusted" for one in done.fates):
        out.notice(
            "what is untrusted is neither counted nor removed: `qmpsnap keys sign VM --all` signs "
            "what this host has shipped unsigned, `qmpsnap delete` removes one"
        )
    if done.why:
        out.notice(done.why)
    if done.failed:
        raise LocalFailed(
            f"not all could be merged: {'; '.join(done.failed)}",
            hint="nothing is lost: the images stay, and the next `qmpsnap prune` goes on",
        )
