"""`qmpsnap lease`: which host a VM belongs to on the store."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from qmpsnap.cli import options
from qmpsnap.cli.target import Call
from qmpsnap.cli.verb import verb

EPILOG = """\b
Examples:
  qmpsnap lease web
  qmpsnap lease web --take
  qmpsnap lease web --give-up

\b
Exit codes: 0 done; 2 usage; 3 another host has it, or the VM is busy; 4 the store
cannot be reached.
"""


@verb(sockets=False)
async def lease(
    call: Call,
    vm: options.Vm,
    take: Annotated[
        bool,
        typer.Option(
            "--take",
            help="Take the VM over, also from a host that has it. It stops writing at once, or "
            "when it comes back. Default: only look.",
            show_default=False,
        ),
    ] = False,
    give_up: Annotated[
        bool,
        typer.Option(
            "--give-up",
            help="Any host may have the VM from now on. Default: only look.",
            show_default=False,
        ),
    ] = False,
) -> None:
    """Tell which host a VM belongs to on the store, or change that.

    Every verb that writes there takes the lease by itself, and it lasts for a while (`lease` in the
    configuration) after the last of them. To move a VM to another host: --give-up on the old one,
    and if that is gone, --take on the new one.
    """
    from qmpsnap.errors import UsageError
    from qmpsnap.store.lease import in_words

    if take and give_up:
        raise UsageError("--take or --give-up, one of them")
    call.machine(vm, reach=False)
    act: Literal["look", "seize", "leave"] = "seize" if take else "leave" if give_up else "look"
    standing = await call.engine().lease(vm, act)
    if call.out.json:
        call.out.record(standing)
    else:
        call.out.line(f"{vm}: {in_words(standing)}")
