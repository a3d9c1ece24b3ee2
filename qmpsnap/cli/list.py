"""`qmpsnap list`: which snapshots there are, and in what state."""

from __future__ import annotations

from qmpsnap.cli import options
from qmpsnap.cli.target import Call
from qmpsnap.cli.verb import verb

EPILOG = """\b
States: paired (both halves sealed, naming each other), shipping (waits in the
spool), untrusted (not signed, or with a key that is not trusted here), local only,
store only (the local half is elsewhere), damaged.

\b
Examples:
  qmpsnap list
  qmpsnap list web --json

\b
Exit codes: 0 done; 2 usage; 3 no such VM; 4 a root cannot be read.
"""


@verb()
async def list_(call: Call, vm: options.OptionalVm = None) -> None:
    """List the snapshots, oldest first, each with its state.

    Nothing is hidden: what is not whole is shown as what it is, with the reason.
    """
    from qmpsnap.cli.render import in_ms
    from qmpsnap.errors import VmUnknown

    machine = None if vm is None else call.machine(vm, reach=False)
    entries = await call.engine().list(vm)
    if not entries and machine is not None and machine.qmp is None:
        raise VmUnknown(f"nothing is known of a VM {vm!r}")
    out = call.out
    if out.json:
        for entry in entries:
            out.record(entry)
        return
    if not entries:
        out.notice("no snapshots found")
        return
    head = ("ID", "STATE", "TAKEN", "LEVEL", "RAM", "PAUSE", "NOTE")
    rows = []
    for one in entries:
        kept = "protected" if one.protected else ""
        encrypted = f"encrypted ({one.encryption})" if one.encryption else ""
        if one.disk_keys:
            encrypted = "; ".join(
                filter(None, (encrypted, f"disks encrypted ({', '.join(one.disk_keys)})"))
            )
        notes = "; ".join(word for word in (kept, encrypted, one.note, one.why) if word)
        taken = (one.taken_at or "-").replace("T", " ").partition(".")[0]
        row = [one.id, one.state, taken, one.level or "-", one.ram or "-", in_ms(one.pause_ms)]
        rows.append([*([one.vm] if vm is None else []), *row, notes])
    out.table(head if vm is not None else ("VM", *head), rows)
    odd = [one for one in entries if one.state != "paired"]
    if odd:
        counts = {state: sum(one.state == state for one in odd) for state in
                  dict.fromkeys(one.state for one in odd)}  # fmt: skip
        told = ", ".join(f"{count} {state}" for state, count in counts.items())
        hint = "; `qmpsnap ship` delivers what is shipping" if "shipping" in counts else ""
        out.notice(f"not paired: {told}{hint}")
