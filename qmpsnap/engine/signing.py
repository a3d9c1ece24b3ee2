"""What was shipped without a signature, signed now: only what this host can tell for its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Literal

import msgspec

from qmpsnap.engine import listing
from qmpsnap.engine.capture import Report
from qmpsnap.engine.roots import Roots, claimant, judge
from qmpsnap.errors import (
    Blocked,
    DamagedData,
    DigestMismatch,
    HalfMissing,
    SnapError,
    StoreError,
    Unsigned,
)
from qmpsnap.host import lock
from qmpsnap.store import local
from qmpsnap.store.catalogue import Entry
from qmpsnap.store.files import digest_bytes
from qmpsnap.store.layout import MANIFEST
from qmpsnap.store.manifest import Manifest, decode
from qmpsnap.store.remote import Store
from qmpsnap.store.signature import KeyId
from qmpsnap.store.wire import EXTRA


class Signing(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot that is signed with *key*: now, or it was already, or it would be (a dry run).

    *vouched*: by the `local half` of this host, or by whoever has said `--insecure unsigned`.
    """

    vm: str
    id: str
    outcome: Literal["signed", "would be signed", "was signed"]
    key: KeyId
    vouched: Literal["local half", "insecure"] | None = None


async def sign(
    roots: Roots, vm: str, words: Sequence[str] | None, report: Report, *, dry_run: bool = False
) -> tuple[list[Signing], list[SnapError]]:
    """Sign the store halves that *words* mean, or all of *vm* that are not signed.

    Each is read whole and compared with its digests, and has to be what the local half here names;
    where there is none, `insecure` has to have the reason `unsigned`. What could not be signed, and
    why, comes second. Raises SnapshotUnknown, VmBusy, StoreRefused, StoreError, KeyRefused.
    """
    if words is None:
        there = await listing.entries(roots, vm)
        wanted = [one for one in there if _unsigned(one)]
    else:
        wanted = [await listing.find(roots, vm, word) for word in words]
    if not wanted:
        return [], []
    done: list[Signing] = []
    refused: list[SnapError] = []
    async with lock.held(roots.local.lock(vm), "keys sign"):
        await judge(roots)
        await asyncio.to_thread(roots.keyring.ready)
        trusting = partial(roots.keyring.trust, ["unsigned"])
        store = roots.store
        mild = Store(store.root, store.within, command=store.command, trust=trusting)
        async with mild.lasting() as asked:  # a pack that several need is read once
            for entry in wanted:
                try:
                    done.append(await _one(roots, asked, entry, report, dry_run=dry_run))
                except StoreError as away:
                    refused.append(away)
                    break
                except SnapError as trouble:
                    refused.append(trouble)
    return done, refused


def _unsigned(entry: Entry) -> bool:
    """Of those that wait in the spool `ship` takes care."""
    signed = entry.signature
    return signed is not None and signed.verdict == "unsigned" and entry.state != "shipping"


async def _one(
    roots: Roots, store: Store, entry: Entry, report: Report, *, dry_run: bool
) -> Signing:
    vm, id, what = entry.vm, entry.id, f"{entry.vm} {entry.id}"
    signed = entry.signature
    if entry.state == "shipping":
        raise Blocked(f"{what} waits in the spool", hint="`qmpsnap ship` signs it")
    if signed is None:
        kind = DamagedData if entry.state == "damaged" else HalfMissing
        raise kind(f"{what} is {entry.state}: {entry.why}")
    if signed.verdict == "trusted":
        return Signing(vm=vm, id=id, outcome="was signed", key=str(signed.key))
    content = (await store.read(vm, id, MANIFEST)).encode()  # refuses what others have signed
    digest = digest_bytes(content)
    manifest = decode(content, Manifest, store.root.manifest(vm, id))
    ours = await asyncio.to_thread(_names, roots, manifest, digest)
    if not ours and "unsigned" not in roots.insecure:
        raise Unsigned(
            f"{what} is not signed, and no local half on this host names it",
            hint="on the host that has taken it, `qmpsnap keys sign`; here, `--insecure unsigned` "
            "signs it whoever has made it",
        )

    def tell(done: int, total: int, which: str) -> None:
        report(f"{id}: {which}", done, total)

    found = await store.verify(vm, id, seal=digest, on_progress=tell)
    if wrong := [one for one in found if one.what != EXTRA]:
        raise DamagedData(f"{what}: {wrong[0].file}: {wrong[0].what}", hint="see `qmpsnap verify`")
    made = await asyncio.to_thread(roots.keyring.sign, content)
    if not dry_run:
        await store.sign(vm, id, made, seal=digest, lease=await claimant(roots, vm))
    return Signing(
        vm=vm,
        id=id,
        outcome="would be signed" if dry_run else "signed",
        key=await asyncio.to_thread(roots.keyring.ready),
        vouched="local half" if ours else "insecure",
    )


def _names(roots: Roots, manifest: Manifest, digest: str) -> bool:
    """Whether a local half here and *manifest* name each other; False when there is none.

    Raises DigestMismatch when there is one, and it goes with another store half; DamagedData.
    """
    facts = next(
        (one for one in local.survey(roots.local, manifest.vm) if one.id == manifest.id), None
    )
    if facts is None or (facts.storage is None and facts.paired is None and not facts.problem):
        return False
    what = f"{manifest.vm} {manifest.id}"
    if facts.problem is not None:
        raise DamagedData(f"{what}: {facts.problem}")
    if facts.storage_blake3 != manifest.storage_blake3:
        raise DigestMismatch(f"{what}: the store half names another local half than this host's")
    if facts.paired is not None and facts.paired.manifest_blake3 != digest:
        raise DigestMismatch(f"{what}: the local half names another store half than the store's")
    return facts.paired is not None
