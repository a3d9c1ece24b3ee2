"""What changed on a frozen disk, asked of QEMU's NBD server: the only place that starts one."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM
from socket import socket as Socket

import msgspec

from qmpsnap.errors import CommandRefused, LocalFailed, MonitorLost, QemuGone, VmBusy
from qmpsnap.hypervisor.monitor import Monitor, settle
from qmpsnap.hypervisor.nbd.client import opened
from qmpsnap.ids import NodeName
from qmpsnap.listening import listens
from qmpsnap.shield import finish

log = logging.getLogger(__name__)
_PREFIX = "qmpsnap-"
_FDNAME = "qmpsnap-nbd"
_DEPTH = "qemu:allocation-depth"
_DIRTY = 1  # NBD_STATE_DIRTY of the contexts qemu:dirty-bitmap:NAME
_CLIENTS = 4
_LOOK_AGAIN = 0.1  # seconds


class _Export(msgspec.Struct, frozen=True):
    id: str


async def changed(
    monitor: Monitor,
    socket: Path,
    node: NodeName,
    *,
    bitmap: tuple[NodeName, str] | None,
    layers: int,
) -> list[tuple[int, int]]:
    """Offset and length of all that differs, sorted, no two of them touching.

    That is what is dirty in *bitmap* (its node and name), and what is allocated in the top
    *layers* images of the chain that begins with *node*, which must be frozen. QEMU serves it on
    *socket* meanwhile, a path that is ours alone; the bitmap is busy until this returns. One call
    at a time a VM.

    Raises VmBusy when this QEMU has an NBD server already, which is not touched; CommandRefused,
    LocalFailed, MonitorLost. However it ends, our export and our server are gone, unless QEMU
    is out of reach: then `broken_off` finds them.
    """
    wanted: list[tuple[str, Callable[[int], bool]]] = []
    if bitmap is not None:
        wanted.append((f"qemu:dirty-bitmap:{bitmap[1]}", lambda flags: bool(flags & _DIRTY)))
    if layers > 0:
        wanted.append((_DEPTH, lambda depth: 1 <= depth <= layers))
    if not wanted:
        return []
    found: list[tuple[int, int]] = []
    async with _exported(monitor, socket, node, bitmap, depth=layers > 0) as name:
        for context, counts in wanted:
            async with opened(socket, name, context) as client:
                told = await client.extents(context)
            found += [(one.start, one.length) for one in told if counts(one.flags)]
    return _united(found)


async def broken_off(monitor: Monitor, socket: Path | None = None) -> bool:
    """End what an engine that died has left of `changed`; whether there was anything.

    The server is stopped where an export of ours was on it, or where it answers on *socket*, the
    path that engine had given: somebody else's is not touched. So is the descriptor that QEMU was
    given for it, if it died before it had made use of it. Raises MonitorLost.
    """
    left = [one for one in await _exports(monitor) if one.startswith(_PREFIX)]
    for one in left:
        await _delete(monitor, one)
    ours = bool(left) or (socket is not None and listens(socket))
    if ours:
        with suppress(CommandRefused):  # it was stopped already
            await monitor.execute("nbd-server-stop")
    with suppress(CommandRefused):  # as a rule the server has taken it
        await monitor.execute("closefd", {"fdname": _FDNAME})
    if socket is not None:
        _remove(socket)
    return ours


@asynccontextmanager
async def _exported(
    monitor: Monitor,
    socket: Path,
    node: NodeName,
    bitmap: tuple[NodeName, str] | None,
    *,
    depth: bool,
) -> AsyncIterator[str]:
    """*node* on a server of ours, under the name given."""
    id = f"{_PREFIX}{secrets.token_hex(4)}"
    arguments: dict[str, object] = {
        "type": "nbd",
        "id": id,
        "node-name": node,
        "name": id,
        "writable": False,
        "allocation-depth": depth,
    }
    if bitmap is not None:
        arguments["bitmaps"] = [{"node": bitmap[0], "name": bitmap[1]}]
    listener = _bound(socket)
    try:
        await _start(monitor, listener)  # from the moment this is sent, a stop is owed
        await monitor.execute("block-export-add", arguments)
        yield id
    finally:
        listener.close()
        await _paid(monitor, socket, id)


async def _start(monitor: Monitor, listener: Socket) -> None:
    # A socket that we have bound, and that QEMU lets listen: it is its owner's alone from the
    # first moment, QEMU needs no right to our folder, and whoever connects to it has reached a
    # server of ours, whether or not we heard the reply.
    try:
        await monitor.send_fd(listener.fileno())
        await monitor.execute("getfd", {"fdname": _FDNAME})
        where = {"type": "fd", "data": {"str": _FDNAME}}
        await monitor.execute("nbd-server-start", {"addr": where, "max-connections": _CLIENTS})
    except CommandRefused as refused:
        with suppress(CommandRefused, MonitorLost):
            await monitor.execute("closefd", {"fdname": _FDNAME})
        if "already running" not in refused.desc:
            raise
        raise VmBusy(
            "somebody else has QEMU's NBD server in use, of which there is one only",
            hint="try again when it is stopped (`nbd-server-stop`); `--level full` needs none",
        ) from refused
    finally:
        # with a copy of ours it would go on listening when QEMU's server has ended
        listener.close()


async def _paid(monitor: Monitor, socket: Path, id: str) -> None:
    try:
        await finish(settle(monitor, partial(_ended, socket=socket, id=id)), within=60)
    except (QemuGone, MonitorLost) as lost:
        if not listens(socket):
            _remove(socket)
            return
        # its socket stays where it is: `broken_off` knows the server by it
        log.warning("the NBD server on %s is left: %s", socket, lost)
    except TimeoutError as late:
        raise MonitorLost(f"{monitor.path}: the NBD server on {socket} does not end") from late


async def _ended(monitor: Monitor, *, socket: Path, id: str) -> None:
    # in this order: when QEMU has answered, a start that it may have read has been carried out
    await _delete(monitor, id)
    if listens(socket):
        with suppress(CommandRefused):  # it was stopped in between
            await monitor.execute("nbd-server-stop")
    _remove(socket)


async def _delete(monitor: Monitor, id: str) -> None:
    """End the export *id*, if there is one, and see it gone: its bitmap is free again."""
    with monitor.listen("BLOCK_EXPORT_DELETED") as events:
        while id in await _exports(monitor):
            with suppress(CommandRefused):  # it is on its way out
                await monitor.execute("block-export-del", {"id": id, "mode": "hard"})
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN):
                    await events.next()


async def _exports(monitor: Monitor) -> list[str]:
    return [one.id for one in await monitor.query("query-block-exports", list[_Export])]


def _bound(path: Path) -> Socket:
    """A socket bound to *path*, mode 0600, that does not listen yet."""
    if listens(path):
        raise VmBusy(
            f"{path}: an NBD server is at work there for another engine",
            hint="try again, or `qmpsnap recover VM` when that engine is no more",
        )
    listener = Socket(AF_UNIX, SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # what it will have in the folder
        path.unlink(missing_ok=True)
        listener.bind(str(path))
    except OSError as failed:
        listener.close()
        raise LocalFailed(f"{path}: {failed.strerror or failed}") from failed
    return listener


def _remove(path: Path) -> None:
    with suppress(OSError):  # QEMU may have done so; a later bind will tell
        path.unlink()


def _united(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """*ranges* in order, those that touch or overlap made one."""
    found: list[tuple[int, int]] = []
    for start, length in sorted(ranges):
        if found and start <= sum(found[-1]):
            first, _ = found[-1]
            found[-1] = first, max(sum(found[-1]), start + length) - first
        else:
            found.append((start, length))
    return found
