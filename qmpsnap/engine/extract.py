"""One disk of a snapshot as an image of its own, without a restore: encrypted ones, too."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec

from qmpsnap.engine import export
from qmpsnap.engine.capture import Report
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.unsealing import is_sealed, unsealed
from qmpsnap.errors import UsageError
from qmpsnap.host import qemu_img


class Extracted(msgspec.Struct, frozen=True, kw_only=True):
    """What `export --to --json` prints: the qcow2 *image*, which stands on nothing.

    *disk* is its label. *bytes* are what it takes.
    """

    vm: str
    id: str
    revision: int
    disk: str
    image: str
    virtual_size_bytes: int
    bytes: int


async def extracted(
    roots: Roots, vm: str, word: str, disk: str, revision: int | None, to: Path, report: Report
) -> Extracted:
    """Write the disk *disk* of a snapshot into the new qcow2 *to*; as for `export.exported`.

    Raises as that does, UsageError when *to* is there, and for a disk that is encrypted KeyMissing
    and NotAuthentic; no *to* is left then.
    """
    to = await asyncio.to_thread(_fresh, to)
    found = await export.meant(roots, vm, word, disk, revision)
    chain, size, told = found.chain, found.disk.virtual_size_bytes, f"writing {to.name}"
    await export.unchanged(found)
    if is_sealed(chain):
        await unsealed(vm, chain, roots.secrets, to, told, report)
    else:
        await qemu_img.convert(
            Path(chain[0].path), chain[0].format, to, "qcow2",
            lambda part: report(told, int(part * size), size),
        )  # fmt: skip
    status = await asyncio.to_thread(to.stat)
    return Extracted(
        vm=vm,
        id=found.entry.id,
        revision=found.point.storage.revision,
        disk=found.disk.label,
        image=str(to),
        virtual_size_bytes=size,
        bytes=status.st_blocks * 512,
    )


def _fresh(to: Path) -> Path:
    if os.path.lexists(to):
        raise UsageError(f"{to}: is there already", hint="name a new file")
    return to.absolute()
