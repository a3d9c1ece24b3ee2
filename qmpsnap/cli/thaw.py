"""`qmpsnap thaw`: thaw a guest that was left frozen."""

from __future__ import annotations

from qmpsnap.cli import options
from qmpsnap.cli.target import Call
from qmpsnap.cli.verb import verb

EPILOG = """\b
Examples:
  qmpsnap thaw web
  qmpsnap thaw web --agent-socket /run/web-agent.sock

\b
Exit codes: 0 nothing is frozen any more; 2 usage; 3 the VM is not known; 4 its
agent's socket is not known; 6 the guest may still be frozen; 130, 143.
"""


@verb(roots=False)
async def thaw(call: Call, vm: options.Vm) -> None:
    """Thaw the guest's file systems, through its agent, whoever froze them."""
    from qmpsnap.cli.shapes import Thawed
    from qmpsnap.engine.thaw import thaw as thawed

    machine = call.machine(vm, reach=call.agent_socket is None)
    count = await thawed(machine)
    if call.out.json:
        call.out.record(Thawed(vm=vm, thawed=count or 0))
    elif count:
        call.out.line(f"{vm}: {count} file system{'s' if count > 1 else ''} thawed")
    else:
        call.out.line(f"{vm}: nothing was frozen")
