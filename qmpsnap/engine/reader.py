"""Snapshots as programs read them: what an engine tells without touching a VM."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from qmpsnap.engine import configuration, execution, half, history, listing, owning
from qmpsnap.engine.capture import Report
from qmpsnap.engine.configuration import Configuration
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.spool import MACHINE
from qmpsnap.store.catalogue import Entry
from qmpsnap.store.lease import Standing
from qmpsnap.store.manifest import Storage
from qmpsnap.store.points import read as read_points


def silent(what: str, done: int, total: int) -> None:
    """A report that nobody reads."""


class Reader:
    """What there is between two roots, in both halves and in whatever state."""

    def __init__(self, roots: Roots, report: Report = silent) -> None:
        self.roots = roots
        self._report = report

    async def list(self, vm: str | None = None) -> Sequence[Entry]:
        """Every snapshot of *vm*, or of all VMs, in whatever state it is; oldest first."""
        return await listing.entries(self.roots, vm)

    async def show(self, vm: str, word: str = listing.LATEST) -> half.Pair:
        """Both halves' manifests of one snapshot. Raises SnapshotUnknown, HalfMissing."""
        return await half.open_pair(self.roots, await listing.find(self.roots, vm, word))

    async def rival(self, vm: str) -> Standing | None:
        """The other host that *vm* belongs to on the store, by its lease; None if there is none.

        Also when the store does not tell within five seconds.
        """
        return await owning.rival(self.roots, vm)

    async def revisions(self, vm: str, id: str) -> Sequence[Storage]:
        """The local half of the snapshot *id* at each of its revisions, the RAM's own first."""
        points = await asyncio.to_thread(read_points, self.roots.local, vm)
        return [one.storage for one in points if one.storage.id == id]

    async def captured(self, vm: str, word: str = listing.LATEST) -> Configuration:
        """The machine of one snapshot, as `machine.json` has it.

        Raises SnapshotUnknown, HalfMissing, ManifestError, StoreError.
        """
        entry = await listing.find(self.roots, vm, word)
        pair = await half.open_pair(self.roots, entry)
        return configuration.decode(await pair.read(MACHINE), f"{vm} {entry.id} {MACHINE}")

    async def vmstate(self, vm: str, word: str = listing.LATEST) -> execution.ExecutionState:
        """What is in the execution state of one snapshot: RAM blocks and devices.

        All of the stream is read and checked, but for RAM in packs. Raises SnapshotUnknown,
        Blocked (taken without RAM), HalfMissing, DamagedData, StreamUnknown, StoreError.
        """
        entry = await listing.find(self.roots, vm, word)
        return await execution.read(await half.open_pair(self.roots, entry), self._report)

    async def usage(self, vm: str, word: str = listing.LATEST) -> history.Record:
        """What the VM and its host used at one snapshot, and since the one before.

        Raises SnapshotUnknown, HalfMissing, ManifestError, StoreError.
        """
        entry = await listing.find(self.roots, vm, word)
        used = await history.of_pair(await half.open_pair(self.roots, entry))
        return history.Record(
            vm=vm, id=entry.id, state=entry.state, taken_at=entry.taken_at, usage=used
        )

    async def usages(self, vm: str) -> Sequence[history.Record]:
        """The same of every snapshot of *vm*, oldest first; what cannot be read says why."""
        return await history.history(self.roots, vm)
