"""`qmpsnap info`: what is possible with a running VM, and why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qmpsnap.cli import options
from qmpsnap.cli.target import Call
from qmpsnap.cli.verb import verb

if TYPE_CHECKING:
    from qmpsnap.cli.render import Output
    from qmpsnap.engine.info import Info

EPILOG = """\b
Examples:
  qmpsnap info web --socket /run/web.sock
  qmpsnap info web --changes --json

\b
Exit codes: 0 done; 2 usage; 3 the VM is not there, or is busy; 4 failed.
"""


@verb()
async def info(
    call: Call,
    vm: options.Vm,
    changes: Annotated[
        bool,
        typer.Option(
            "--changes",
            help="Count what the next increment of each disk would copy. Default: do not.",
            show_default=False,
        ),
    ] = False,
) -> None:
    """Tell what is possible with a running VM, and why not; the names of its disks too.

    RAM modes, levels of each disk, the agent, bitmaps, what the VM's control groups leave for a
    snapshot, and everything that is in the way, each with its reason. Nothing is changed. Works
    without roots; with --local it tells our overlays from others.
    """
    from qmpsnap.cli.render import in_bytes
    from qmpsnap.engine.wishes import Encrypt
    from qmpsnap.store.lease import in_words

    found = await call.engine(roots=False).info(
        call.machine(vm), changes=changes, encrypt=call.encrypt(vm) == Encrypt.ALL
    )
    out = call.out
    if out.json:
        out.record(found)
        return
    agent = found.agent or "none"
    out.facts([
        ("VM", f"{found.vm}, {found.state}"),
        ("QEMU", f"{found.qemu_version}{f' ({found.qemu_package})' if found.qemu_package else ''}"),
        ("machine", found.machine),
        ("accelerator", found.accelerator),
        ("process", found.pid),
        ("RAM", in_bytes(found.ram_bytes)),
        ("agent", f"{agent} ({found.agent_trouble})" if found.agent_trouble else agent),
        ("lease", in_words(found.lease) if found.lease else None),
    ])  # fmt: skip
    out.line()
    out.table(
        ("DISK", "NODE", "FORMAT", "SIZE", "TAKEN", "FILE", "ALSO CALLED"),
        [
            [
                disk.name,
                disk.node or "-",
                disk.format or "-",
                in_bytes(disk.virtual_size_bytes),
                "yes" if disk.taken else f"no: {disk.why}",
                disk.files[0] if disk.files else "-",
                ", ".join(name for name in disk.names if name not in {disk.name, disk.node}) or "-",
            ]
            for disk in found.disks
        ],
    )
    out.line()
    out.table(
        ("DISK", "NEXT COPY", "CHANGED", "WHY"),
        [
            [
                disk.name,
                disk.level,
                in_bytes(disk.changed_bytes) if disk.changed_bytes is not None else "-",
                disk.level_why,
            ]
            for disk in found.disks
            if disk.taken
        ],
    )
    _levels(out, found)
    for disk in found.disks:
        for one in disk.bitmaps:
            out.line(f"{disk.name}: bitmap {one.name}, {one.standing}, {in_bytes(one.dirty_bytes)}")
    out.line()
    restorable = ["restore", "yes" if found.restorable else "no", found.restorable_why]
    out.table(
        ("WHAT", "POSSIBLE", "WHY"),
        [
            *([one.what, "yes" if one.possible else "no", one.why] for one in found.possibilities),
            restorable,
        ],
    )
    _limits(out, found)
    if found.blockers:
        out.line()
        out.table(("IN THE WAY OF", "WHY"), [[one.of, one.why] for one in found.blockers])


def _levels(out: Output, found: Info) -> None:
    out.line()
    out.table(
        ("DISK", "LEVEL", "POSSIBLE", "WHY"),
        [
            [disk.name, one.what, "yes" if one.possible else "no", one.why]
            for disk in found.disks
            if disk.taken
            for one in disk.levels
        ],
    )


def _limits(out: Output, found: Info) -> None:
    from qmpsnap.cli.grouped import words
    from qmpsnap.cli.render import in_bytes
    from qmpsnap.cli.units import count

    limits = found.limits
    out.line()
    if limits is None or limits.why:
        out.line(f"control groups: not known{f': {limits.why}' if limits else ''}")
    elif not limits.groups:
        out.line("control groups: none limits this VM")
    else:
        out.table(
            ("CONTROL GROUP", "LIMITS", "MEMORY LEFT", "TASKS LEFT", "ENOUGH", "WHY"),
            [
                [
                    one.folder,
                    ", ".join(words(one.limits)),
                    in_bytes(one.memory_left_bytes),
                    count(one.tasks_left_count),
                    "yes" if one.enough else "no",
                    one.why,
                ]
                for one in limits.groups
            ],
        )
