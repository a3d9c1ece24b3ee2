"""What many restored guests of one snapshot take of this host's memory."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from qmpsnap.engine.restore import Restoration
from scripts.bare_restore import Form
from scripts.ram_restores import FLOOR, Making, mapped
from scripts.ram_scene import VM, Captured

_MIB = 1 << 20
_RESERVE = 1500  # MiB that the host keeps


@dataclass(slots=True)
class Row:
    """One way of doing it: MiB of each clone by /proc/PID/smaps_rollup.

    *pss_mib* in all, a page that n processes share counting as an nth in each; *own_mib*: the part
    that no file has (what a clone has written, and QEMU's own), *files_mib*: the part of files.
    """

    qemu: str
    ram_mib: int
    way: str
    pss_mib: list[float] = field(default_factory=list)
    own_mib: list[float] = field(default_factory=list)
    files_mib: list[float] = field(default_factory=list)


def affordable(mib: int, count: int) -> int:
    """*mib*, or as many times half of it as *count* guests of that size fit into this host."""
    free = psutil.virtual_memory().available / _MIB - _RESERVE
    # QEMU's own memory comes to that of the guest
    while mib > 256 and (mib * 1.1 + 30) * count > free:
        mib //= 2
    return mib


async def clones(it: Captured, count: int, settle: float) -> list[Row]:
    """*count* at a time, *settle* seconds after the last of them has begun to run."""
    rows = []
    ways: dict[str, Making] = {
        FLOOR: lambda folder: it.whole.form,
        "mapped, bare": functools.partial(mapped, it.whole),
    }
    for way, made in ways.items():
        row = Row(it.version, it.whole.mib, way)
        with contextlib.ExitStack() as stack:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="f", dir=it.folder))
            form = await asyncio.to_thread(made, Path(name))
            pids = [await asyncio.to_thread(_one, it, form, stack) for _ in range(count)]
            await _settled(row, pids, settle)
        rows.append(row)
    row = Row(it.version, it.whole.mib, "qmpsnap, mapped")
    async with contextlib.AsyncExitStack() as both:
        pids = []
        for number in range(count):
            wish = Restoration(it.folder / "c" / str(number))
            ready = await it.engine.prepare_restore(VM, wish, it.id)
            back = await both.enter_async_context(it.engine.restored(ready))
            pids.append(back.process.pid)
        await _settled(row, pids, settle)
    return [*rows, row]


def _one(it: Captured, form: Form, stack: contextlib.ExitStack) -> int:
    if psutil.virtual_memory().available < _RESERVE * _MIB / 2:
        raise MemoryError("this host has no memory for so many clones")
    one = stack.enter_context(it.whole.started(form))
    one.resumed()
    return one.pid


async def _settled(row: Row, pids: list[int], settle: float) -> None:
    await asyncio.sleep(settle)
    # one after the other changes nothing: a page that two share is shared in both's figures
    for kib in map(_rollup, pids):
        row.pss_mib.append(kib["Pss"] / 1024)
        row.own_mib.append(kib["Pss_Anon"] / 1024)
        row.files_mib.append((kib["Pss_File"] + kib["Pss_Shmem"]) / 1024)


def _rollup(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(size.split()[0]) for name, size in (line.split(":") for line in lines)}
