"""The engine as programs use it: one method a verb, many VMs in one event loop, no global state."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from qmpsnap.config import LEASE, SHIP_RETRY
from qmpsnap.engine import (
    boot,
    clones,
    copies,
    create,
    delete,
    export,
    extract,
    fitness,
    info,
    listing,
    merge,
    offline,
    owning,
    protect,
    prune,
    recover,
    refresh,
    restore,
    retention,
    revive,
    ship,
    signing,
    thaw,
    verify,
)
from qmpsnap.engine.capture import Report
from qmpsnap.engine.created import Created
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.plan import Plan
from qmpsnap.engine.protect import Protection
from qmpsnap.engine.reader import Reader, silent
from qmpsnap.engine.roots import Roots, host_id, refuse_key_on_store, refuse_on_store
from qmpsnap.engine.verify import Verified
from qmpsnap.engine.wishes import Copying, Quiesce, Wishes
from qmpsnap.errors import MonitorAbsent, NotShipped, SnapError, UsageError, VmUnknown
from qmpsnap.host import lock
from qmpsnap.hypervisor.guest.quiesce import MAX_FREEZE
from qmpsnap.hypervisor.monitor import connect
from qmpsnap.store.keyring import Key, Keyring
from qmpsnap.store.layout import LocalRoot, StoreRoot
from qmpsnap.store.lease import Standing
from qmpsnap.store.points import read as read_points
from qmpsnap.store.remote import Store
from qmpsnap.store.secretring import SecretRing
from qmpsnap.store.signature import reasons

log = logging.getLogger(__name__)


class Engine(Reader):
    """Paired snapshots between a *local* root and a *store* root.

    *store_within* is the longest time, in seconds, that the store may make no progress.
    *allow_local_store* is for trials: it takes a store that is no network file system.
    *ram_images*: of how many snapshots of a VM, the newest ones, the RAM is kept on the local root
    as well, from where it comes back at once; with *ram_images_in* its pages lie in that folder.
    *lease*: for how many seconds a VM stays this host's on the store after its last work there.
    *ship_retry*: for how many seconds a delivery that gets no further is tried again.
    *keys* is the folder of this host's keys; without, it is `.keys` on the local root. A store half
    that none of them vouches for is refused, unless *insecure* names the reason: `unsigned`, or
    `foreign` (signed with a key that is not trusted here).
    *report* is called with what is going on, bytes done, bytes in all.

    Raises UsageError for another reason, StoreRefused for keys that would lie on the store.
    """

    def __init__(
        self,
        local: Path,
        store: Path,
        *,
        allow_local_store: bool = False,
        store_within: float = 30.0,
        ram_images: int = 1,
        ram_images_in: Path | None = None,
        lease: float = LEASE,
        ship_retry: float = SHIP_RETRY,
        keys: Path | None = None,
        insecure: Collection[str] = (),
        report: Report = silent,
    ) -> None:
        try:
            accepted = reasons(insecure)
        except ValueError as odd:
            raise UsageError(f"insecure: {odd}") from odd
        here, there = LocalRoot(local.absolute()), StoreRoot(store.absolute())
        folder = keys.absolute() if keys else here.keys
        refuse_on_store(folder, there.path)
        roots = Roots(
            here,
            Store(
                there,
                store_within,
                trust=partial(Keyring(folder, host_id()).trust, accepted),
                keys=folder,
            ),
            allow_local_store,
            ram_images,
            ram_images_in.absolute() if ram_images_in else None,
            lease,
            ship_retry,
            folder if keys else None,
            accepted,
        )
        super().__init__(roots, report)

    @property
    def keys(self) -> Keyring:
        """The keys of this host: those that are trusted here, and the one that signs.

        Its methods read and write files; call them in a thread.
        """
        return self.roots.keyring

    @property
    def secrets(self) -> SecretRing:
        """The keys of this host that files are encrypted with. Call its methods in a thread."""
        return self.roots.secrets

    def export_secret(self, to: Path, key: str | None = None) -> Key:
        """Write a key that files are encrypted with to the new file *to*, for another host.

        It is the one called *key*, else the one that encrypts now, made if there is none. Blocks.
        Raises StoreRefused for a file on the store, and as `SecretRing.exported`.
        """
        refuse_key_on_store(to, self.roots.store.root.path)
        return self.roots.secrets.exported(to, key)

    async def plan(self, machine: Machine, wishes: Wishes | None = None) -> Plan:
        """What `create` would do now, nothing done. Raises Refused."""
        return await create.planned(self.roots, machine, wishes or Wishes())

    async def create(self, machine: Machine, wishes: Wishes | None = None) -> Created:
        """Take a paired snapshot of a running VM.

        Raises Refused (nothing touched), Failed (the guest is as before, nothing lost),
        NotShipped (whole in the spool), GuestNeedsHelp.
        """
        return await create.create(self.roots, machine, wishes or Wishes(), self._report)

    async def ship(
        self, vm: str | None = None
    ) -> tuple[Sequence[ship.Delivered], Sequence[NotShipped]]:
        """Deliver what waits in the spools; what could not be delivered, and why, comes second."""
        return await ship.ship_all(self.roots, vm, self._report)

    async def sign(
        self, vm: str, words: Sequence[str] | None = None, *, dry_run: bool = False
    ) -> tuple[Sequence[signing.Signing], Sequence[SnapError]]:
        """Sign what was shipped unsigned: what *words* mean, or all of *vm*.

        Each is read and compared with its digests, and has to be what the local half here names;
        where there is none, *insecure* has to have `unsigned`. What could not be signed, and why,
        comes second. Raises SnapshotUnknown, VmBusy, StoreRefused, StoreError, KeyRefused.
        """
        return await signing.sign(self.roots, vm, words, self._report, dry_run=dry_run)

    async def lease(
        self, vm: str, act: Literal["look", "take", "seize", "leave"] = "look"
    ) -> Standing:
        """Which host *vm* belongs to on the store, after its lease was taken, seized or left.

        Whoever writes for *vm* takes it by itself; *seize* is for a host that is gone for good, as
        it stops that one if it is not. Raises LeaseHeld, StoreRefused, StoreError.
        """
        return await owning.own(self.roots, vm, act)

    async def info(
        self, machine: Machine, *, changes: bool = False, encrypt: bool | None = None
    ) -> info.Info:
        """What can be done with a running VM, and why not; *changes*: what an increment copies.

        *encrypt*: whether copies of its disks are to be encrypted; None: if the last ones are.
        """
        return await info.info(self.roots, machine, changes=changes, sealed=encrypt)

    async def verify(
        self,
        vm: str,
        word: str = listing.LATEST,
        *,
        trial: boot.Trial | None = None,
        machine: Machine | None = None,
    ) -> verify.Verified:
        """Read and check everything of one snapshot; what is wrong comes back as findings.

        With *trial* it is also brought back for a moment, on no network. A running *machine* is
        asked whether its bitmaps match the newest copies.
        """
        return await verify.verify(self.roots, vm, word, self._report, trial, machine)

    def verify_all(
        self, vm: str, *, machine: Machine | None = None
    ) -> AsyncGenerator[Verified, None]:
        """As `verify`, each snapshot of *vm*, oldest first; a pack of RAM is read once.

        Raises SnapshotUnknown when there is none. Close it (`contextlib.aclosing`) to end early.
        """
        return verify.verify_all(self.roots, vm, self._report, machine)

    async def check(
        self, vm: str, wish: restore.Restoration, word: str = listing.LATEST
    ) -> fitness.Fitness:
        """Whether this host can take one snapshot as *wish* says; nothing is started or written.

        What is in the way comes back as rows. Raises SnapshotUnknown, HalfMissing, StoreError.
        """
        return await fitness.check(self.roots, vm, word, wish)

    async def prepare_restore(
        self, vm: str, wish: restore.Restoration, word: str = listing.LATEST
    ) -> restore.Ready:
        """Check one snapshot and this host, and build the images; nothing is started.

        Raises DamagedData, Blocked, UsageError; nothing is left behind then.
        """
        return await restore.prepared(self.roots, vm, word, wish, self._report)

    @asynccontextmanager
    async def restored(
        self, ready: restore.Ready, *, detach: bool = False
    ) -> AsyncIterator[restore.Restored]:
        """The restored machine, running; it ends with the block unless *detach*."""
        async with restore.restored(ready, self._report, detach=detach) as back:
            yield back

    async def prepare_clones(
        self,
        vm: str,
        wish: restore.Restoration,
        count: int,
        word: str = listing.LATEST,
        *,
        keep_macs: bool = False,
    ) -> Sequence[clones.Planned]:
        """As `prepare_restore`, for *count* machines, which share the pages of the snapshot's RAM.

        They are in folders 1, 2... of the one of *wish*. With *keep_macs* their network cards have
        the addresses of the original's.
        """
        return await clones.prepared(
            self.roots, vm, word, wish, count, self._report, keep_macs=keep_macs
        )

    @asynccontextmanager
    async def cloned(
        self, these: Sequence[clones.Planned], *, detach: bool = False
    ) -> AsyncIterator[Sequence[clones.Clone]]:
        """The clones, all of them up; they end with the block unless *detach*.

        Raises what the first one raised that could not be started; none is left then.
        """
        async with clones.cloned(these, self._report, detach=detach) as all_of_them:
            yield all_of_them

    @asynccontextmanager
    async def exported(
        self,
        vm: str,
        disk: str,
        word: str = listing.LATEST,
        *,
        revision: int | None = None,
        socket: Path | None = None,
    ) -> AsyncIterator[export.Export]:
        """One disk of a snapshot (its newest *revision*), served read-only over NBD for the block.

        Raises SnapshotUnknown, UsageError, Blocked for one that is encrypted, DamagedData,
        LocalFailed.
        """
        served = export.exported(self.roots, vm, word, disk, revision, socket)
        async with served as one:
            yield one

    async def extract(
        self,
        vm: str,
        disk: str,
        to: Path,
        word: str = listing.LATEST,
        *,
        revision: int | None = None,
    ) -> extract.Extracted:
        """One disk of a snapshot (its newest *revision*) as the new qcow2 *to*, on nothing.

        Raises SnapshotUnknown, UsageError, KeyMissing, DamagedData, LocalFailed.
        """
        return await extract.extracted(self.roots, vm, word, disk, revision, to, self._report)

    async def delete(self, machine: Machine, word: str) -> delete.Deleted:
        """Remove both halves of one snapshot and fold overlays that nobody needs.

        Raises Refused when restored machines stand on it; StoreError with nothing removed.
        """
        return await delete.delete(self.roots, machine, word)

    async def refresh(
        self,
        machine: Machine,
        word: str = listing.LATEST,
        *,
        copying: Copying | None = None,
        quiesce: Quiesce = Quiesce.AUTO,
        max_pause: float | None = None,
        max_freeze: float = MAX_FREEZE,
        encrypt: bool | None = None,
    ) -> refresh.Refreshed:
        """Make a new revision of the local half of one snapshot; its store half stays as it is.

        *encrypt*: whether its images are encrypted; None: if those of the last revision are.
        Raises SnapshotUnknown, and what `create` raises; the snapshot is as before then.
        """
        return await refresh.refresh(
            self.roots,
            machine,
            word,
            self._report,
            copying=copying,
            quiesce=quiesce,
            max_pause=max_pause,
            max_freeze=max_freeze,
            encrypt=encrypt,
        )

    async def prune(
        self,
        machine: Machine,
        policy: retention.Policy,
        *,
        dry_run: bool = False,
        merging: bool = True,
    ) -> prune.Pruned:
        """Remove the pairs that *policy* does not keep; merge images that only they needed.

        Raises UsageError for a policy without a rule, VmBusy; StoreError when the store went away.
        """
        return await prune.prune(
            self.roots, machine, policy, dry_run=dry_run, merging=merging, report=self._report
        )

    async def protect(self, vm: str, word: str = listing.LATEST, note: str = "") -> Protection:
        """Keep one snapshot from `prune` and `delete`. Raises SnapshotUnknown, HalfMissing."""
        return await protect.protect(self.roots, vm, word, note)

    async def unprotect(self, vm: str, word: str = listing.LATEST) -> Protection:
        """Let one snapshot be pruned and deleted again. Raises SnapshotUnknown."""
        return await protect.unprotect(self.roots, vm, word)

    async def thaw(self, machine: Machine) -> int | None:
        """Thaw the guest's file systems whoever froze them; how many were. Raises AgentError."""
        return await thaw.thaw(machine)

    async def recover(
        self, machine: Machine, *, not_restarted: bool = False
    ) -> Sequence[recover.Recovered]:
        """Settle what a crashed engine still owed this VM, and sweep what it left half-done.

        Guests of its snapshots that wait for RAM which nobody brings any more get it again.
        *not_restarted*: QEMU has ended and was not started since, says the caller; only asked for
        where QEMU and the engine ended together while an overlay was being folded back.

        Raises VmBusy, MonitorAbsent, Failed.
        """
        # what an engine at work has in its journal is not owed yet
        async with lock.held(self.roots.local.lock(machine.name), "recover"):
            revived = await revive.revived(self.roots, machine.name)
            try:
                async with connect(machine.socket) as monitor:
                    settled = await recover.recover(self.roots, machine, monitor)
            except (MonitorAbsent, VmUnknown) as absent:
                settled = await offline.settle_offline(
                    self.roots, machine, not_restarted=not_restarted
                )
                if not settled and not revived:
                    raise
                log.info("%s; its disks were settled without QEMU", absent)
            await ship.tidied(self.roots, machine.name)
            points = await asyncio.to_thread(read_points, self.roots.local, machine.name)
            await asyncio.to_thread(merge.finish, points, self._report)
            await copies.digested(self.roots, machine.name, self._report)
            return [*revived, *settled]
