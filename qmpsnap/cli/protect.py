"""`qmpsnap protect` and `qmpsnap unprotect`: snapshots that nothing may remove."""

from __future__ import annotations

from typing import Annotated

import typer

from qmpsnap.cli import options
from qmpsnap.cli.target import Call, snapshot
from qmpsnap.cli.verb import verb

EPILOG = """\b
Examples:
  qmpsnap protect web latest --note "as delivered"
  qmpsnap protect web 20261122T165057123Z

\b
Exit codes: 0 done; 2 usage; 3 no such snapshot, or the VM is busy; 4 failed;
7 there is no local half here; 130, 143.
"""
UN_EPILOG = """\b
Example:
  qmpsnap unprotect web 20261122T165057123Z

\b
Exit codes: 0 done; 2 usage; 3 no such snapshot, or the VM is busy; 4 failed;
130, 143.
"""


@verb()
async def protect(
    call: Call,
    vm: options.Vm,
    id: options.RequiredId,
    note: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Why, for whoever wants to delete it. Default: none.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Keep a snapshot from `prune` and `delete`, until it is unprotected.

    It counts for the rules of `prune` as any other. Once more replaces the note.
    """
    call.machine(vm, reach=False)
    done = await call.engine().protect(vm, snapshot(id), note)
    if call.out.json:
        call.out.record(done)
    else:
        call.out.line(f"{done.vm} {done.id}: protected")


@verb()
async def unprotect(call: Call, vm: options.Vm, id: options.RequiredId) -> None:
    """Let a protected snapshot be pruned and deleted again."""
    call.machine(vm, reach=False)
    done = await call.engine().unprotect(vm, snapshot(id))
    if call.out.json:
        call.out.record(done)
    else:
        call.out.line(f"{done.vm} {done.id}: not protected")
