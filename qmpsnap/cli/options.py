"""The options that several verbs share, each spelled and explained here only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qmpsnap.cli.completion import reasons, snapshots, vms

Vm = Annotated[
    str,
    typer.Argument(
        metavar="VM",
        help="Name of the VM: from the configuration, of `qmpsnap run`, or any with --socket.",
        autocompletion=vms,
        show_default=False,
    ),
]
OptionalVm = Annotated[
    str | None,
    typer.Argument(
        metavar="VM", help="Only this VM; default: all.", autocompletion=vms, show_default=False
    ),
]
Id = Annotated[
    str,
    typer.Argument(
        metavar="ID",
        help="Snapshot: its ID, a unique beginning of it, or `latest` (the default).",
        autocompletion=snapshots,
        show_default=False,
    ),
]
RequiredId = Annotated[
    str,
    typer.Argument(
        metavar="ID",
        help="Snapshot: its ID, a unique beginning of it, or `latest`.",
        autocompletion=snapshots,
        show_default=False,
    ),
]
Socket = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="QMP socket of the VM, as in QEMU's -qmp unix:PATH,server=on,wait=off. "
        "Default: from the configuration or `qmpsnap run`.",
        show_default=False,
    ),
]
AgentSocket = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Socket of the guest agent. Default: from the configuration, else from the command "
        "line of the running QEMU where it is needed.",
        show_default=False,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Configuration (TOML). Default: $QMPSNAP_CONFIG, /etc/qmpsnap.toml or "
        "~/.config/qmpsnap.toml, the first there is.",
        show_default=False,
    ),
]
Local = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Local root: folder of the local halves, on the host's own disks. "
        "Default: `local` in the configuration.",
        show_default=False,
    ),
]
Store = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Store root: folder of the store halves, on a network file system. "
        "Default: `store` in the configuration.",
        show_default=False,
    ),
]
AllowLocalStore = Annotated[
    bool,
    typer.Option(
        "--allow-local-store",
        help="For a trial: take a store that is on this host's own disks. Default: refuse it.",
        show_default=False,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object a line; errors and log as JSON too, on stderr. Default: text.",
        show_default=False,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="No progress and no notices on stderr, errors only. Default: progress on a terminal.",
        show_default=False,
    ),
]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        help="Say more on stderr; -vv adds details, and a traceback for what is unexpected.",
        show_default=False,
    ),
]

Compress = Annotated[
    bool,
    typer.Option(
        "--compress",
        help="Compress the copies of disks: smaller, and much slower. Default: as they are.",
        show_default=False,
    ),
]
SpeedLimit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Copy disks at no more than this a second, such as 50M. Default: no limit.",
        show_default=False,
    ),
]
Insecure = Annotated[
    list[str] | None,
    typer.Option(
        metavar="unsigned|foreign",
        help="Take a snapshot that is not signed (unsigned), or signed with a key that is not "
        "trusted here (foreign); may be repeated. Default: refuse it. One whose signature is "
        "wrong is damaged, and never taken.",
        autocompletion=reasons,
        show_default=False,
    ),
]

MaxFreeze = Annotated[
    str,
    typer.Option(
        metavar="TIME",
        help="Longest time that the guest's file systems may be frozen, where they are, or it is "
        "given up with the guest untouched.",
    ),
]

ROOTS = {
    "config": (Config, None),
    "local": (Local, None),
    "store": (Store, None),
    "allow_local_store": (AllowLocalStore, False),
}
INSECURE = {"insecure": (Insecure, None)}
CONFIG = {"config": (Config, None)}
SOCKETS = {"socket": (Socket, None), "agent_socket": (AgentSocket, None)}
OUTPUT = {"json": (Json, False), "quiet": (Quiet, False), "verbose": (Verbose, 0)}
