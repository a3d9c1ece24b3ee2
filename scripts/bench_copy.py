"""Full and incremental copies of a running guest's disk beside their floors, in the same run."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from qmpsnap import Engine, Machine
from qmpsnap.engine.wishes import Level, Quiesce, RamChoice, Wishes
from qmpsnap.store.copying import copy
from scripts import bare
from scripts.measure import Growth, cpu_seconds, listening, longest, vcpus, watch_latency
from tests.rig.guest import Guest, blockdev, booted, disk
from tests.rig.qemu import binaries

MIB = 1 << 20
_GUESTS_OWN = 512  # MiB at the start of the disk: the guest's file system
_CHANGES, _CLUSTER = 1024, 65536
_FLOOR = {"full": "blockdev-backup", "inc": "blockdev-backup, bitmap"}
_VM = "bench"


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds until all was written, until it was durable; bytes; MiB of a child at its peak."""

    copied: float
    sealed: float
    written: int
    child: float = 0.0


@dataclass(slots=True)
class Row:
    """One way of doing it: each list has a figure a run."""

    copied: list[float] = field(default_factory=list)
    sealed: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    written: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)
    write_ms: list[float] = field(default_factory=list)
    flush_ms: list[float] = field(default_factory=list)
    silence: list[float] = field(default_factory=list)


Way = Callable[[], Awaitable[Took]]


@dataclass(frozen=True, slots=True)
class Scene:
    """A guest on one disk, and an engine."""

    guest: Guest
    engine: Engine
    folder: Path
    image: Path
    size: int
    reports: list[tuple[float, str, bool]]

    @property
    def machine(self) -> Machine:
        return Machine(_VM, self.guest.qmp, self.guest.agent)


def furnished(path: Path, size: int, data: int) -> Path:
    """A qcow2 of *size* MiB: the guest's file system, and *data* MiB that it knows nothing of."""
    disk(path, "qcow2", f"{_GUESTS_OWN}M")
    subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", path, f"{size}M"], check=True)
    pieces = [
        word
        for at in range(_GUESTS_OWN, _GUESTS_OWN + data, 256)
        for word in ("-c", f"write -q -P 165 {at}M {min(256, _GUESTS_OWN + data - at)}M")
    ]
    subprocess.run(["qemu-io", "-f", "qcow2", *pieces, path], check=True, stdout=subprocess.DEVNULL)
    return path


@contextlib.asynccontextmanager
async def scene(options: argparse.Namespace, version: str, root: Path) -> AsyncIterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="qb", dir=root) as name, contextlib.ExitStack() as last:
        folder = Path(name)
        store = Path(last.enter_context(tempfile.TemporaryDirectory(prefix="qb", dir="/dev/shm")))
        sockets = Path(last.enter_context(tempfile.TemporaryDirectory(prefix="qb", dir="/var/tmp")))
        image = furnished(folder / "d0.qcow2", options.size, options.data)
        reports: list[tuple[float, str, bool]] = []

        def report(what: str, done: int, total: int) -> None:
            reports.append((time.monotonic(), what, done >= total))

        (folder / "local").mkdir()
        engine = Engine(folder / "local", store, allow_local_store=True, report=report)
        disks = blockdev(image, "d0", "qcow2", device="vd0")
        async with booted(binaries()[version], sockets, disks=disks) as guest:
            if options.load != "idle":
                await guest.console.run(f"busy {options.load}", within=20)
            yield Scene(guest, engine, folder, image, options.size * MIB, reports)


def occupied(path: Path) -> int:
    return path.stat().st_blocks * 512


def by_child(target: Path, *command: str | Path) -> Took:
    """Run *command*, which makes *target*, and sync that."""
    begun = time.monotonic()
    process = subprocess.Popen([*command, target])
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    copied = time.monotonic() - begun
    bare.synced(target)
    return Took(copied, time.monotonic() - begun, occupied(target), used.ru_maxrss / 1024)


def by_backup(it: Scene, target: Path, beneath: Path | None = None) -> Took:
    copied, sealed = bare.backup(it.guest.qmp, "d0", target, it.size, beneath)
    return Took(copied, sealed, occupied(target))


def by_copy(it: Scene, target: Path) -> Took:
    """The part of ours that is measured against the others' fsync: no overlay, no fold."""
    begun, written = time.monotonic(), [0.0]

    def told(done: int, total: int, what: str) -> None:
        if done >= total:
            written[0] = time.monotonic() - begun

    made = copy(it.image, target, limit=None, reserve=0, cancelled=lambda: False, on_progress=told)
    sealed = time.monotonic() - begun
    return Took(written[0] or sealed, sealed, made.bytes_written)


