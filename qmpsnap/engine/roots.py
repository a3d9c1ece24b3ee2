"""The two roots of an engine, and this host's name in the manifests."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from qmpsnap.config import LEASE, SHIP_RETRY
from qmpsnap.errors import LeaseHeld, LocalFailed, StoreRefused
from qmpsnap.host import filesystem
from qmpsnap.ids import SnapshotId
from qmpsnap.store import holder, naming
from qmpsnap.store.keyring import Keyring
from qmpsnap.store.layout import LocalRoot
from qmpsnap.store.lease import Claimant, in_words
from qmpsnap.store.remote import Store
from qmpsnap.store.secretring import SecretRing, ring
from qmpsnap.store.separate import refuse_same
from qmpsnap.store.signature import Reason, Trust

# where no root is asked for, and none is given: nothing is ever there (passwd(5), Debian)
NOWHERE = Path("/nonexistent")


@dataclass(frozen=True, slots=True)
class Roots:
    """*allow_local_store*: the store may be on this host's own disks, for a trial.

    *ram_images*: of how many snapshots of a VM, the newest ones, the RAM is kept on the local root,
    or in *ram_images_in*, as a rule a folder in memory (tmpfs), if it has room. *lease*: for how
    many seconds a VM stays this host's on the store after the last that was heard of it there.
    *ship_retry*: for how many seconds a delivery that gets no further is tried again.

    *keys*: the folder of this host's keys, if it is not on the local root. *insecure*: the reasons
    for which a manifest need not be signed with one that is trusted.
    """

    local: LocalRoot
    store: Store
    allow_local_store: bool = False
    ram_images: int = 1
    ram_images_in: Path | None = None
    lease: float = LEASE
    ship_retry: float = SHIP_RETRY
    keys: Path | None = None
    insecure: tuple[Reason, ...] = ()

    @property
    def keyring(self) -> Keyring:
        """The keys of this host."""
        return Keyring(self.keys or self.local.keys, host_id())

    @property
    def placed(self) -> bool:
        """Whether there is a store at all; by its name, it is not looked at."""
        return not self.store.root.path.is_relative_to(NOWHERE)

    @property
    def secrets(self) -> SecretRing:
        """The keys of this host that files are encrypted with."""
        return ring(self.keys or self.local.keys, host_id())

    def trust(self) -> Trust | None:
        """What a manifest has to be signed with, for the store as for a spool; None: nothing.

        Raises as `Keyring.trust`.
        """
        return self.store.trust() if self.store.trust is not None else None


@dataclass(frozen=True, slots=True)
class Judged:
    """The store was looked at: *device* tells later whether it is still mounted.

    *newest* is the newest snapshot that it has of the VM, whichever host has taken it.
    """

    trial: bool
    device: int
    store: filesystem.Filesystem
    newest: SnapshotId | None = None


async def judge(roots: Roots, own: str | None = None, *, dry: bool = False) -> Judged:
    """See that the two roots are two data stores (StoreRefused), and that the store answers.

    The VM *own* is this host's on the store then; *dry*: it could be. Raises LeaseHeld when it is
    another one's; StoreRefused too when a root takes its name for another VM's; StoreError or
    StoreStalled when the store does not answer.
    """
    local = await asyncio.to_thread(_local, roots.local, own)
    newest = None
    async with roots.store.lasting() as asked:
        store = await asked.examine()
        trial = refuse_same(local, store, allow_local=roots.allow_local_store)
        if not trial and roots.keys is not None:
            await asyncio.to_thread(_refuse_on, roots.keys, store.device)
        if own is not None:
            who = await claimant(roots, own)
            standing = await asked.own(own, who, "look" if dry else "take")
            if standing.holder is not None and not standing.ours:
                raise LeaseHeld(f"{own} is not this host's on the store: {in_words(standing)}")
            newest = SnapshotId(standing.newest) if standing.newest else None
    return Judged(trial=trial, device=store.device, store=store, newest=newest)


def refuse_on_store(keys: Path, store: Path) -> None:
    """Raises StoreRefused when the folder *keys* is below the folder *store*, by their names.

    The store is not looked at: it may hang.
    """
    for one in (keys, keys.resolve()):
        if Path(os.path.normpath(one)).is_relative_to(os.path.normpath(store)):
            raise _on_store(keys)


def refuse_key_on_store(path: Path, store: Path) -> None:
    """Raises StoreRefused when the file *path*, a secret key, would be below the folder *store*."""
    for one in (path.absolute(), path.parent.resolve() / path.name):
        if Path(os.path.normpath(one)).is_relative_to(os.path.normpath(store)):
            raise StoreRefused(
                f"{path}: the key would lie on the store, whose files it is to keep secret",
                hint="name a file of this host, or of what you carry it on",
            )


def _refuse_on(keys: Path, device: int) -> None:
    there = next(one for one in (keys, *keys.parents) if one.exists())
    if there.stat().st_dev == device:
        raise _on_store(keys)


def _on_store(keys: Path) -> StoreRefused:
    return StoreRefused(
        f"the keys {keys} would lie on the store, whose files they are to vouch for",
        hint="keep them on this host: `keys` of the configuration",
    )


def _local(root: LocalRoot, vm: str | None) -> filesystem.Filesystem:
    path = root.path
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if vm is not None:
            naming.refuse_alias(root, vm)
    except FileExistsError as odd:
        raise StoreRefused(f"the local root {path} is no folder") from odd
    except OSError as failed:
        raise LocalFailed(f"the local root {path}: {failed.strerror}") from failed
    return filesystem.examine(path)


async def claimant(roots: Roots, vm: str) -> Claimant:
    """This host, as it asks for the lease of *vm*. Raises LocalFailed, ManifestError."""
    return Claimant(
        holder=await asyncio.to_thread(holder.holder, roots.local, host_id()),
        host=os.uname().nodename,
        term_s=roots.lease,
        seen=str(roots.local.rival(vm)),
    )


def host_id() -> str:
    """This host in the manifests: its machine-id (machine-id(5)), else its name."""
    for file in (Path("/etc/machine-id"), Path("/proc/sys/kernel/hostname")):
        try:
            if text := file.read_text().strip():
                return text
        except OSError:
            continue
    return "unknown"


def moment(seconds: float | None = None) -> str:
    """*seconds* since the epoch, or now, as the manifests spell it: ISO 8601, UTC, ms."""
    when = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
