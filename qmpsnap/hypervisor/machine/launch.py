"""The only place that starts a QEMU, and sees to it that it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qmpsnap.child import UMASK, Child, Lifetime, started
from qmpsnap.errors import LaunchFailed
from qmpsnap.hypervisor.machine import spare
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option, parse
from qmpsnap.hypervisor.machine.keyval import Fields
from qmpsnap.hypervisor.machine.options import Chardev, option_of
from qmpsnap.hypervisor.machine.relocate import QMP_ID
from qmpsnap.shield import finish

_BACKLOG = 8  # whoever connects while another client is served waits in the queue
_GRACE = 5.0  # seconds from SIGTERM to SIGKILL
_TAIL = 8  # lines of stderr in a failure, which is told in one line


@dataclass(frozen=True, slots=True)
class Launched:
    """A QEMU that we started and that answers on *qmp*. *spare*: the descriptor in it of our end
    of its spare monitor, if it was given one."""

    pid: int
    qmp: Path
    log: Path
    _child: Child
    spare: int | None = None

    async def exited(self) -> None:
        """Returns when the process has ended."""
        await self._child.gone()

    async def kill(self) -> None:
        """End the process at once, and see that it has ended."""
        await self._child.kill()


@contextlib.asynccontextmanager
async def launched(
    argv: Sequence[str],
    *,
    directory: Path,
    log: Path,
    lifetime: Lifetime = "with-us",
    terminal: bool = False,
    inside: Sequence[str] = (),
    hold: Sequence[int] = (),
    spared: bool = False,
    within: float = 30.0,
) -> AsyncIterator[Launched]:
    """A QEMU of *argv*, working in *directory*, that is complete and answers on our QMP socket.

    *argv* has the chardev of `relocate.control`. "with-us" ends with the block (SIGTERM, after
    5 s SIGKILL) and with our process, however that ends; "detached" outlives both. Its stderr
    goes to the file *log*; with *terminal* it has our stdin, stdout and process group instead of
    none. *inside*: words that start a command line in a control group, and become it; *hold*:
    descriptors that QEMU inherits. *spared*: it gets a spare monitor as well. *within* is how long
    its start may take, in seconds. Where the event loop runs in a thread of its own, the end of
    that thread ends a QEMU "with-us" too (PR_SET_PDEATHSIG).

    Raises LaunchFailed with the last of stderr when it does not get so far; it is then ended.
    """
    line = parse(argv)
    async with contextlib.AsyncExitStack() as stack:
        listener, path = stack.enter_context(_listening(line))
        line = _with_descriptor(line, listener.fileno())
        kept = [*stack.enter_context(spare.ends())] if spared else []
        if kept:
            line = line.append(*spare.options(kept[1].fileno()))
        with _appending(log) as stderr:
            start = stderr.tell()
            process = started(
                [*inside, *line.argv()],
                lifetime=lifetime,
                stderr=stderr.fileno(),
                directory=directory,
                hold=[listener.fileno(), *hold, *(one.fileno() for one in kept)],
                terminal=terminal,
            )
            try:
                child = await stack.enter_async_context(process)
            except ProcessLookupError:
                raise LaunchFailed(_last_words(log, start, "QEMU ended at once")) from None
        listener.close()  # QEMU has its own copy: when it ends, connecting fails at once
        try:
            await _answered(path, child, log, start, within)
            if kept:
                await spare.Session(kept[0]).greeted()
            if lifetime == "with-us":
                stack.push_async_callback(lambda: finish(_ended(child), within=20))
        except BaseException:
            await finish(child.kill() if lifetime == "detached" else _ended(child), within=20)
            raise
        number = kept[0].fileno() if kept else None
        for one in kept:
            one.close()  # QEMU has both ends now
        yield Launched(child.pid, path, log, child, number)


@contextlib.contextmanager
def _listening(line: CommandLine) -> Iterator[tuple[socket.socket, Path]]:
    # We listen before QEMU starts, so that nobody has to try again until the socket is there.
    views = map(Chardev.of, line.all("chardev"))
    path = next((view.path for view in views if view.id == QMP_ID), None)
    if path is None:
        raise LaunchFailed(f"the command line has no chardev {QMP_ID}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        before = os.umask(UMASK)
        try:
            listener.bind(path)
        except OSError as taken:
            raise LaunchFailed(f"{path}: {taken.strerror or taken}") from taken
        finally:
            os.umask(before)
        try:
            listener.listen(_BACKLOG)
            yield listener, Path(path)
        except BaseException:
            # a QEMU that got to work unlinks it when it ends; one that did not, does not
            Path(path).unlink(missing_ok=True)
            raise


def _with_descriptor(line: CommandLine, number: int) -> CommandLine:
    def handed(_index: int, option: Option) -> list[Option]:
        if option.name != "chardev" or Chardev.of(option).id != QMP_ID:
            return [option]
        where = (("backend", "socket"), ("id", QMP_ID), ("fd", str(number)))
        return [option_of("chardev", Fields((*where, ("server", "on"), ("wait", "off"))))]

    return line.replace(handed)


async def _ended(child: Child) -> None:
    child.send(signal.SIGTERM)
    try:
        await child.gone(within=_GRACE)
    except TimeoutError:
        await child.kill()


async def _answered(path: Path, child: Child, log: Path, start: int, within: float) -> None:
    """Returns once the machine is complete."""
    answer = asyncio.create_task(_answer(path))
    ending = asyncio.create_task(child.gone())
    try:
        async with asyncio.timeout(within):
            await asyncio.wait({answer, ending}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done() and answer.result():
                return
            await ending  # the connection broke: then QEMU is about to end
    except TimeoutError:
        raise LaunchFailed(
            _last_words(log, start, f"QEMU did not answer within {within:g} s")
        ) from None
    finally:
        for task in (answer, ending):
            task.cancel()
        await asyncio.gather(answer, ending, return_exceptions=True)
    raise LaunchFailed(_last_words(log, start, "QEMU ended before it answered"))


async def _answer(path: Path) -> bool:
    """Whether QEMU answers; it does so from its main loop, when the machine is complete.

    The greeting alone says less: it comes from the monitor's own thread, while devices that may
    yet fail are being made (seen on 10.0).
    """
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    try:
        greeted = b'"QMP"' in await reader.readline()
        writer.write(b'{"execute": "qmp_capabilities"}\n')
        return greeted and b'"return"' in await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _appending(log: Path) -> IO[bytes]:
    log.touch(mode=0o600)
    return log.open("ab")


def _last_words(log: Path, start: int, what: str) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()[-_TAIL:]
    return f"{what}; {log} ends: {' | '.join(lines)}" if lines else f"{what}, without a word"