async def by_engine(it: Scene, level: Level) -> Took:
    """`create`: sealed is when `storage.json` stood there."""
    it.reports.clear()
    begun, clock = time.monotonic(), time.time()
    wishes = Wishes(level=level, ram=RamChoice.NONE, quiesce=Quiesce.NONE, max_pause=60)
    made = await it.engine.create(it.machine, wishes)
    sealed, written = await asyncio.to_thread(_left, Path(made.local))
    ends = [at - begun for at, what, done in it.reports if done and what.startswith("copying")]
    return Took(ends[0] if ends else sealed - clock, sealed - clock, written)


def _left(folder: Path) -> tuple[float, int]:
    """When the snapshot in *folder* was sealed, and the bytes of its images."""
    images = sum(occupied(path) for path in folder.glob("*.qcow2"))
    return (folder / "storage.json").stat().st_mtime, images


async def measured(it: Scene, row: Row, way: Way) -> None:
    """Run *way* once, from a page cache that owes the disk nothing."""
    await asyncio.to_thread(os.sync)
    qmp = bare.Qmp(it.guest.qemu.witness)
    try:
        pid, threads = it.guest.qemu.pid, vcpus(qmp)
        watch_latency(qmp, "vd0")
        memory, cpu, begun = Growth(pid, os.getpid()), cpu_seconds(pid, threads), time.monotonic()
        with listening(it.guest.heartbeat, row.silence):
            took = await way()
        row.whole.append(time.monotonic() - begun)
        row.cpu.append(cpu_seconds(pid, threads) - cpu)
        row.peak.append(memory.mib() + took.child)
        write, flush = longest(qmp, "vd0")
    finally:
        qmp.close()
    row.copied.append(took.copied)
    row.sealed.append(took.sealed)
    row.written.append(took.written / MIB)
    row.write_ms.append(write)
    row.flush_ms.append(flush)


async def fulls(it: Scene, repeat: int) -> dict[str, Row]:
    """Every way in turn, in the other order each second time; the copies do not pile up."""
    target = it.folder / "copy"
    convert = ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "qcow2", it.image]
    cp = ["cp", "--sparse=always", "--reflink=never", it.image]
    blocking: dict[str, Callable[[], Took]] = {
        _FLOOR["full"]: lambda: by_backup(it, target),
        "qemu-img convert": lambda: by_child(target, *convert),
        "cp --sparse": lambda: by_child(target, *cp),
        "qmpsnap, the copy alone": lambda: by_copy(it, target),
    }
    ways: dict[str, Way] = {name: partial(asyncio.to_thread, way) for name, way in blocking.items()}
    ways["**qmpsnap create --level full**"] = partial(by_engine, it, Level.FULL)
    rows = {name: Row() for name in ways}
    for turn in range(repeat):
        for name in reversed(list(ways)) if turn % 2 else list(ways):
            await measured(it, rows[name], ways[name])
            target.unlink(missing_ok=True)
            for entry in await it.engine.list(_VM):
                await it.engine.delete(it.machine, entry.id)
    return rows


async def incs(it: Scene, repeat: int) -> dict[str, Row]:
    """After 64 MiB of writes of 64 KiB each, spread over the disk."""
    target, name = it.folder / "copy", _FLOOR["inc"]
    await by_engine(it, Level.FULL)
    ways: dict[str, Way] = {
        name: partial(asyncio.to_thread, by_backup, it, target, it.image),
        "**qmpsnap create --level inc**": partial(by_engine, it, Level.INC),
    }
    rows = {name: Row() for name in ways}
    for turn in range(repeat):
        for way in reversed(list(ways)) if turn % 2 else list(ways):
            bitmap = {"node": "d0", "name": "bare"}
            if way == name:
                ask(it, "block-dirty-bitmap-add", **bitmap, granularity=_CLUSTER)
            scattered(it, turn)
            await measured(it, rows[way], ways[way])
            if way == name:
                ask(it, "block-dirty-bitmap-remove", **bitmap)
            target.unlink(missing_ok=True)
    return rows


def ask(it: Scene, word: str, **arguments: object) -> None:
    qmp = bare.Qmp(it.guest.qemu.witness)
    try:
        qmp(word, **arguments)
    finally:
        qmp.close()


