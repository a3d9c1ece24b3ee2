"""The only place that runs qemu-nbd: an image served, read-only, for the length of a block."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.child import dying_with_us
from qmpsnap.errors import LocalFailed
from qmpsnap.listening import listens
from qmpsnap.shield import finish

_CLIENTS = 8
_UMASK = 0o177  # the socket is its owner's alone
_GRACE = 5.0  # seconds from SIGTERM to SIGKILL
_LOOK_AGAIN = 0.005  # seconds: nothing tells when the socket is there
_GREETING = b"NBDMAGICIHAVEOPT\0\3"
_NO_THANKS = b"\0\0\0\3IHAVEOPT\0\0\0\2\0\0\0\0"  # NBD_OPT_ABORT
_TAIL = 4096  # bytes of stderr that are kept


@dataclass(frozen=True, slots=True)
class Server:
    """A qemu-nbd at work."""

    _process: Process
    _said: asyncio.Task[str]

    async def ended(self) -> str:
        """Returns when it has ended, which it does not do by itself; says how."""
        code = await self._process.wait()
        said = await asyncio.shield(self._said)
        return f"ended with code {code}" + (f"; it last said: {said}" if said else "")


@asynccontextmanager
async def serving(
    path: Path,
    format: str,
    socket: Path,
    *,
    name: str = "",
    force_share: bool = True,
    binary: str = "qemu-nbd",
    within: float = 30.0,
) -> AsyncIterator[Server]:
    """*path*, and what its header says lies beneath it, is to be read on *socket* for the block.

    As the export *name*, by up to 8 clients at a time. The socket (mode 0600) answers when the
    block begins, within *within* seconds, and is gone after it. The server ends with the block,
    and with us (if we are killed its socket stays). With *force_share* it takes no locks: it keeps
    no QEMU from writing to the files.

    Raises LocalFailed with qemu-nbd's words, and when *socket* is taken.
    """
    _refuse_taken(socket)
    try:
        process = await _started(_arguments(path, format, socket, name, force_share), binary)
    except asyncio.CancelledError:  # asyncio has killed it, maybe with its socket there already
        _remove(socket)
        raise
    assert process.stderr is not None
    said = asyncio.create_task(_last_line(process.stderr))
    server = Server(process, said)
    try:
        await _ready(server, socket, within)
        yield server
    finally:
        await finish(_ended(process, said), within=2 * _GRACE)
        _remove(socket)


def _remove(socket: Path) -> None:
    with suppress(OSError):  # it has done so itself, unless it was killed
        socket.unlink()


def _arguments(path: Path, format: str, socket: Path, name: str, force_share: bool) -> list[str]:
    try:
        block = stat.S_ISBLK(path.stat().st_mode)
    except OSError as failed:
        raise LocalFailed(f"{path}: {failed.strerror}") from failed
    options = {
        "driver": format,
        "force-share": "on" if force_share else "off",
        "file.driver": "host_device" if block else "file",
        "file.filename": str(path.absolute()),
    }
    # QEMU's options end at a comma, unless there are two of them
    image = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())
    return [
        *("--read-only", "--persistent", f"--shared={_CLIENTS}", f"--socket={socket.absolute()}"),
        *([f"--export-name={name}"] if name else []),
        *("--image-opts", image),
    ]


async def _started(arguments: list[str], binary: str) -> Process:
    if shutil.which(binary) is None:
        hint = "qemu-nbd comes with QEMU (Debian: qemu-utils)"
        raise LocalFailed(f"{binary} is missing", hint=hint)
    try:
        # not SIGTERM, after which it would take its socket away: it forgets one that comes while
        # it begins (qemu-nbd.c sets its state after its handler, to 11.1)
        return await asyncio.create_subprocess_exec(
            *(*dying_with_us(signal.SIGKILL), binary, *arguments),
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=PIPE,
            env={**os.environ, "LC_ALL": "C"},
            umask=_UMASK,
            start_new_session=True,
        )
    except OSError as failed:
        raise LocalFailed(f"{binary}: {failed.strerror}") from failed


async def _ready(server: Server, socket: Path, within: float) -> None:
    """Returns once it greets: it listens first, and then opens the images."""
    greeting = asyncio.create_task(_greeted(socket))
    ending = asyncio.create_task(server.ended())
    try:
        async with asyncio.timeout(within):
            await asyncio.wait({greeting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if greeting.done() and greeting.result():
                return
            await ending  # it hung up: then it is about to end
    except TimeoutError:
        raise LocalFailed(f"qemu-nbd: not ready within {within:g} s") from None
    finally:
        for task in (greeting, ending):
            task.cancel()
        await asyncio.gather(greeting, ending, return_exceptions=True)
    said = (await server._said).removeprefix("qemu-nbd: ")
    raise LocalFailed(f"qemu-nbd: {said or ending.result()}")


async def _greeted(socket: Path) -> bool:
    while True:
        try:
            reader, writer = await asyncio.open_unix_connection(socket)
            break
        except OSError:
            await asyncio.sleep(_LOOK_AGAIN)
    try:
        await reader.readexactly(len(_GREETING))
        writer.write(_NO_THANKS)
        await reader.read()  # to its end, or it complains that we did not hear it out
    except (asyncio.IncompleteReadError, OSError):
        return False
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    return True


async def _ended(process: Process, said: asyncio.Task[str]) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_GRACE):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    await said


async def _last_line(stream: asyncio.StreamReader) -> str:
    tail = b""
    while chunk := await stream.read(_TAIL):  # a full pipe would stop the server
        tail = (tail + chunk)[-_TAIL:]
    lines = tail.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _refuse_taken(socket: Path) -> None:
    """A socket that nobody listens on is taken away; anything else is somebody's."""
    try:
        if not stat.S_ISSOCK(socket.lstat().st_mode):
            raise LocalFailed(f"{socket} is there already, and is no socket")
        if listens(socket):
            raise LocalFailed(f"{socket}: somebody listens there already")
        socket.unlink()
    except FileNotFoundError:
        return
    except OSError as failed:
        raise LocalFailed(f"{socket}: {failed.strerror}") from failed
