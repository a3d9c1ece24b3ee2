"""`qmpsnap refresh`: a newer revision of a snapshot's local half."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from qmpsnap.cli import options
from qmpsnap.cli.metered import MetricsFile, metered
from qmpsnap.cli.target import Call, choice, copying, duration, snapshot
from qmpsnap.cli.verb import verb

EPILOG = """\b
Examples:
  qmpsnap refresh web
  qmpsnap refresh web 20261122T1650 --quiesce agent --json
  qmpsnap restore web 20261122T1650 --revision 2 --cold --to /srv/back

\b
Exit codes: 0 done; 2 usage; 3 refused, nothing touched; 4 failed, guest and
snapshot as before; 6 the guest may need help; 130, 143.
"""


class _Encrypt(StrEnum):
    """There is no store half to encrypt."""

    NONE = "none"
    ALL = "all"


@verb()
async def refresh(
    call: Call,
    vm: options.Vm,
    id: options.Id = "latest",
    quiesce: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="Freeze the guest's file systems: auto, agent or none. auto: by the guest agent "
            "where one answers.",
        ),
    ] = "auto",
    max_pause: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Longest time that the guest may stand still, or the refresh fails with the "
            "guest untouched. Default: 200ms.",
            show_default=False,
        ),
    ] = None,
    max_freeze: options.MaxFreeze = "30s",
    compress: options.Compress = False,
    speed_limit: options.SpeedLimit = None,
    encrypt: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="Encrypt: all (each image that is copied), or none. Default: all where the last "
            "revision's images are encrypted, or `encrypt` of the configuration says so.",
            show_default=False,
        ),
    ] = None,
    metrics_file: MetricsFile = None,
) -> None:
    """Take the disks of a running VM as they are now, as a new revision of a snapshot.

    Only what changed is copied, on this host; the half on the store stays byte for byte as it is.
    The RAM of the snapshot belongs to its revision 0: later revisions are booted with --cold.
    """
    from qmpsnap.cli.render import in_bytes, in_ms
    from qmpsnap.engine.wishes import Quiesce

    wanted = choice("--quiesce", Quiesce, quiesce)
    sealed = choice("--encrypt", _Encrypt, encrypt) is _Encrypt.ALL if encrypt else None
    if sealed is None and call.encrypt(vm) == _Encrypt.ALL:
        sealed = True
    bound = None if max_pause is None else duration("--max-pause", max_pause)
    how = copying(compress, speed_limit)
    engine, machine, out = call.engine(), call.machine(vm), call.out
    out.expect_progress()
    async with metered(call, metrics_file, engine, vm, "refresh") as run:
        made = await engine.refresh(
            machine,
            snapshot(id),
            copying=how,
            quiesce=wanted,
            max_pause=bound,
            max_freeze=duration("--max-freeze", max_freeze),
            encrypt=sealed,
        )
        run.pause_ms, run.frozen_ms, run.bytes = (
            made.pause_ms,
            made.frozen_ms,
            {"disks": made.bytes},
        )
    if out.json:
        out.record(made)
        return
    out.facts([
        ("snapshot", f"{made.id} of {made.vm}, revision {made.revision}"),
        ("taken", made.taken_at),
        ("pause", in_ms(made.pause_ms)),
        ("frozen", in_ms(made.frozen_ms) if made.frozen_ms is not None else None),
        ("quiesce", made.quiesce),
        *[(disk, level) for disk, level in made.levels.items()],
        ("encryption", f"with the key {made.encryption}" if made.encryption else None),
        ("bytes", in_bytes(made.bytes)),
        ("local", made.local),
    ])  # fmt: skip
