"""The only place that starts a swtpm, and sees to it that it ends with the machine it is for."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from qmpsnap.errors import Blocked, LocalFailed
from qmpsnap.shield import finish

_UMASK = 0o177
_GRACE = 5.0  # seconds that it has for ending once QEMU has gone
# Starts "$@" as nobody's child and tells its process id: no zombie of ours when it ends.
_ORPHANED = 'exec 3>&1; "$@" 3>&- >/dev/null & echo $! >&3'


@dataclass(frozen=True, slots=True)
class Wanted:
    """A swtpm for one machine: where QEMU will look for it, and where its state lies.

    *keys*: option and value of each key, as `tpmstate.Swtpm` has them.
    """

    socket: Path
    tpm2: bool
    backend: Literal["dir", "file"]
    place: Path
    keys: Sequence[tuple[str, str]] = ()

    def argv(self, control: str | None = None) -> list[str]:
        """What to run; without *control* it makes the socket by itself."""
        in_folder = self.backend == "dir"
        state = f"dir={self.place},mode=0600" if in_folder else f"backend-uri=file://{self.place}"
        return [
            *("swtpm", "socket", *(["--tpm2"] if self.tpm2 else [])),
            *("--tpmstate", state),
            *("--ctrl", f"type=unixio,{control or f'path={self.socket},mode=0600'}"),
            *(word for option, value in self.keys for word in (f"--{option}", value)),
            "--terminate",  # with the end of the connection, however QEMU ends
        ]


def missing() -> str:
    """Why no swtpm can be started here; empty if one can."""
    return "" if shutil.which("swtpm") else "swtpm is not installed on this host"


@asynccontextmanager
async def serving(
    wanted: Wanted, *, log: Path, lifetime: Literal["with-us", "detached"]
) -> AsyncIterator[None]:
    """A swtpm that QEMU can connect to when the block begins; its stderr goes to *log*.

    It ends with the QEMU that has connected, also when that is killed. "with-us" ends with the
    block and with our process too; "detached" outlives a block that ends well.

    Raises Blocked when there is none, LocalFailed when it does not start.
    """
    if why := missing():
        raise Blocked(why, hint="install it (Debian: swtpm)")
    detached = lifetime == "detached"
    setpriv = shutil.which("setpriv")
    if not detached and setpriv is None:
        raise LocalFailed("setpriv is missing", hint="install the package util-linux")
    prefix = ["/bin/sh", "-c", _ORPHANED, "sh"] if detached else [str(setpriv), "--pdeathsig=KILL"]
    with _listening(wanted.socket) as listener, _appending(log) as stderr:
        try:
            process = subprocess.Popen(  # noqa: ASYNC220 - asyncio's kills its child with the loop
                [*prefix, *wanted.argv(f"fd={listener.fileno()}")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if detached else subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=[listener.fileno()],
                start_new_session=True,
                umask=_UMASK,
            )
        except OSError as failed:
            raise LocalFailed(f"swtpm: {failed.strerror}") from failed
    if detached:
        with process:
            told, _ = process.communicate()
        pidfd = _opened(int(told), log)
    else:
        pidfd = os.pidfd_open(process.pid)
    try:
        yield
    except BaseException:
        await finish(_ended(pidfd, wait=0.0), within=20)
        raise
    else:
        if not detached:
            await finish(_ended(pidfd, wait=_GRACE), within=20)
    finally:
        os.close(pidfd)
        if not detached:
            process.wait()
            wanted.socket.unlink(missing_ok=True)


def _listening(path: Path) -> socket.socket:
    # We listen before it starts, so that nobody has to try again until the socket is there.
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(_UMASK)
    try:
        listener.bind(str(path))
        listener.listen(1)
    except OSError as taken:
        listener.close()
        raise LocalFailed(f"{path}: {taken.strerror or taken}") from taken
    finally:
        os.umask(before)
    return listener


def _appending(log: Path) -> IO[bytes]:
    log.touch(mode=0o600)
    return log.open("ab")


def _opened(pid: int, log: Path) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        lines = log.read_text(errors="replace").splitlines()
        raise LocalFailed(f"swtpm ended at once: {''.join(lines[-1:])}") from None


async def _ended(pidfd: int, *, wait: float) -> None:
    """It goes by itself when QEMU has gone, within *wait* seconds, or is killed."""
    with suppress(TimeoutError):
        async with asyncio.timeout(wait):
            await _gone(pidfd)
            return
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    await _gone(pidfd)


async def _gone(pidfd: int) -> None:
    loop, seen = asyncio.get_running_loop(), asyncio.Event()
    own = os.dup(pidfd)  # asyncio watches a descriptor once
    loop.add_reader(own, seen.set)
    try:
        await seen.wait()
    finally:
        loop.remove_reader(own)
        os.close(own)
