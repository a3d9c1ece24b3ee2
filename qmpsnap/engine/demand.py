"""A snapshot's RAM that comes while its guest runs: what the guest waits for is fetched first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

from qmpsnap.engine.capture import Report
from qmpsnap.engine.half import Pair
from qmpsnap.errors import HalfMissing, LocalFailed, SnapError, StoreError, StoreRefused
from qmpsnap.store import filling, pages
from qmpsnap.store.filling import Span

_ASKED = 64 << 10  # bytes: QEMU asks for a page, and its neighbours are sent with it; no more
_AROUND = 256 << 10  # bytes that are fetched when one of them is waited for
_AGAIN = (0.2, 1.0, 5.0)  # seconds until a store that failed is asked again


class Demand:
    """Page *images* of a snapshot in a folder, being filled. See `vmstate.feed.Pages`.

    A store that does not answer, or is not there, is asked again for as long as it takes: the guest
    stands still at a page that is missing, and goes on when it has come. *on_trouble* is told what
    is the matter, and an empty text when it is no more.
    """

    def __init__(
        self,
        pair: Pair,
        quick: Pair,
        folder: Path,
        near: Sequence[Path],
        on_trouble: Callable[[str], None],
    ) -> None:
        self._pair, self._quick, self._folder, self._near = pair, quick, folder, near
        self._told = on_trouble
        self._blocks = {one.block: n for n, one in enumerate(pair.manifest.ram.images)}
        self._sizes = [one.bytes for one in pair.manifest.ram.images]
        self._images = {one: filling.image(folder, n) for one, n in self._blocks.items()}
        self._done = 0
        self._moved = asyncio.Event()
        self.failed: SnapError | None = None
        """Why there will be no more of them."""
        self._turn = asyncio.Lock()
        self._there: set[tuple[int, int]] = set()

    @property
    def images(self) -> Mapping[str, Path]:
        return self._images

    async def ready(self, block: str, start: int, length: int) -> None:
        """Return once these bytes of *block* are in its image. Raises DamagedData."""
        number = self._blocks[block]
        end = sum(self._sizes[:number]) + start + length
        if length <= _ASKED:
            await self._asked(number, start, length, end)
            return
        while self._done < end:
            if self.failed is not None:
                raise self.failed
            await self._moved.wait()

    async def _asked(self, number: int, start: int, length: int, end: int) -> None:
        for at in range(start // _AROUND * _AROUND, start + length, _AROUND):
            async with self._turn:
                if self._done >= end or (number, at) in self._there:
                    continue
                size = min(_AROUND, self._sizes[number] - at)
                only = [(number, at, size)]
                await self._fetched(self._quick, only.copy, _silent)
                self._told("")
                self._there.add((number, at))

    async def all(self) -> None:
        """Fill the images from their first byte to their last."""

        def tell(what: str, done: int, total: int) -> None:
            self._told("")
            self._reached(done)

        with suppress(SnapError):  # who waits for these pages is told
            await self._fetched(self._pair, self._left, tell)
        self._reached(sum(self._sizes) if self.failed is None else 0)

    def _left(self) -> list[Span]:
        """What is not there yet."""
        found, first = [], 0
        for number, size in enumerate(self._sizes):
            start = min(size, max(0, self._done - first))
            if start < size:
                found.append((number, start, size - start))
            first += size
        return found

    def _reached(self, done: int) -> None:
        self._done = max(self._done, done)
        self._moved.set()
        self._moved = asyncio.Event()

    async def _fetched(
        self, pair: Pair, spans: Callable[[], Sequence[Span]], report: Report
    ) -> None:
        for again in chain(_AGAIN, repeat(_AGAIN[-1])):
            try:
                await _now(pair).fill(self._folder, report, near=self._near, spans=spans())
                break
            except (StoreError, StoreRefused, HalfMissing, LocalFailed, OSError) as dead:
                # a store that is not mounted looks like one that has lost the half; somebody may
                # make room, or let us start processes again
                self._told(str(dead))
                await asyncio.sleep(again)
            except SnapError as failed:
                self.failed = failed
                raise


def _now(pair: Pair) -> Pair:
    """*pair* where it is by now: what was in the spool may have been shipped."""
    if pair.spooled and not pair.roots.local.spool(pair.vm, pair.id).is_dir():
        return replace(pair, spooled=False)
    return pair


@asynccontextmanager
async def coming(
    pair: Pair, folder: Path, on_trouble: Callable[[str], None]
) -> AsyncIterator[Demand]:
    """The page images of *pair* in *folder*, new ones, which fill in the block.

    Raises LocalFailed, DamagedData, StoreError.
    """
    for number, one in enumerate(pair.manifest.ram.images):
        await asyncio.to_thread(filling.hollow, filling.image(folder, number), one.bytes)
    near = await asyncio.to_thread(pages.indexes, pair.roots.local, pair.vm)
    # who waits for a page has a process of the store's own, which is there already
    async with pair.roots.store.lasting() as store:
        quick = replace(pair, roots=replace(pair.roots, store=store))
        # the index is good, before a guest runs
        await _now(quick).fill(folder, _silent, spans=[])
        demand = Demand(pair, quick, folder, [path.parent for path in near], on_trouble)
        task = asyncio.create_task(demand.all())
        try:
            yield demand
        finally:
            task.cancel()
            await asyncio.wait([task])


def _silent(what: str, done: int, total: int) -> None:
    """A report that nobody reads."""
