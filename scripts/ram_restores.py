"""How long a captured guest takes to run again: QEMU's own ways, then ours, in the same run."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from qmpsnap.engine.restore import Ready, Restoration
from qmpsnap.hypervisor.machine.cmdline import parse
from qmpsnap.hypervisor.vmstate.split import split
from scripts.bare import Qmp, at
from scripts.bare_restore import Form, Whole, warm
from scripts.ram_scene import VM, Captured
from tests.rig.console import Console

FLOOR = "QEMU -incoming"
Making = Callable[[Path], Form]
_LONGEST = 600.0  # seconds until all RAM is local


@dataclass(slots=True)
class Row:
    """One way of doing it: each list has a figure a run, in milliseconds.

    *resume_ms*: from the start of QEMU's process to RESUME. Of ours alone, from the first step of
    the verb: *verb_ms* until RESUME, *local_ms* until all RAM is QEMU's own or in a file on this
    host, by QEMU's own word.
    """

    qemu: str
    ram_mib: int
    way: str
    resume_ms: list[float] = field(default_factory=list)
    verb_ms: list[float] = field(default_factory=list)
    local_ms: list[float] = field(default_factory=list)


_OURS = {
    "qmpsnap, mapped": {"eager": False, "cold": False},
    "qmpsnap --eager": {"eager": True, "cold": False},
    "qmpsnap, cold": {"eager": False, "cold": True},
}


async def restores(it: Captured, repeat: int) -> list[Row]:
    """Every way *repeat* times; the floor before and after all others."""
    floor = Row(it.version, it.whole.mib, FLOOR)
    rows = [floor]
    await asyncio.to_thread(_bare, it, floor, lambda folder: it.whole.form, repeat)
    for way, made in _forms(it).items():
        row = Row(it.version, it.whole.mib, way)
        await asyncio.to_thread(_bare, it, row, made, repeat)
        rows.append(row)
    for way, how in _OURS.items():
        row = Row(it.version, it.whole.mib, way)
        for _ in range(repeat):
            await _engine(it, row, **how)
        rows.append(row)
    await asyncio.to_thread(_bare, it, floor, lambda folder: it.whole.form, repeat)
    return rows


def _forms(it: Captured) -> dict[str, Making]:
    newer: dict[str, Making] = {"QEMU mapped-ram, multifd": it.whole.mapped_ram}
    return (newer if it.version != "7.2" else {}) | {
        "QEMU x-ignore-shared": it.whole.template,
        "QEMU loadvm": it.whole.internal,
        "mapped, bare": functools.partial(mapped, it.whole),
    }


def mapped(whole: Whole, folder: Path) -> Form:
    """The page image of the RAM, and the stream that is left."""
    with whole.stream.open("rb") as file:
        parts = split(file.fileno(), folder)
    [image] = parts.images
    return Form(whole.disk, parts.stream, image.path)


def _bare(it: Captured, row: Row, made: Making, repeat: int) -> None:
    with tempfile.TemporaryDirectory(prefix="f", dir=it.folder) as name:
        form = made(Path(name))
        for _ in range(repeat):
            form.warm()
            with it.whole.started(form) as one:
                row.resume_ms.append(one.resumed())
                if len(row.resume_ms) == repeat:
                    asyncio.run(proven(one.console))


async def proven(console: Path) -> None:
    """What came back is the guest: its RAM and its disk are of one instant."""
    async with Console.open(console) as shell:
        found = await shell.witness(within=120)
        assert found.ok, found


async def _engine(it: Captured, row: Row, *, eager: bool, cold: bool) -> None:
    """Our verb once; *cold*: without what this host keeps of the RAM, all of it on the store."""
    kept, folder = it.engine.roots.local.vm(VM) / "ram", it.folder / "r"
    if cold:
        shutil.rmtree(kept, ignore_errors=True)
    for path in await asyncio.to_thread(lambda: list(kept.rglob("*.pages"))):
        await asyncio.to_thread(warm, path)
    wish = Restoration(folder, eager=eager)
    begun = time.time()
    ready = await it.engine.prepare_restore(VM, wish, it.id)
    with _watching(folder / "witness", ready.qmp) as seen:
        async with it.engine.restored(_watchable(ready, folder / "witness")):
            await asyncio.to_thread(seen.join, _LONGEST)
            await proven(folder / "console.sock")
    assert seen.resumed is not None, "no RESUME was seen"
    assert seen.local is not None, "the RAM was not all here in time"
    row.resume_ms.append((seen.resumed - seen.bound) * 1000)
    row.verb_ms.append((seen.resumed - begun) * 1000)
    row.local_ms.append((max(seen.local, seen.resumed) - begun) * 1000)
    shutil.rmtree(folder)


def _watchable(ready: Ready, monitor: Path) -> Ready:
    """The same machine with a second *monitor*: the first is the engine's."""
    words = ["-chardev", f"socket,id=watch,path={monitor},server=on,wait=off"]
    line = parse([*ready.argv, *words, "-mon", "chardev=watch,mode=control"])
    return replace(ready, relocated=replace(ready.relocated, cmdline=line))


class _Watch(threading.Thread):
    """Looks on at a machine that is yet to be started, over its second monitor."""

    def __init__(self, monitor: Path, first: Path) -> None:
        super().__init__(daemon=True)
        self._monitor, self._first = monitor, first
        self.over = threading.Event()
        self.bound = 0.0
        self.resumed: float | None = None
        self.local: float | None = None

    def run(self) -> None:
        while (qmp := self._connected()) is None:
            if self.over.wait(0.001):
                return
        with contextlib.suppress(ConnectionError):  # it ended before it ran
            # this socket is bound right before the process starts
            self.bound = self._first.stat().st_mtime
            self.resumed = at(qmp.event("RESUME"))
            while qmp.status() != "completed" and not self.over.wait(0.002):
                pass
            self.local = time.time()
        qmp.close()

    def _connected(self) -> Qmp | None:
        with contextlib.suppress(OSError):
            return Qmp(self._monitor)
        return None


@contextlib.contextmanager
def _watching(monitor: Path, first: Path) -> Iterator[_Watch]:
    watch = _Watch(monitor, first)
    watch.start()
    try:
        yield watch
    finally:
        watch.over.set()
        watch.join()
