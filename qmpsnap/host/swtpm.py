"""The only place that starts a swtpm, and sees to it that it ends with the machine it is for."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from qmpsnap.child import UMASK, Child, Lifetime, started
from qmpsnap.errors import Blocked, LaunchFailed, LocalFailed
from qmpsnap.shield import finish

_GRACE = 5.0  # seconds that it has for ending once QEMU has gone


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
async def serving(wanted: Wanted, *, log: Path, lifetime: Lifetime) -> AsyncIterator[None]:
    """A swtpm that QEMU can connect to when the block begins; its stderr goes to *log*.

    It ends with the QEMU that has connected, also when that is killed. "with-us" ends with the
    block and with our process too; "detached" outlives a block that ends well.

    Raises Blocked when there is none, LaunchFailed when it does not start, LocalFailed.
    """
    if why := missing():
        raise Blocked(why, hint="install it (Debian: swtpm)")
    async with AsyncExitStack() as stack:
        with _listening(wanted.socket) as listener, _appending(log) as stderr:
            process = started(
                wanted.argv(f"fd={listener.fileno()}"),
                lifetime=lifetime,
                stderr=stderr.fileno(),
                hold=[listener.fileno()],
            )
            try:
                child = await stack.enter_async_context(process)
            except ProcessLookupError:
                raise LaunchFailed(f"swtpm ended at once: {_last_word(log)}") from None
        try:
            yield
        except BaseException:
            await finish(_ended(child, wait=0.0), within=20)
            raise
        else:
            if lifetime == "with-us":
                await finish(_ended(child, wait=_GRACE), within=20)
        finally:
            if lifetime == "with-us":
                wanted.socket.unlink(missing_ok=True)


def _listening(path: Path) -> socket.socket:
    # We listen before it starts, so that nobody has to try again until the socket is there.
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(UMASK)
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


def _last_word(log: Path) -> str:
    return "".join(log.read_text(errors="replace").splitlines()[-1:])


async def _ended(child: Child, *, wait: float) -> None:
    """It goes by itself when QEMU has gone, within *wait* seconds, or is killed."""
    try:
        await child.gone(within=wait)
    except TimeoutError:
        await child.kill()
