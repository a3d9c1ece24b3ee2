"""Which host a VM belongs to on the store, as an operator asks, or says."""

from __future__ import annotations

from typing import Literal

from qmpsnap.engine.roots import Roots, claimant, judge
from qmpsnap.host import lock
from qmpsnap.store.lease import Standing

Act = Literal["look", "take", "seize", "leave"]


async def own(roots: Roots, vm: str, act: Act) -> Standing:
    """As `Store.own`, on a store that was seen to be one. Raises LeaseHeld, StoreError, VmBusy."""
    if act == "look":
        return await roots.store.own(vm, await claimant(roots, vm), act)
    async with lock.held(roots.local.lock(vm), "lease"):
        await judge(roots)
        return await roots.store.own(vm, await claimant(roots, vm), act)
