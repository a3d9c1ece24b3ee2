"""Pages that come while a guest runs: a store that fails on the way is asked for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from qmpsnap.engine import demand
from qmpsnap.engine.capture import Report
from qmpsnap.engine.demand import Demand
from qmpsnap.engine.half import Pair
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import HalfMissing, LocalFailed, StoreError, StoreRefused
from qmpsnap.store.filling import Filled, Span
from qmpsnap.store.layout import LocalRoot, StoreRoot
from qmpsnap.store.manifest import FileEntry, RamImage
from qmpsnap.store.remote import Store
from tests.rig.halves import ID, manifest, storage

MIB = 1 << 20


@dataclass(frozen=True)
class Failing(Pair):
    """A store that tells of some of what it has done, *until* bytes of all RAM, and then fails."""

    until: list[int] = field(default_factory=list)
    asked: list[list[Span]] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)

    async def fill(
        self,
        to: Path,
        report: Report,
        *,
        near: Sequence[Path] = (),
        spans: Sequence[Span] | None = None,
    ) -> Filled:
        self.asked.append(list(spans or ()))
        if self.until:
            report("filling RAM", self.until.pop(0), 8 * MIB)
            raise self.failures.pop(0)
        return Filled(near_bytes=0, pack_bytes=0)


async def test_what_is_there_is_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(demand, "_AGAIN", (0.0,))
    sealed = manifest([FileEntry(name="vmstate/ram.index", bytes=1, blake3="cd" * 32)], "ab" * 32)
    blocks = [("pc.ram", 4 * MIB), ("vga", MIB), ("m1", 3 * MIB)]
    images = [RamImage(block=name, bytes=size, stored_pages=1) for name, size in blocks]
    ram = msgspec.structs.replace(sealed.ram, index="vmstate/ram.index", images=images)
    roots = Roots(LocalRoot(tmp_path), Store(StoreRoot(tmp_path)))
    pair = Failing(
        roots, "web", ID, storage(), msgspec.structs.replace(sealed, ram=ram, version=2), "", False,
        until=[0, 3 * MIB, 2 * MIB, 4 * MIB, 6 * MIB],
        failures=[
            StoreError("does not answer"), HalfMissing("not mounted"), LocalFailed("no space"),
            OSError("no process"), StoreRefused("another one"),
        ],
    )  # fmt: skip
    told: list[str] = []
    images_coming = Demand(pair, pair, tmp_path, [], told.append)
    await images_coming.all()
    assert images_coming.failed is None
    whole = [(0, 0, 4 * MIB), (1, 0, MIB), (2, 0, 3 * MIB)]
    rest = [(0, 3 * MIB, MIB), *whole[1:]]
    # what had been told of once stays told
    troubles = ["does not answer", "not mounted", "no space", "no process", "another one"]
    assert [one for one in told if one] == troubles
    assert pair.asked == [whole, whole, rest, rest, whole[1:], [(2, MIB, 2 * MIB)]]
    await images_coming.ready("m1", 0, 3 * MIB)
