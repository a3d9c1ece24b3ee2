"""Merging images that are encrypted: what they hold goes into a new one, never in the clear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qmpsnap.errors import LocalFailed
from qmpsnap.host.priority import stoppable
from qmpsnap.store import sealed
from qmpsnap.store.digests import point_of
from qmpsnap.store.files import Progress
from qmpsnap.store.manifest import Image
from qmpsnap.store.sealed import opened_sealed
from qmpsnap.store.sealedchain import SealedChain, same
from qmpsnap.store.sealedimages import opened_chain, role
from qmpsnap.store.secret import Keys


async def resealed(
    vm: str,
    images: Sequence[Image],
    beneath: Image | None,
    new: Path,
    keys: Keys,
    on_progress: Progress,
) -> None:
    """Make *new* hold what *images* of *vm* hold, top first, which stand on *beneath*.

    It is written to take the top one's place, with its key. It is durable, and was read back, and
    compared with all of them. Raises LocalFailed, KeyMissing, NotAuthentic, BaseChanged.
    """

    def work(stop: Callable[[], bool]) -> None:
        _resealed(vm, images, beneath, new, keys, on_progress, stop)

    await stoppable(work)


def _resealed(
    vm: str,
    images: Sequence[Image],
    beneath: Image | None,
    new: Path,
    keys: Keys,
    on_progress: Progress,
    stop: Callable[[], bool],
) -> None:
    top, place = images[0], role(vm, Path(images[0].path))
    assert top.key is not None

    def on_bytes(_: int) -> None:
        if stop():
            raise LocalFailed(f"{new}: broken off")

    with opened_chain(vm, images, beneath, keys) as old:
        sealed.write(
            new,
            secret=keys(top.key),
            role=place,
            virtual_size=old.virtual_size,
            on=point_of(Path(beneath.path).parent) if beneath is not None else "",
            extents=old.extents(zeros=beneath is not None),
            read=old.read,
            compress=old.compressed,
            reserve=0,
            limit=None,
            cancelled=stop,
            on_progress=on_progress,
        )
        with opened_sealed(new, keys, place, top.key) as one:
            if not same(SealedChain([one]), old, zeros=beneath is not None, on_bytes=on_bytes):
                raise LocalFailed(f"{new}: does not read as {top.path} does: it is not used")
