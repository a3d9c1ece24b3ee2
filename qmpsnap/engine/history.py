"""What a VM used at each of its snapshots, as far as the store half of each can be read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from qmpsnap.engine import half, listing, usage
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.spool import USAGE
from qmpsnap.engine.usage import Usage
from qmpsnap.errors import SnapError
from qmpsnap.store import local
from qmpsnap.store.catalogue import Entry, State

_AT_A_TIME = 4  # each is a process of the store's worker


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The usage of one snapshot; None with the reason *why* where it cannot be read."""

    vm: str
    id: str
    state: State
    taken_at: str | None
    usage: Usage | None
    why: str = ""


async def history(roots: Roots, vm: str) -> list[Record]:
    """Every snapshot of *vm*, oldest first. One that cannot be read does not hide the others."""
    return await _records(roots, await listing.entries(roots, vm))


async def earlier(roots: Roots, vm: str, id: str, most: int = 20) -> list[Usage]:
    """What *vm* used at the *most* newest snapshots before *id*, as far as it can be read."""
    before = [one for one in await listing.entries(roots, vm) if one.id < id][-most:]
    found = await _records(roots, before)
    return [record.usage for record in found if record.usage is not None]


async def of_pair(pair: half.Pair) -> Usage:
    """The usage of one snapshot. Raises HalfMissing, ManifestError, StoreError."""
    return usage.decode(await pair.read(USAGE), f"{pair.vm} {pair.id} {USAGE}")


async def _records(roots: Roots, entries: Sequence[Entry]) -> list[Record]:
    gate = asyncio.Semaphore(_AT_A_TIME)

    async def one(entry: Entry) -> Record:
        async with gate:
            return await _record(roots, entry)

    return list(await asyncio.gather(*map(one, entries)))


async def _record(roots: Roots, entry: Entry) -> Record:
    read, why = None, entry.why
    try:
        if entry.state == "shipping":
            read = await of_pair(await half.open_pair(roots, entry))
        elif entry.state in {"paired", "store only"}:
            paired = None
            if entry.local:
                paired = await asyncio.to_thread(local.read_paired, roots.local, entry.vm, entry.id)
            seal = paired.manifest_blake3 if paired else None
            text = await roots.store.read(entry.vm, entry.id, USAGE, seal=seal)
            read = usage.decode(text, f"{entry.vm} {entry.id} {USAGE}")
    except SnapError as failed:
        why = str(failed)
    return Record(
        vm=entry.vm, id=entry.id, state=entry.state, taken_at=entry.taken_at, usage=read,
        why=why if read is None else "",
    )  # fmt: skip
