"""`qmpsnap ship`: deliver what waits in the spools."""

from __future__ import annotations

from qmpsnap.cli import options
from qmpsnap.cli.target import Call
from qmpsnap.cli.verb import verb

EPILOG = """\b
Examples:
  qmpsnap ship
  qmpsnap ship web

\b
Exit codes: 0 nothing waits any more; 2 usage; 3 no such VM; 4 a root cannot be
read; 5 something still waits; 130, 143.
"""


@verb()
async def ship(call: Call, vm: options.OptionalVm = None) -> None:
    """Deliver the store halves that wait in the local spool because the store was not there."""
    from qmpsnap.cli.render import in_bytes
    from qmpsnap.cli.shapes import Shipped
    from qmpsnap.errors import NotShipped, VmUnknown

    engine, out = call.engine(), call.out
    out.expect_progress()
    unreached = vm is not None and call.machine(vm, reach=False).qmp is None
    if vm is not None and unreached and not engine.roots.local.vm(vm).is_dir():
        raise VmUnknown(f"nothing is known of a VM {vm!r}")
    delivered, waiting = await engine.ship(vm)
    for one in delivered:
        if out.json:
            out.record(Shipped(vm=one.vm, id=one.id, bytes=one.bytes))
        else:
            out.line(f"{one.vm} {one.id}: shipped, {in_bytes(one.bytes)}")
    if not delivered and not waiting:
        out.notice("nothing waits to be shipped")
    for trouble in waiting[:-1]:
        out.aside("warning", str(trouble))
    if waiting:
        raise NotShipped(str(waiting[-1]), hint="`qmpsnap ship` tries again")
