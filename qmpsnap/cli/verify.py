"""`qmpsnap verify`: is a snapshot still what its manifests say?"""

from __future__ import annotations

from qmpsnap.cli import options
from qmpsnap.cli.target import Call, snapshot
from qmpsnap.cli.verb import verb

EPILOG = """\b
Examples:
  qmpsnap verify web
  qmpsnap verify web 20261122T165057123Z --json

\b
Exit codes: 0 all is well; 2 usage; 3 no such snapshot; 4 it could not be looked
at; 7 damaged data found; 130, 143.
"""


@verb()
async def verify(call: Call, vm: options.Vm, id: options.Id = "latest") -> None:
    """Read and check all of one snapshot: digests, chains of disk images, and the pair."""
    from qmpsnap.errors import DamagedData

    call.machine(vm, reach=False)
    call.out.expect_progress()
    found = await call.engine().verify(vm, snapshot(id))
    out = call.out
    if out.json:
        out.record(found)
    elif not found.findings:
        out.line(f"{found.vm} {found.id}: {found.state}, all is well")
    else:
        out.table(("WHERE", "WHAT"), [[one.where, one.what] for one in found.findings])
    if found.findings:
        count = len(found.findings)
        raise DamagedData(f"{found.vm} {found.id}: {count} finding{'s' if count > 1 else ''}")