def scattered(it: Scene, turn: int) -> None:
    """Write as the guest's device does, where the guest itself does not."""
    qmp = bare.Qmp(it.guest.qemu.witness)
    stride = (it.size - _GUESTS_OWN * MIB) // _CHANGES // _CLUSTER * _CLUSTER
    for at in range(_CHANGES):
        offset = _GUESTS_OWN * MIB + at * stride
        order = f"write -q -P {1 + turn % 200} {offset} {_CLUSTER}"
        line = f'qemu-io -d /machine/peripheral/vd0/virtio-backend "{order}"'
        said = qmp("human-monitor-command", command_line=line)
        assert not said.strip(), said
    qmp.close()


@contextlib.contextmanager
def file_system(kind: str, size: int) -> Iterator[Path]:
    """A folder on *kind*: `here` is what lies under /var/tmp, all else a loop image of its own.

    Raises SystemExit that says what is missing.
    """
    if kind == "here":
        yield Path("/var/tmp")
        return
    packages = {"xfs": "xfsprogs", "btrfs": "btrfs-progs", "ext4": "e2fsprogs"}
    make = shutil.which(f"mkfs.{kind}", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if make is None:
        raise SystemExit(f"no mkfs.{kind}: install {packages[kind]}")
    if os.geteuid() != 0:
        raise SystemExit(f"{kind}: only root mounts a loop image")
    with tempfile.TemporaryDirectory(prefix="qb", dir="/var/tmp") as name:
        image, root = Path(name) / "image", Path(name) / "root"
        root.mkdir()
        with image.open("wb") as file:
            file.truncate(size)
        subprocess.run([make, "-q", image], check=True)
        if subprocess.run(["mount", "-t", kind, "-o", "loop", image, root], check=False).returncode:
            raise SystemExit(f"{kind}: this kernel does not mount it")
        try:
            yield root
        finally:
            subprocess.run(["umount", root], check=True)


def table(title: str, rows: dict[str, Row], floor: Row) -> list[str]:
    """A Markdown table: medians, and ratios of the two times to the floor's."""
    head = [
        *("way", "before fsync s", "x floor", "sealed s", "x floor", "least-most", "whole s"),
        *("CPU s", "written MiB", "peak MiB", "write ms", "flush ms", "silence ms"),
    ]
    lines = [f"### {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    middle = statistics.median
    for name, row in rows.items():
        cells = [name]
        for values, base in ((row.copied, floor.copied), (row.sealed, floor.sealed)):
            ratio = f"{middle(values) / middle(base):.2f}" if row is not floor else ""
            cells += [f"{middle(values):.2f}", ratio]
        cells += [f"{min(row.sealed):.2f}-{max(row.sealed):.2f}", f"{middle(row.whole):.2f}"]
        cells += [f"{middle(row.cpu):.2f}", f"{middle(row.written):.1f}", f"{middle(row.peak):.0f}"]
        cells += [f"{max(worst):.0f}" for worst in (row.write_ms, row.flush_ms, row.silence)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


async def run(options: argparse.Namespace) -> list[str]:
    lines: list[str] = []
    for version in options.qemu:
        for kind in options.fs:
            with file_system(kind, 5 * options.size * MIB) as root:
                about = f"QEMU {version}, {kind}, {options.size} MiB, {options.data} MiB of data, "
                about += options.load
                async with scene(options, version, root) as it:
                    for level in options.level:
                        rows = await (fulls if level == "full" else incs)(it, options.repeat)
                        lines += table(f"Copy {level}, {about}", rows, rows[_FLOOR[level]])
                        print("\n".join(lines[-len(rows) - 5 :]), flush=True)
    return lines


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench copy", description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="MiB of the disk")
    parser.add_argument("--data", type=int, default=3072, help="MiB of it that hold data")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--qemu", nargs="+", default=["11.1"], choices=list(binaries()))
    kinds = ["here", "xfs", "btrfs", "ext4"]
    parser.add_argument("--fs", nargs="+", default=["here"], choices=kinds)
    parser.add_argument("--level", nargs="+", default=["full", "inc"], choices=["full", "inc"])
    parser.add_argument("--load", default="ram=16 rate=10 disk=1024", help="or idle")
    parser.add_argument("--output", type=Path, help="the tables as Markdown")
    options = parser.parse_args(words)
    if options.data + _GUESTS_OWN > options.size:
        parser.error(f"--data and the guest's own {_GUESTS_OWN} MiB must fit into --size")
    lines = asyncio.run(run(options))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")
