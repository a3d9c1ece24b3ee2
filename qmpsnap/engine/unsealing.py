"""Disks whose copies are encrypted, brought back: as images of their own, that stand on nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qmpsnap.engine.capture import Report
from qmpsnap.host.priority import stoppable
from qmpsnap.store import increment
from qmpsnap.store.manifest import Image
from qmpsnap.store.sealedimages import opened_chain
from qmpsnap.store.secret import Keys


def is_sealed(chain: Sequence[Image]) -> bool:
    """Whether the disk *chain*, top first, is encrypted: all of it is, or nothing."""
    return chain[0].key is not None


def needed(vm: str, chain: Sequence[Image], keys: Keys) -> int:
    """The most bytes that the disk *chain* of *vm* takes when it is brought back. Blocks.

    All that tells it is authentic by then. Raises KeyMissing, NotAuthentic, BaseChanged,
    ManifestError, LocalFailed.
    """
    with opened_chain(vm, chain, None, keys) as disk:
        extents = disk.extents(zeros=False)
        return increment.at_most(extents, disk.virtual_size)


async def unsealed(
    vm: str, chain: Sequence[Image], keys: Keys, to: Path, what: str, report: Report
) -> None:
    """Make *to* the disk *chain* of *vm*, a qcow2 that stands on nothing; *what* is told of it.

    Nothing is written that was not authenticated. Raises as `needed`; no *to* is left then.
    """

    def tell(done: int, total: int, _: str) -> None:
        report(what, done, total)

    def work(stop: Callable[[], bool]) -> None:
        with opened_chain(vm, chain, None, keys) as disk:
            increment.write(
                to,
                virtual_size=disk.virtual_size,
                backing=None,
                backing_format="",
                extents=disk.extents(zeros=False),
                read=disk.read,
                reserve=0,
                limit=None,
                cancelled=stop,
                on_progress=tell,
            )

    await stoppable(work)
