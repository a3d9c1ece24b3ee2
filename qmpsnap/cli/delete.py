"""`qmpsnap delete`: remove one snapshot."""

from __future__ import annotations

from qmpsnap.cli import options
from qmpsnap.cli.target import Call, snapshot
from qmpsnap.cli.verb import verb

EPILOG = """\b
Example:
  qmpsnap delete web 20261122T165057123Z

\b
Exit codes: 0 done; 2 usage; 3 refused: no such snapshot, or restored machines
stand on it; 4 failed; 6 the guest may need help; 130, 143.
"""


@verb()
async def delete(call: Call, vm: options.Vm, id: options.RequiredId) -> None:
    """Remove both halves of one snapshot, and fold overlays that nobody needs.

    A running VM goes on, on fewer layers. Without it (or its socket) the layers stay.
    """
    done = await call.engine().delete(call.machine(vm, reach=False), snapshot(id))
    out = call.out
    if out.json:
        out.record(done)
        return
    out.line(f"{done.vm} {done.id}: deleted")
    for path in done.folded:
        out.line(f"folded: {path}")
    if done.why:
        out.notice(done.why)
