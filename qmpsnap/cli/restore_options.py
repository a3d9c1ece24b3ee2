"""The options of `restore`, each spelled and explained here only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

To = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        help="Folder for all that is new: images, sockets, logs. Empty, or not there yet.",
        show_default=False,
    ),
]
Cold = Annotated[
    bool,
    typer.Option(
        "--cold",
        help="Boot from the disks, without the RAM. Default: go on where the guest was.",
        show_default=False,
    ),
]
Eager = Annotated[
    bool,
    typer.Option(
        "--eager",
        help="Load all RAM into QEMU's own memory before the guest runs. Default: map it, "
        "and read each page when the guest touches it.",
        show_default=False,
    ),
]
RamIn = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder, empty or not there yet, into which the pages of the RAM are put before the "
        "guest runs, to be mapped from there. Default: from where they are kept, else on demand.",
        show_default=False,
    ),
]
Revision = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Revision of the local half. Default: the one of the vmstate.",
        show_default=False,
    ),
]
Standalone = Annotated[
    bool,
    typer.Option(
        "--standalone",
        help="Copy the disks in full. Default: thin overlays that need the snapshot.",
        show_default=False,
    ),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Only compare the captured machine with this host, in a table. Default: compare, "
        "and restore if nothing blocks.",
        show_default=False,
    ),
]
NoStart = Annotated[
    bool,
    typer.Option(
        "--no-start",
        help="Build the images and print the command line. Default: start it.",
        show_default=False,
    ),
]
QmpSocket = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Where the new QEMU's QMP monitor listens. Default: qmp.sock in DIR.",
        show_default=False,
    ),
]
Detach = Annotated[
    bool,
    typer.Option(
        "--detach",
        help="Return once the guest runs, and leave it running. Default: stay until the "
        "machine ends; Ctrl-C ends it.",
        show_default=False,
    ),
]
Clones = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Start N machines, in DIR/1 to DIR/N, which share the pages of the RAM: all, or "
        "none. Default: one machine, in DIR.",
        show_default=False,
    ),
]
KeepMacs = Annotated[
    bool,
    typer.Option(
        "--keep-macs",
        help="Clones have the MAC addresses of the original. Default: each has its own.",
        show_default=False,
    ),
]
Qemu = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="QEMU binary to use. Default: the one that the VM ran on.",
        show_default=False,
    ),
]
Secret = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID=FILE",
        help="File to read -object secret ID from, for one that the VM was given on its "
        "command line, which no snapshot holds; may be repeated. Default: where it was.",
        show_default=False,
    ),
]
Limits = Annotated[
    str,
    typer.Option(
        metavar="same|none|suggest",
        help="Start QEMU in a control group of its own: with the limits that held for the "
        "captured VM, or with such as follow from what it used. Default: none.",
        show_default=False,
    ),
]
LimitsParent = Annotated[
    str | None,
    typer.Option(
        metavar="GROUP",
        help="The group in which that one is made, as in /proc/PID/cgroup. Default: our own, "
        "on v2 the nearest that has no processes and hands the controllers down.",
        show_default=False,
    ),
]
