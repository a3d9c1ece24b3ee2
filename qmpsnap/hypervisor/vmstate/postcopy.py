"""A guest that runs before its RAM is there: what QEMU is told for it. `source` plays the source.

QEMU catches the guest at a page that it lacks (userfaultfd), asks for it on the return path, and
lets the guest go on when it has come. At the end all RAM is QEMU's own, and nobody else's.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from qmpsnap.errors import CommandRefused, MigrationFailed
from qmpsnap.hypervisor.abilities import set_capabilities
from qmpsnap.hypervisor.guest.runstate import RunState, query
from qmpsnap.hypervisor.machine.asking import Asking
from qmpsnap.hypervisor.monitor import Monitor, settle
from qmpsnap.hypervisor.vmstate.records import PAGE
from qmpsnap.shield import finish

Ask = Callable[[str, Mapping[str, object]], Awaitable[Any]]
"""Runs one command over some session with QEMU."""

_FDNAME = "qmpsnap-in"
_CAPABILITY = "postcopy-ram"
_LOOK_AGAIN = 0.001  # seconds
_PAUSES_WITHIN = 2.0
_RAM_BLOCK = re.compile(r"\s*(.+?)\s+(\d+ [KMGT]iB)\s+0x[0-9a-f]+ ")


async def trouble(monitor: Monitor) -> str:
    """Why the QEMU that waits there cannot take its pages on demand; empty if it can.

    It is left as it was. Setting the capability is the probe: QEMU then looks at the kernel, its
    privileges, its memory and its devices; 7.2 writes what it found to its stderr only.
    """
    if (size := os.sysconf("SC_PAGE_SIZE")) != PAGE:
        return f"this host's pages are of {size} bytes"
    asking = Asking(monitor)
    if why := huge(await asking.human("info ramblock") or []):
        return why
    for one in await asking.listed("/objects") or []:
        # a page that was thrown away would come back out of the file, and nobody would ask for it
        if one.type == "child<memory-backend-file>":
            return f"memory backend {one.name} is a file"
    try:
        await set_capabilities(monitor, {_CAPABILITY: True})
    except CommandRefused as refused:
        return refused.desc
    finally:
        await finish(settle(monitor, _off), within=20)
    return ""


def huge(said: Iterable[str]) -> str:
    """Which RAM block is of huge pages, of those that `info ramblock` *said*; empty if none is."""
    for line in said:
        found = _RAM_BLOCK.match(line)
        if found is not None and found[2] != f"{PAGE >> 10} KiB":
            return f"RAM block {found[1]} is made of pages of {found[2]}"
    return ""


async def accept(monitor: Monitor, theirs: socket.socket) -> None:
    """Let a QEMU that waits with `-incoming defer -S` load what comes out of *theirs*.

    It is one that has no `trouble` with that. Raises CommandRefused, MonitorLost.
    """
    await set_capabilities(monitor, {"events": True, _CAPABILITY: True})
    await monitor.send_fd(theirs.fileno())
    await monitor.execute("getfd", {"fdname": _FDNAME})
    await monitor.execute("migrate-incoming", {"uri": f"fd:{_FDNAME}"})


async def recovering(urgently: Ask, uri: str) -> None:
    """Let QEMU wait at *uri* for a new source; *urgently* asks it past its main loop.

    That may stand at a missing page. Raises CommandRefused (no source was lost), MonitorLost.
    """
    end = time.monotonic() + _PAUSES_WITHIN
    while True:
        try:
            await urgently("migrate-recover", {"uri": uri})
        except CommandRefused:
            # it may not have seen yet that the old one has gone
            if time.monotonic() > end:
                raise
            await asyncio.sleep(_LOOK_AGAIN * 10)
        else:
            return


async def over(ask: Ask) -> None:
    """All RAM is there: who saves this guest sets what he needs. Raises MonitorLost."""
    with suppress(CommandRefused):
        off = [{"capability": _CAPABILITY, "state": False}]
        await ask("migrate-set-capabilities", {"capabilities": off})


async def paused(monitor: Monitor) -> None:
    """Wait for QEMU to leave `inmigrate`: only then `cont` is one. Raises MigrationFailed."""
    while True:
        state = await query(monitor)
        if state is not RunState.INMIGRATE:
            break
        await asyncio.sleep(_LOOK_AGAIN)  # it takes microseconds, and no event tells
    if state is not RunState.PAUSED:
        raise MigrationFailed(f"after loading its state the guest is {state}, not paused")


async def _off(monitor: Monitor) -> None:
    await set_capabilities(monitor, {_CAPABILITY: False})
