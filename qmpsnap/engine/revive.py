"""RAM that nobody brings any more, since who did has died: the one place that revives it."""

from __future__ import annotations

import asyncio
import logging

from qmpsnap.engine import arrivals, feeding
from qmpsnap.engine.recover import Recovered
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import SnapError

log = logging.getLogger(__name__)


async def revived(roots: Roots, vm: str) -> list[Recovered]:
    """Every guest of a snapshot of *vm* that waits for its RAM gets it again, in the background.

    What a guest that has ended has left is removed. Done twice, it does nothing. The others are
    tried before it raises why one cannot be helped: GuestLacksPages, DamagedData, StoreError,
    LocalFailed.
    """
    settled, failed = [], None
    for note in await asyncio.to_thread(arrivals.owed, roots.local, vm):
        try:
            one = await asyncio.to_thread(arrivals.read, note)
            if did := await feeding.resumed(roots, note):
                settled.append(Recovered(one.id, (f"{one.folder}: {did}",)))
                log.info("recovered %s %s: %s: %s", vm, one.id, one.folder, did)
        except SnapError as why:
            log.debug("%s: %s", note, why)
            failed = why
    if failed is not None:
        raise failed
    return settled


async def tried(roots: Roots, vm: str) -> None:
    """As `revived`, for a verb that has another purpose: what cannot be helped is a warning."""
    try:
        for one in await revived(roots, vm):
            log.warning("%s %s: %s", vm, one.id, "; ".join(one.did))
    except SnapError as failed:
        log.warning("a guest of %s waits for its RAM: %s", vm, failed)
