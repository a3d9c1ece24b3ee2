"""What a series of snapshots of one guest costs, beside a whole zstd stream at each of them."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from scripts.bare import Qmp, synced
from scripts.bare_restore import go_on, piped
from scripts.ram_scene import VM, WISHES, Scene

FLOOR = "zstd -1, whole stream"
OURS = "qmpsnap create"


@dataclass(slots=True)
class Row:
    """One way of doing it: *shipped_bytes* and *seconds* of each snapshot, in their order."""

    qemu: str
    ram_mib: int
    load: str
    way: str
    shipped_bytes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


async def series(it: Scene, load: str, count: int, interval: float) -> list[Row]:
    """*count* snapshots, *interval* seconds of the guest's own work before each but the first."""
    ours, whole = (Row(it.version, it.mib, load, way) for way in (OURS, FLOOR))
    if load != "idle":
        await it.guest.console.run(_command(load), within=20)
    for number in range(count):
        if number:
            await asyncio.sleep(interval)
        # in turns, so that neither is always the one that finds the host busy with the other's
        for row in (ours, whole) if number % 2 else (whole, ours):
            begun = time.monotonic()
            size = await (_created(it) if row is ours else asyncio.to_thread(_whole, it))
            row.seconds.append(time.monotonic() - begun)
            row.shipped_bytes.append(size)
    # what the guest is booted from is stored once, and no part of its state
    manifest = (await it.engine.show(VM)).manifest
    ours.shipped_bytes[0] -= sum({one.blake3: one.bytes for one in manifest.shared}.values())
    if load != "idle":
        # a guest that runs out of memory ends its load first
        await it.guest.console.run("kill -0 $(cat /run/busy.pid)", within=10)
    return [whole, ours]


def _command(load: str) -> str:
    """What the guest does meanwhile: `noise=MIB` rewrites so much over and over, else `busy`.

    `busy` changes one word a page, which compresses to almost nothing.
    """
    if not load.startswith("noise="):
        return f"busy {load}"
    once = f"dd if=/dev/urandom of=/changing bs=1M count={int(load[6:])} conv=notrunc"
    return f"(while {once} 2>/dev/null; do :; done) & echo $! >/run/busy.pid"


async def _created(it: Scene) -> int:
    before = _bytes(it.engine.roots.store.root.path)
    await it.engine.create(it.machine, WISHES)
    return _bytes(it.engine.roots.store.root.path) - before


def _whole(it: Scene) -> int:
    """The same guest, stopped, its stream compressed on the way to the disk."""
    target = it.folder / "whole.zst"
    qmp = Qmp(it.guest.qemu.witness)
    try:
        qmp("stop")
        piped(qmp, ["zstd", "-q", "-1", "-T2", "-c"], target)
        go_on(qmp)
    finally:
        qmp.close()
    synced(target)
    size = target.stat().st_size
    target.unlink()
    return size


def _bytes(root: Path) -> int:
    """Of all files under *root*."""
    found = (Path(at) / name for at, _, names in os.walk(root) for name in names)
    return sum(path.stat().st_size for path in found)
