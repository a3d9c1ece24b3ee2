"""`qmpsnap export`: serve one disk of a snapshot, read-only, or write it into an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qmpsnap.cli import options
from qmpsnap.cli.completion import disks
from qmpsnap.cli.target import Call, snapshot
from qmpsnap.cli.verb import verb

EPILOG = """\b
Examples:
  qmpsnap export web latest vda
  qmpsnap export web 20261122T1650 vda --revision 0 --socket-path /run/vda.sock
  nbdcopy "nbd+unix:///?socket=/run/vda.sock" vda.raw
  qmpsnap export web latest vda --to vda.qcow2

\b
Exit codes: 0 done (with --to); 2 usage; 3 no such snapshot, nobody trusted has signed
it, it is encrypted (without --to, or the key is not here); 4 failed; 7 a half is missing
or an image has changed; 130 or 143 it was ended by Ctrl-C or SIGTERM.
"""


@verb(sockets=False, insecure=True)
async def export(
    call: Call,
    vm: options.Vm,
    id: options.RequiredId,
    disk: Annotated[
        str,
        typer.Argument(
            metavar="DISK",
            help="Disk: its name or label, as `show` prints them, its node or qdev path.",
            autocompletion=disks,
            show_default=False,
        ),
    ],
    *,
    revision: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Revision of the local half; 0 is the one of the vmstate. Default: the newest.",
            show_default=False,
        ),
    ] = None,
    socket_path: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Unix socket to listen on. Default: one in the VM's runtime folder.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the disk into this new qcow2, which stands on nothing, instead: the way "
            "for one that is encrypted. Default: serve it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a disk of a snapshot, read-only, over NBD on a Unix socket, until Ctrl-C.

    Its URI is printed when it is ready, for nbdcopy, nbdfuse, guestfish or `qemu-img convert`.
    Up to 8 of them may read at a time. The store is not needed.
    """
    from qmpsnap.cli.render import in_bytes
    from qmpsnap.errors import LocalFailed, UsageError

    call.machine(vm, reach=False)
    engine, out = call.engine(), call.out
    if to is not None:
        if socket_path is not None:
            raise UsageError("--to writes a file: nothing is served on --socket-path")
        out.expect_progress()
        made = await engine.extract(vm, disk, to, snapshot(id), revision=revision)
        if out.json:
            out.record(made)
        else:
            out.settle()
            told = f"{made.disk} of {made.vm} {made.id}, revision {made.revision}"
            out.line(f"{made.image}: {told}, {in_bytes(made.bytes)}")
        return
    async with engine.exported(
        vm, disk, snapshot(id), revision=revision, socket=socket_path
    ) as served:
        shown = served.shown
        if out.json:
            out.record(shown)
        else:
            out.line(shown.uri)
        out.flush()
        told = f"{shown.disk} of {shown.vm} {shown.id}, revision {shown.revision}"
        out.notice(f"serving {told}; Ctrl-C ends it")
        raise LocalFailed(f"qemu-nbd: {await served.ended()}")
