"""Which host a VM belongs to on the store, as an operator asks, or says."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Literal

from qmpsnap.engine.roots import Roots, claimant, host_id, judge
from qmpsnap.errors import SnapError
from qmpsnap.host import lock
from qmpsnap.store import holder
from qmpsnap.store.lease import Claimant, Standing

log = logging.getLogger(__name__)
Act = Literal["look", "take", "seize", "leave"]
_WITHIN = 5.0  # seconds; whoever asks besides something else has that to wait for


async def own(roots: Roots, vm: str, act: Act) -> Standing:
    """As `Store.own`, on a store that was seen to be one. Raises LeaseHeld, StoreError, VmBusy."""
    if act == "look":
        return await roots.store.own(vm, await claimant(roots, vm), act)
    async with lock.held(roots.local.lock(vm), "lease"):
        await judge(roots)
        return await roots.store.own(vm, await claimant(roots, vm), act)


async def rival(roots: Roots, vm: str) -> Standing | None:
    """The other host that *vm* belongs to on the store; None when there is none.

    Also when the store does not tell that soon, or there is no store. Nothing is made on this host.
    """
    if not roots.placed:
        return None
    try:
        mine = await asyncio.to_thread(holder.known, roots.local, host_id())
        seen = str(roots.local.rival(vm))
        who = Claimant(holder=mine or "", host=os.uname().nodename, term_s=roots.lease, seen=seen)
        async with asyncio.timeout(_WITHIN):
            standing = await roots.store.own(vm, who, "rival")
    except (SnapError, TimeoutError) as failed:
        log.info("it is not known which host %s belongs to on the store: %s", vm, failed)
        return None
    return None if standing.holder is None or standing.ours else standing
