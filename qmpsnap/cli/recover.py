"""`qmpsnap recover`: settle what a crash left behind."""

from __future__ import annotations

from typing import Annotated

import typer

from qmpsnap.cli import options
from qmpsnap.cli.target import Call
from qmpsnap.cli.verb import verb

EPILOG = """\b
Examples:
  qmpsnap recover web
  qmpsnap recover web --not-restarted     # in a boot script, before QEMU starts
  qmpsnap recover

\b
Exit codes: 0 nothing is owed any more; 2 usage; 3 the VM is not there, or is
busy; 4 failed, the journal still has it; 6 the guest may need help; 130, 143.
"""

NotRestarted = Annotated[
    bool,
    typer.Option(
        "--not-restarted",
        help="QEMU has ended and was not started since: asked for where QEMU and qmpsnap ended "
        "together while an overlay of a copy went back into its disk. Default: that is not known.",
    ),
]


@verb()
async def recover(
    call: Call, vm: options.OptionalVm = None, not_restarted: NotRestarted = False
) -> None:
    """Settle what an interrupted qmpsnap still owes a VM; `create` does so too, at its start.

    A stopped guest is continued, a frozen one thawed, half-made overlays are taken back, also into
    the disks of a VM that does not run any more. A restored guest that waits for RAM which nobody
    brings any more gets it again, in the background. Done twice, it does nothing.
    """
    from qmpsnap.cli.shapes import Settled
    from qmpsnap.engine.recover import owes

    engine, out = call.engine(), call.out
    roots = engine.roots
    names = [vm] if vm is not None else [one for one in roots.local.vms() if owes(roots, one)]
    settled = [
        (name, one)
        for name in names
        for one in await engine.recover(
            call.machine(name, reach=False), not_restarted=not_restarted
        )
    ]
    for name, one in settled:
        if out.json:
            out.record(Settled(vm=name, id=one.id, did=[*one.did]))
        else:
            out.line(f"{name} {one.id}: {'; '.join(one.did)}")
    if not settled:
        out.notice("nothing was owed")
