"""Which snapshots there are, and which one a word on the command line means."""

from __future__ import annotations

import asyncio
import logging

from qmpsnap.engine.roots import Roots, host_id
from qmpsnap.errors import SnapshotUnknown, StoreError, StoreRefused
from qmpsnap.store import local
from qmpsnap.store.catalogue import Entry, join
from qmpsnap.store.wire import Listing

log = logging.getLogger(__name__)
LATEST = "latest"
_WHOLE = {"paired", "shipping", "untrusted"}


async def entries(roots: Roots, vm: str | None = None) -> list[Entry]:
    """Both roots side by side. A store that does not answer leaves nothing called paired."""
    trust = await asyncio.to_thread(roots.trust)
    looking = asyncio.to_thread(local.survey, roots.local, vm, trust=trust)
    here, there = await asyncio.gather(looking, _there(roots, vm))
    return join(here, there, host=host_id())


async def _there(roots: Roots, vm: str | None) -> Listing | None:
    try:
        return await roots.store.catalogue(vm)
    except (StoreError, StoreRefused) as dead:
        log.warning("the store could not be asked: %s", dead)
        return None


async def find(roots: Roots, vm: str, word: str = LATEST) -> Entry:
    """The snapshot that *word* means: an ID, a unique beginning of one, or `latest`.

    `latest` is the newest that is whole (paired or shipping), or would be so if it were trusted:
    who takes a signature away does not make an older one be taken. Raises SnapshotUnknown.
    """
    there = await entries(roots, vm)
    if word == LATEST:
        whole = [one for one in there if one.state in _WHOLE]
        if not whole:
            raise SnapshotUnknown(f"{vm} has no whole snapshot")
        return whole[-1]
    matching = [one for one in there if one.id.startswith(word)]
    if len(matching) != 1:
        many = ", ".join(one.id for one in matching) or "none"
        raise SnapshotUnknown(f"{word!r} means no single snapshot of {vm}: {many}")
    return matching[0]
