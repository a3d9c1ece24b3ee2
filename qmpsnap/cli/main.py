"""The command `qmpsnap`: its verbs, and what is wrong with a command line before a verb runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Annotated

import typer

from qmpsnap.cli import (
    create,
    delete,
    export,
    info,
    keys,
    lease,
    list,
    protect,
    prune,
    recover,
    refresh,
    restore,
    run,
    ship,
    show,
    thaw,
    usage,
    verify,
)

_ABOUT = """Paired snapshots of running QEMU virtual machines, straight over QMP.

One command fixes disks and RAM of one instant: the disks stay on this host, the machine's state
goes to a store on the network, and one ID links the two halves.
"""
_EXITS = """\b
Exit codes:
  0    done
  2    usage: the words or the configuration are off
  3    refused before anything was touched
  4    failed; the guest is as before, nothing is lost
  5    captured, but not shipped yet: the spool holds it
  6    the guest may need help: the message says what to run
  7    damaged data found
  130  interrupted by SIGINT, 143 by SIGTERM or SIGHUP; all debts are paid

\b
Example:
  qmpsnap create web --socket /run/web.sock --local /srv/snap --store /mnt/nas
"""

app = typer.Typer(
    help=_ABOUT,
    epilog=_EXITS,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
# a click of typer's own since 0.2x, the package `click` before: reached through what typer exports
_Misused: type[Exception] = typer.BadParameter.__mro__[2]


def _version(wanted: bool) -> None:
    if wanted:
        from qmpsnap import __version__

        typer.echo(f"qmpsnap {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Print the version and exit.",
            show_default=False,
        ),
    ] = False,
) -> None:
    pass


def _add(command: Callable[..., int], name: str, epilog: str) -> None:
    app.command(name, epilog=epilog)(command)


_add(create.create, "create", create.EPILOG)
_add(refresh.refresh, "refresh", refresh.EPILOG)
_add(list.list_, "list", list.EPILOG)
_add(show.show, "show", show.EPILOG)
_add(usage.usage, "usage", usage.EPILOG)
_add(info.info, "info", info.EPILOG)
_add(verify.verify, "verify", verify.EPILOG)
_add(restore.restore, "restore", restore.EPILOG)
_add(export.export, "export", export.EPILOG)
_add(ship.ship, "ship", ship.EPILOG)
_add(lease.lease, "lease", lease.EPILOG)
_add(delete.delete, "delete", delete.EPILOG)
_add(prune.prune, "prune", prune.EPILOG)
_add(protect.protect, "protect", protect.EPILOG)
_add(protect.unprotect, "unprotect", protect.UN_EPILOG)
app.add_typer(keys.app, name="keys", rich_help_panel=None)
_add(recover.recover, "recover", recover.EPILOG)
_add(thaw.thaw, "thaw", thaw.EPILOG)
app.command(
    "run",
    epilog=run.EPILOG,
    # what follows the name of the QEMU is QEMU's, with or without `--` before it
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)(run.run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; gives the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    # numpy's library for matrices, of which we use none, reserves memory for each processor else
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    words = [*sys.argv[1:]] if argv is None else [*argv]
    try:
        code = app(words or ["--help"], prog_name="qmpsnap", standalone_mode=False)
    except _Misused as misused:
        return _misused(misused, words)
    except BrokenPipeError:
        # the interpreter flushes stdout once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code if isinstance(code, int) else 0


def _leave(number: int, frame: FrameType | None) -> None:
    """Before a verb runs there is nothing to put in order."""
    raise SystemExit(128 + number)


def _misused(misused: Exception, words: Sequence[str]) -> int:
    from qmpsnap.cli.render import Output

    told = misused.format_message() if hasattr(misused, "format_message") else str(misused)
    told = " ".join(told.split())
    context = getattr(misused, "ctx", None)
    path = context.command_path if context else "qmpsnap"
    with Output(json="--json" in words) as out:
        out.failed("usage-error", told[:1].lower() + told[1:].rstrip("."), f"see `{path} --help`")
    return 2
