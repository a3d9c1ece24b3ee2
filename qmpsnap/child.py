"""Processes that we start: the one place that has them end with us, or live on without us."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qmpsnap.errors import LaunchFailed

Lifetime = Literal["with-us", "detached"]
UMASK = 0o177
"""Sockets and files of what we start are its owner's alone."""
# Becomes "$@" unless who started it, $0, died before the kernel was told of the signal.
_UNLESS_LATE = '[ "$PPID" = "$0" ] && exec "$@"'
# Starts "$@" as nobody's child and tells its process id: no zombie of ours when it ends.
_ORPHANED = 'exec 3>&1; "$@" 3>&- >/dev/null & echo $! >&3'


def dying_with_us(number: signal.Signals) -> list[str]:
    """What goes before the words of a process that is to get *number* when we end.

    In contrast to a preexec_fn it runs no Python between fork and exec, which threads make unsafe.
    Raises LaunchFailed.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise LaunchFailed("setpriv is missing", hint="install the package util-linux")
    name = number.name.removeprefix("SIG")
    return [setpriv, f"--pdeathsig={name}", "/bin/sh", "-c", _UNLESS_LATE, str(os.getpid())]


@dataclass(frozen=True, slots=True)
class Child:
    """A process that we have started, which may have ended since."""

    pid: int
    pidfd: int

    async def gone(self, within: float | None = None) -> None:
        """Return when it has ended. Raises TimeoutError after *within* seconds."""
        loop, seen = asyncio.get_running_loop(), asyncio.Event()
        # asyncio watches a descriptor once: two who wait for the same need one each
        own = os.dup(self.pidfd)
        loop.add_reader(own, seen.set)
        try:
            async with asyncio.timeout(within):
                await seen.wait()
        finally:
            loop.remove_reader(own)
            os.close(own)

    def send(self, number: signal.Signals) -> None:
        """Send it the signal *number*, if it still is."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    async def kill(self) -> None:
        """End it at once, and see that it has ended."""
        self.send(signal.SIGKILL)
        await self.gone()


@asynccontextmanager
async def started(
    words: Sequence[str],
    *,
    lifetime: Lifetime,
    stderr: int,
    directory: Path | None = None,
    hold: Sequence[int] = (),
    terminal: bool = False,
) -> AsyncIterator[Child]:
    """A process of *words*, of which the caller sees to it that it ends as it should.

    The kernel kills one "with-us" when we end, however that is, also when only the thread ends that
    has started it (PR_SET_PDEATHSIG); it must have ended when the block does, and is reaped then.
    One that is "detached" is nobody's child. It inherits the descriptors of *hold*, works in
    *directory*, and has no terminal, nor a process group of ours, but with *terminal*.

    Raises LaunchFailed, and ProcessLookupError for a detached one that has ended already.
    """
    detached = lifetime == "detached"
    prefix = ["/bin/sh", "-c", _ORPHANED, "sh"] if detached else dying_with_us(signal.SIGKILL)
    try:
        process = subprocess.Popen(  # noqa: ASYNC220 - asyncio's kills its child with the loop
            [*prefix, *words],
            cwd=directory,
            stdin=None if terminal else subprocess.DEVNULL,
            stdout=subprocess.PIPE if detached else None if terminal else subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=hold,
            start_new_session=not terminal,
            umask=UMASK,
        )
    except OSError as failed:
        raise LaunchFailed(f"{words[0]}: {failed.strerror or failed}") from failed
    if detached:
        with process:
            pid = int(process.communicate()[0])
    else:
        pid = process.pid
    pidfd = os.pidfd_open(pid)  # one that is our child is not reaped yet, and is found
    try:
        yield Child(pid, pidfd)
    finally:
        os.close(pidfd)
        if not detached:
            process.wait()
