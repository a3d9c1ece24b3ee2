"""Both halves side by side: the only place that says what state a snapshot is in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from qmpsnap.errors import ManifestError
from qmpsnap.store.local import LocalFacts
from qmpsnap.store.manifest import Level, Manifest, decode
from qmpsnap.store.signature import Signed
from qmpsnap.store.wire import Found, Listing

State = Literal["paired", "shipping", "untrusted", "local only", "store only", "damaged"]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot as `list` shows it; what no readable half tells is None.

    *why* explains every state but `paired`. *local* and *spool* say that the folders are there;
    *protected* that `prune` and `delete` leave it alone. *untrusted* is what would be whole, and no
    key vouches for that is trusted here. *signature* is None where there is no manifest.
    *encryption*: the ID of the key that the store half is encrypted with, None if it is not;
    *disk_keys*: those of the copies of disks, as they were taken.
    """

    id: str
    vm: str
    state: State
    taken_at: str | None
    level: Level | None
    ram: str | None
    pause_ms: float | None
    note: str
    why: str
    local: bool
    spool: bool
    host: str | None
    protected: bool = False
    signature: Signed | None = None
    encryption: str | None = None
    disk_keys: list[str] = []


def join(local: Iterable[LocalFacts], store: Listing | None, *, host: str) -> list[Entry]:
    """All snapshots of which anything is there, by VM and then oldest first; none is left out.

    *store* is None when it could not be asked: then nothing is called paired. *host* is ours.
    """
    here = {(facts.vm, facts.id): facts for facts in local}
    there = {(found.vm, found.id): found for found in store.found} if store else {}
    keys = sorted(here.keys() | there.keys())
    return [_entry(key, here.get(key), there.get(key), host, store is not None) for key in keys]


def _entry(
    key: tuple[str, str], local: LocalFacts | None, found: Found | None, host: str, asked: bool
) -> Entry:
    vm, id = key
    manifest, problem = _manifest(found)
    if local is not None and local.problem is not None:
        problem = local.problem
    if problem is not None:
        state: State = "damaged"
        why = problem
    elif local is None:
        state, why = _store_side(manifest, host)
    elif found is None or manifest is None:
        state, why = _unshipped(local, found, asked=asked)
    else:
        state, why = _both(local, manifest, found)
    spooled = local.signed if local is not None else None
    signed = found.signed if found is not None and found.signed is not None else spooled
    state, why = _vouched(state, why, signed, waiting=found is None or found.signed is None)
    storage = local.storage if local is not None else None
    told = manifest or (local.spooled if local is not None else None)
    return Entry(
        id=id,
        vm=vm,
        state=state,
        taken_at=storage.taken_at if storage else told.taken_at if told else None,
        level=storage.level if storage else None,
        ram=told.ram.mode if told else None,
        pause_ms=told.pause_ms if told else None,
        note=told.note if told else "",
        why=why,
        local=local is not None,
        spool=local is not None and local.spool,
        host=storage.host if storage else told.host if told else None,
        protected=local is not None and local.protected,
        signature=signed,
        encryption=told.key if told else None,
        disk_keys=storage.keys if storage else [],
    )


def _vouched(state: State, why: str, signed: Signed | None, *, waiting: bool) -> tuple[State, str]:
    """*state* in the light of who has signed; *waiting*: it is known of the spool only."""
    if signed is None or signed.verdict == "trusted" or state in {"damaged", "local only"}:
        return state, why
    if state == "store only":
        return state, f"{why}; {signed.words}"
    if signed.accepted:
        return state, "; ".join(filter(None, (why, f"{signed.words}, and accepted as it is")))
    if waiting and signed.verdict == "unsigned":
        return state, f"{why}; {signed.words}: `ship` signs it"
    return "untrusted", signed.words


def _manifest(found: Found | None) -> tuple[Manifest | None, str | None]:
    """The store half's manifest, or what is wrong with it."""
    if found is None or (found.manifest is None and found.problem is None):
        return None, None
    if found.manifest is None:
        return None, found.problem
    path = Path(found.vm, found.id, "manifest.json")
    try:
        manifest = decode(found.manifest.encode(), Manifest, path)
    except ManifestError as wrong:
        return None, f"store half: {wrong}"
    if (manifest.vm, manifest.id) != (found.vm, found.id):
        return None, f"store half: is the manifest of {manifest.vm} {manifest.id}"
    return manifest, None


def _store_side(manifest: Manifest | None, host: str) -> tuple[State, str]:
    if manifest is None:
        return "damaged", "the store half is not sealed, and there is no local half here"
    if manifest.host != host:
        return "store only", f"the local half is on the host {manifest.host}"
    return "store only", "the local half is gone from this host"


def _unshipped(local: LocalFacts, found: Found | None, *, asked: bool) -> tuple[State, str]:
    """There is a local half, and no sealed store half that we know of."""
    if local.storage is None:
        return "damaged", "the local half is not sealed: its capture is under way or was cut off"
    if local.spooled is not None:
        if wrong := _mismatch(local, local.spooled):
            return "damaged", f"spool: {wrong}"
        if not asked:
            return "shipping", "the store could not be asked; the store half is in the spool"
        return "shipping", "the store half waits in the spool"
    if local.paired is not None:
        if not asked:
            return "local only", f"the store could not be asked; shipped {local.paired.shipped_at}"
        return "damaged", f"the store half that was shipped {local.paired.shipped_at} is gone"
    if found is not None:
        return "local only", "the store half is not sealed, and there is no spool to finish it"
    if local.spool:
        return "local only", "the spool is not sealed: the store half was never finished"
    return "local only", "there is no store half"


def _both(local: LocalFacts, manifest: Manifest, found: Found) -> tuple[State, str]:
    """There is a local half and a sealed store half: each has to name the other."""
    if local.storage is None:
        return "damaged", "the store half is sealed, and the local half is not"
    if wrong := _mismatch(local, manifest):
        return "damaged", wrong
    if local.paired is not None:
        if local.paired.manifest_blake3 != found.manifest_blake3:
            return "damaged", "the local half names another store half"
        return "paired", ""
    if local.spooled is not None and local.spooled_blake3 != found.manifest_blake3:
        return "damaged", "the spool holds another store half than the store"
    if local.spool:
        return "shipping", "shipped, and the local half has yet to note it"
    return "damaged", "the local half does not name the store half"


def _mismatch(local: LocalFacts, manifest: Manifest) -> str | None:
    if (manifest.vm, manifest.id) != (local.vm, local.id):
        return f"is the manifest of {manifest.vm} {manifest.id}"
    if manifest.storage_blake3 != local.storage_blake3:
        return "the store half names another local half"
    return None
