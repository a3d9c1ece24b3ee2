"""`qmpsnap verify`: is a snapshot still what its manifests say, and does it come back?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qmpsnap.cli import options
from qmpsnap.cli.target import Call, duration, snapshot
from qmpsnap.cli.verb import verb

if TYPE_CHECKING:
    from qmpsnap.cli.render import Output
    from qmpsnap.engine.boot import Boot
    from qmpsnap.engine.verify import Verified

_WITHIN = "60s"

EPILOG = """\b
Examples:
  qmpsnap verify web
  qmpsnap verify web 20261122T165057123Z --json
  qmpsnap verify web --all
  qmpsnap verify web --boot
  qmpsnap verify web --boot --cold --boot-within 3m

\b
Exit codes: 0 all is well; 2 usage; 3 no such snapshot, one that is not signed by a key
that is trusted here, or --boot is not possible;
4 it could not be looked at; 7 damaged data found, or a boot that failed; 130, 143.
"""


@verb(insecure=True)
async def verify(
    call: Call,
    vm: options.Vm,
    id: options.Id = "latest",
    *,
    all_: Annotated[
        bool,
        typer.Option(
            "--all",
            help="All snapshots of the VM, oldest first; a pack of RAM that several need is read "
            "once. Default: one.",
            show_default=False,
        ),
    ] = False,
    boot: Annotated[
        bool,
        typer.Option(
            "--boot",
            help="Also bring it back for a moment, on no network, and see that the guest goes on "
            "with its RAM (without RAM: boots) and that its agent answers. Default: read only.",
            show_default=False,
        ),
    ] = False,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold",
            help="With --boot: boot the disks, without the RAM. Default: with the RAM, if it "
            "was taken.",
            show_default=False,
        ),
    ] = False,
    boot_within: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help=f"With --boot: how long the guest's agent may take to answer. Default: {_WITHIN}.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="With --boot: this revision of the disks; any but 0 is booted cold. Default: 0, "
            "the newest with --cold.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Read and check all of a snapshot: digests, chains of disk images, and the pair.

    A VM that runs is asked, too, whether its dirty bitmaps match: what its next copy would be.
    """
    from contextlib import aclosing

    from qmpsnap.engine.boot import Trial
    from qmpsnap.engine.verify import Verified
    from qmpsnap.errors import DamagedData, Untrusted, UsageError

    machine = call.machine(vm, reach=False)
    trial = None
    within = duration("--boot-within", boot_within or _WITHIN)
    if boot:
        trial = Trial(cold=cold, within=within, revision=revision)
    elif cold or boot_within is not None or revision is not None:
        raise UsageError("--cold, --boot-within and --revision are about --boot")
    if all_ and (boot or id != "latest"):
        raise UsageError("--all is about all snapshots, and without --boot")
    call.out.expect_progress()
    engine, damaged = call.engine(), list[Verified]()
    if all_:
        async with aclosing(engine.verify_all(vm, machine=machine)) as each:
            async for found in each:
                _show(call.out, found)
                damaged += [found] if found.findings else []
    else:
        found = await engine.verify(vm, snapshot(id), trial=trial, machine=machine)
        _show(call.out, found)
        damaged += [found] if found.findings else []
    if damaged:
        kind = Untrusted if all(one.untrusted for one in damaged) else DamagedData
        raise kind(
            "; ".join(map(_counted, damaged)),
            hint=next((one.hint for one in damaged if one.hint), ""),
        )


def _show(out: Output, found: Verified) -> None:
    if out.json:
        out.record(found)
        return
    if not found.findings:
        told = f"; {found.signature.words}" if found.signature else ""
        if found.encryption is not None:
            lacking = "" if found.decrypted else ", which is not here: it was not decrypted"
            told += f"; it is encrypted with the key {found.encryption}{lacking}"
        if found.disk_keys:
            lacking = ", ".join(found.missing_keys)
            lacking = f"; {lacking} is not here: those were not decrypted" if lacking else ""
            told += f"; disks are encrypted with the key {', '.join(found.disk_keys)}{lacking}"
        out.line(f"{found.vm} {found.id}: {found.state}, all is well{told}")
    if found.boot is not None and not found.boot.problem:
        out.line(_seen(found.boot))
    for one in found.next:
        out.line(f"the next copy of {one.disk}: {one.level} ({one.why})")
    if found.findings:
        out.table(("WHERE", "WHAT"), [[it.where, it.what] for it in found.findings])


def _counted(found: Verified) -> str:
    count = len(found.findings)
    return f"{found.vm} {found.id}: {count} finding{'s' if count > 1 else ''}"


def _seen(boot: Boot) -> str:
    from qmpsnap.cli.render import in_ms

    how = "went on with its RAM" if boot.ram else f"booted from revision {boot.revision}"
    asked = f"the agent answered after {in_ms(boot.answered_ms)}"
    if boot.agent == "absent":
        asked = "there was no agent to ask"
    return f"brought back: {how}, ran after {in_ms(boot.running_ms)}; {asked}"
