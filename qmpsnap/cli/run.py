"""`qmpsnap run`: start a QEMU that every other verb finds by its name."""

from __future__ import annotations

import contextlib
import os
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmpsnap.cli.target import Call
from qmpsnap.cli.verb import verb

if TYPE_CHECKING:
    from qmpsnap.cli.render import Output
    from qmpsnap.hypervisor.machine.launch import Launched
    from qmpsnap.hypervisor.machine.run import Prepared

EPILOG = """\b
Examples:
  qmpsnap run --name web -- qemu-system-x86_64 -m 512 -nographic disk.qcow2
  qmpsnap run --detach -- qemu-system-x86_64 -name web -m 512 disk.qcow2

\b
Exit codes: QEMU's own, 128 + N where the signal N ended it; 2 usage; 3 the name
is in use; 4 QEMU did not start; 130 or 143 stopped by Ctrl-C or SIGTERM.
"""


@verb(sockets=False, roots=False)
async def run(
    call: Call,
    argv: Annotated[
        list[str],
        typer.Argument(
            metavar="QEMU", help="The QEMU to start, and its arguments.", show_default=False
        ),
    ],
    *,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Name of the VM for the other verbs. Default: QEMU's -name.",
            show_default=False,
        ),
    ] = None,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach",
            help="Return once QEMU answers, and leave it running. Default: stay, with the "
            "terminal handed to QEMU; Ctrl-C stops it.",
            show_default=False,
        ),
    ] = False,
) -> int:
    """Start a QEMU with a QMP monitor of ours beside its own, known by its name.

    `qmpsnap create NAME` and all other verbs then need no --socket. Options come before the QEMU;
    all behind it is QEMU's.
    """
    from qmpsnap.errors import Refused, UsageError
    from qmpsnap.host import lock
    from qmpsnap.hypervisor.machine import registry
    from qmpsnap.hypervisor.machine.launch import launched
    from qmpsnap.hypervisor.machine.run import prepared

    if argv[0].startswith("-"):
        raise UsageError(f"no such option: {argv[0]}", hint="see `qmpsnap run --help`")
    chosen = prepared(argv, name=name, directory=Path("/")).name
    folder = registry.folder(chosen)
    async with lock.held(folder / "lock", "run"):
        if (other := registry.find(chosen)) is not None:
            raise Refused(f"{chosen} runs already, as process {other.pid}")
        ready = prepared(argv, name=chosen, directory=folder)
        ready.qmp.unlink(missing_ok=True)  # left by one that was killed
        await _settled(call, chosen)
        qemu = launched(
            ready.argv,
            directory=Path.cwd(),
            log=folder / "qemu.log",
            lifetime="detached" if detach else "with-us",
            terminal=not detach,
        )
        with _terminal_as_before():
            async with qemu as process:
                if detach:
                    registry.enter(chosen, process.pid, ready.qmp, ready.agent)
                    _show(call.out, ready, process)
                    return 0
                with registry.register(chosen, process.pid, ready.qmp, ready.agent):
                    call.out.notice(f"{chosen} runs, process {process.pid}; Ctrl-C stops it")
                    return await _ended(call.out, process)


async def _settled(call: Call, name: str) -> None:
    """Give the VM's disks what a copy that was cut off still holds, before they are started."""
    from qmpsnap.engine.machine import Machine
    from qmpsnap.engine.recover import owes
    from qmpsnap.errors import MonitorAbsent, VmUnknown

    if call.settings.local is None:
        return
    engine = call.engine(roots=False)
    if not owes(engine.roots, name):
        return
    with contextlib.suppress(MonitorAbsent, VmUnknown):  # it owes nothing to the disks
        for one in await engine.recover(Machine(name)):
            call.out.notice(f"{name} {one.id}: {'; '.join(one.did)}")


async def _ended(out: Output, process: Launched) -> int:
    """QEMU's exit code once it ended by itself; its last words are told if it failed."""
    start = process.log.stat().st_size
    await process.exited()
    code = _code(process.pid)
    if code:
        with process.log.open("rb") as log:
            log.seek(start)
            for line in log.read().decode(errors="replace").splitlines()[-20:]:
                out.notice(line)
        out.aside("warning", f"QEMU ended with {code}; {process.log}")
    return code


def _code(pid: int) -> int:
    # seen, not reaped: that is for who started it
    seen = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert seen is not None
    return seen.si_status if seen.si_code == os.CLD_EXITED else 128 + seen.si_status


def _show(out: Output, ready: Prepared, process: Launched) -> None:
    from qmpsnap.cli.shapes import Started

    agent = str(ready.agent) if ready.agent else None
    if out.json:
        started = Started(
            vm=ready.name, pid=process.pid, qmp=str(ready.qmp), agent=agent, log=str(process.log)
        )
        out.record(started)
        return
    out.facts([
        ("VM", f"{ready.name}, process {process.pid}"),
        ("QMP", str(ready.qmp)),
        ("agent", agent),
        ("log", str(process.log)),
    ])  # fmt: skip


@contextlib.contextmanager
def _terminal_as_before() -> Iterator[None]:
    """A QEMU with -nographic sets the terminal to raw; one that is killed leaves it so."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
