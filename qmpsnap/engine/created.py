"""What `create` gives back: a snapshot as its caller sees it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qmpsnap.engine.roots import Roots
from qmpsnap.store.manifest import Manifest, Storage


class Bytes(msgspec.Struct, frozen=True):
    """Bytes written: *disks* on the local root, *vmstate* as QEMU sent it, *shipped* in all."""

    disks: int
    vmstate: int
    shipped: int


class CopiedDisk(msgspec.Struct, frozen=True):
    """What one disk became, and why; *bytes* were written for it.

    *encryption*: the ID of the key that its image is encrypted with, None if it is not.
    """

    level: str
    reason: str
    means: str
    bytes: int
    encryption: str | None = None


class Created(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot as `create --json` tells it. *ram_reason* says why it came to be that mode.

    *encryption*: the ID of the key that the store half is encrypted with, None if it is not.
    """

    id: str
    vm: str
    level: str
    ram: str
    ram_reason: str
    quiesce: str
    pause_ms: float
    frozen_ms: float | None
    local: str
    store: str
    bytes: Bytes
    revision: int
    state: str
    disks: dict[str, CopiedDisk] = {}
    encryption: str | None = None


def created(roots: Roots, half: Storage, manifest: Manifest, *, shipped: int | None) -> Created:
    """Both halves in one; *shipped* is None while the store half waits in the spool."""
    written = {
        disk.device: Path(disk.overlay).stat().st_size if disk.overlay else disk.bytes_written
        for disk in half.disks
    }
    return Created(
        id=half.id,
        vm=half.vm,
        level=half.level,
        ram=manifest.ram.mode,
        ram_reason=manifest.ram.reason,
        quiesce=manifest.quiesce,
        pause_ms=manifest.pause_ms,
        frozen_ms=manifest.frozen_ms,
        local=str(roots.local.snapshot(half.vm, half.id)),
        store=str(roots.store.root.snapshot(half.vm, half.id)),
        bytes=Bytes(
            disks=sum(written.values()), vmstate=manifest.ram.raw_bytes, shipped=shipped or 0
        ),
        revision=half.revision,
        state="shipping" if shipped is None else "paired",
        disks={
            disk.device: CopiedDisk(
                disk.level, disk.reason, disk.means, written[disk.device], disk.chain[0].key
            )
            for disk in half.disks
        },
        encryption=manifest.key,
    )
