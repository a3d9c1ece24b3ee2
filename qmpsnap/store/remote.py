"""The store as the engine sees it: a verb each, and none of them touches the store from here."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from qmpsnap.host.filesystem import Filesystem
from qmpsnap.store import wire
from qmpsnap.store.files import Progress
from qmpsnap.store.filling import Filled, Span
from qmpsnap.store.keyring import Trusting
from qmpsnap.store.layout import Id, StoreRoot
from qmpsnap.store.lease import Claimant, Standing
from qmpsnap.store.ramindex import Named
from qmpsnap.store.talk import Talk, understood

T = TypeVar("T")
# -P: whatever lies in the current folder is not imported
_WORKER = (sys.executable, "-P", "-m", "qmpsnap.store.worker")


class Store:
    """The store half's verbs, each in a process of its own.

    *within* is the longest time, in seconds, without any progress: a worker that makes none is
    killed, and left behind if even that does not end it. Cancellation does the same at once.

    *trust* says what a manifest has to be signed with, before anything that it names is read: its
    public keys are all that the worker ever learns of the keys that sign. None asks for no
    signature. *keys* is the folder of those that files are encrypted with: the worker itself reads
    one when it needs it, and no request has a secret in it.

    Each verb raises StoreStalled then, StoreError for the store's own troubles, UsageError for a
    name that is none, and what it says besides; one that reads a manifest, SignatureWrong,
    Unsigned and Foreign.
    """

    def __init__(
        self,
        root: StoreRoot,
        within: float = 30.0,
        *,
        command: Sequence[str] = _WORKER,
        trust: Trusting | None = None,
        keys: Path | None = None,
    ) -> None:
        self.root, self.within, self.command = root, within, tuple(command)
        self.trust, self.keys = trust, keys
        self._talk: Talk | None = None

    async def examine(self) -> Filesystem:
        """The store root's facts; it takes a file. Raises StoreRefused when it is no folder."""
        return await self._ask(wire.Examine(root=str(self.root.path)), Filesystem)

    async def catalogue(
        self, vm: str | None = None, *, on_progress: Progress | None = None
    ) -> wire.Listing:
        """What is on the store, of *vm* or of all VMs; the manifests unread."""
        request = wire.Catalogue(root=self._root(vm), vm=vm)
        return await self._ask(request, wire.Listing, on_progress)

    async def ship(
        self,
        spool: Path,
        vm: str,
        id: Id,
        *,
        device: int | None = None,
        shared: Path | None = None,
        instead: Mapping[str, Named] | None = None,
        anew: Collection[str] = (),
        lease: Claimant | None = None,
        on_progress: Progress | None = None,
    ) -> wire.Shipped:
        """Copy a sealed spool to the store and seal it there; may be broken off and repeated.

        *device* (of `examine`) makes sure that the store is still mounted: else StoreRefused.
        *shared* is the folder that has the files which it shares with other snapshots; *instead* of
        packs that were lost it has those (by the digests of the lost ones), and those *anew* whose
        copies on the store are damaged. Here and below, *lease* says who has to have the VM: it is
        taken for them, or LeaseHeld raised; LeaseLost when another host takes it meanwhile.

        Raises PacksMissing, HalfMissing, ManifestError, DigestMismatch, LocalFailed for the spool.
        """
        request = wire.Ship(
            root=self._root(vm, id), vm=vm, id=str(id), spool=_spelled(spool), device=device,
            shared=_spelled(shared) if shared is not None else None, instead=dict(instead or {}),
            anew=sorted(anew), lease=lease,
        )  # fmt: skip
        return await self._ask(request, wire.Shipped, on_progress)

    async def verify(
        self,
        vm: str,
        id: Id,
        *,
        seal: str | None = None,
        on_progress: Progress | None = None,
    ) -> list[wire.Problem]:
        """Read a whole store half; what is wrong with it, nothing if all is well.

        *seal* here and below is the digest of the manifest that the local half names.
        """
        request = wire.Verify(root=self._root(vm, id), vm=vm, id=str(id), seal=seal)
        return await self._ask(request, list[wire.Problem], on_progress)

    async def glance(
        self,
        vm: str,
        id: Id,
        texts: Sequence[str],
        *,
        whole: Sequence[str] = (),
        seal: str | None = None,
    ) -> wire.Glanced:
        """Small files, checked, and whether the others are there; those in *whole* are read.

        Raises DamagedData.
        """
        request = wire.Glance(
            root=self._root(vm, id), vm=vm, id=str(id), seal=seal, texts=list(texts),
            whole=list(whole),
        )  # fmt: skip
        return await self._ask(request, wire.Glanced)

    async def read(self, vm: str, id: Id, name: str, *, seal: str | None = None) -> str:
        """The text of a small file, checked. Raises DamagedData."""
        request = wire.Read(root=self._root(vm, id), vm=vm, id=str(id), seal=seal, name=name)
        return await self._ask(request, str)

    async def load(
        self,
        vm: str,
        id: Id,
        name: str,
        fd: int,
        *,
        seal: str | None = None,
        on_progress: Progress | None = None,
    ) -> int:
        """Write a file, checked and unpacked, into *fd*; the bytes written are returned.

        *fd* may be a pipe; its reader counts as the store while it takes nothing.

        Raises DamagedData, as a rule before the first byte, and LocalFailed for *fd*.
        """
        request = wire.Load(root=self._root(vm, id), vm=vm, id=str(id), seal=seal, name=name, fd=fd)
        return await self._ask(request, int, on_progress, pass_fds=(fd,))

    async def fetch(
        self,
        vm: str,
        id: Id,
        name: str,
        to: Path,
        *,
        unpack: bool = False,
        seal: str | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Publish a checked copy of a file at the local path *to*.

        Raises DamagedData, and LocalFailed, also when *to* exists with another content.
        """
        request = wire.Fetch(
            root=self._root(vm, id), vm=vm, id=str(id), seal=seal, name=name,
            to=_spelled(to), unpack=unpack,
        )  # fmt: skip
        await self._ask(request, type(None), on_progress)

    async def own(
        self,
        vm: str,
        lease: Claimant,
        act: Literal["look", "rival", "take", "seize", "leave"] = "take",
    ) -> Standing:
        """Whom *vm* belongs to after its lease was taken, seized from whoever has it, or left.

        `rival` tells of others only, and is the cheapest. Raises LeaseHeld.
        """
        request = wire.Own(root=self._root(vm), vm=vm, lease=lease, act=act)
        return await self._ask(request, Standing)

    async def remove(
        self,
        vm: str,
        id: Id,
        *,
        sweep: bool = True,
        waiting: Collection[str] = (),
        lease: Claimant | None = None,
    ) -> None:
        """Delete a store half, its manifest first; nothing to delete is as good.

        Who removes many leaves out the *sweep* for what they shared, and asks for it once.
        *waiting*, as for `sweep`.
        """
        request = wire.Remove(
            root=self._root(vm, id), vm=vm, id=str(id), sweep=sweep, waiting=sorted(waiting),
            lease=lease,
        )  # fmt: skip
        await self._ask(request, type(None))

    async def sign(
        self, vm: str, id: Id, signature: bytes, *, seal: str, lease: Claimant | None = None
    ) -> None:
        """Put *signature* beside the manifest with the digest *seal*. Raises DamagedData."""
        request = wire.Sign(
            root=self._root(vm, id), vm=vm, id=str(id), seal=seal, signature=signature.decode(),
            lease=lease,
        )  # fmt: skip
        await self._ask(request, type(None))

    async def sweep(
        self, vm: str, *, waiting: Collection[str] = (), lease: Claimant | None = None
    ) -> None:
        """Delete what snapshots of *vm* shared, and none needs any more.

        *waiting* are the digests of what spools of this host need: they stay as they are.
        """
        request = wire.Sweep(root=self._root(vm), vm=vm, waiting=sorted(waiting), lease=lease)
        await self._ask(request, type(None))

    async def fill(
        self,
        vm: str,
        id: Id,
        to: Path,
        *,
        near: Sequence[Path] = (),
        spans: Sequence[Span] | None = None,
        seal: str | None = None,
        spool: Path | None = None,
        shared: Path | None = None,
        on_progress: Progress | None = None,
    ) -> Filled:
        """Make the page images of a snapshot in the folder *to*, as `filling.fill` does.

        With *spool* the half is there yet, and those packs in *shared* that the store has not.

        Raises HalfMissing, DigestMismatch, DamagedData, which name what is lost; LocalFailed.
        """
        request = wire.Fill(
            root=self._root(vm, id), vm=vm, id=str(id), seal=seal, to=_spelled(to),
            near=[_spelled(one) for one in near],
            spans=None if spans is None else list(spans),
            spool=None if spool is None else _spelled(spool),
            shared=None if shared is None else _spelled(shared),
        )  # fmt: skip
        return await self._ask(request, Filled, on_progress)

    async def packs(
        self,
        vm: str,
        id: Id,
        spool: Path,
        shared: Path,
        *,
        whole: bool = False,
        on_progress: Progress | None = None,
    ) -> list[wire.Problem]:
        """What is wrong with the RAM of a half that is in the spool yet; *whole*: all is read."""
        request = wire.Packs(
            root=self._root(vm, id), vm=vm, id=str(id), spool=_spelled(spool),
            shared=_spelled(shared), whole=whole,
        )  # fmt: skip
        return await self._ask(request, list[wire.Problem], on_progress)

    async def lost(self, vm: str, packs: Sequence[Named]) -> set[str]:
        """Those of *packs* that are not on the store for *vm*, by their digests, at a glance."""
        request = wire.Lost(root=self._root(vm), vm=vm, packs=list(packs))
        return await self._ask(request, set[str])

    def _root(self, vm: str | None, id: Id | None = None) -> str:
        if vm is not None:
            self.root.vm(vm)  # refuses a name that could lead out of the root
            if id is not None:
                self.root.snapshot(vm, id)
        return str(self.root.path)

    @asynccontextmanager
    async def lasting(self) -> AsyncIterator[Store]:
        """A store whose verbs share one process in the block, one after the other.

        The start of a process costs more than most verbs. After the block each has its own again.
        """
        store = Store(
            self.root, self.within, command=self.command, trust=self.trust, keys=self.keys
        )
        store._talk = Talk(self.command, str(self.root.path), self.within)
        try:
            yield store
        finally:
            talk, store._talk = store._talk, None
            await talk.end()

    async def _ask(
        self,
        request: wire.AnyRequest,
        kind: type[T],
        on_progress: Progress | None = None,
        *,
        pass_fds: tuple[int, ...] = (),
    ) -> T:
        if self.trust is not None:
            trust = await asyncio.to_thread(self.trust)
            request = msgspec.structs.replace(request, trust=trust)
        if self.keys is not None:
            request = msgspec.structs.replace(request, keys=_spelled(self.keys))
        if self._talk is not None and not pass_fds:
            return understood(await self._talk.ask(request, on_progress), kind)
        talk = Talk(self.command, str(self.root.path), self.within, pass_fds=pass_fds)
        try:
            return understood(await talk.ask(request, on_progress), kind)
        finally:
            await talk.end()


def _spelled(path: Path) -> str:
    return str(path.absolute())
