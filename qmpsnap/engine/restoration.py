"""What a restore would do, decided without doing it: the images, the command line, the refusals."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qmpsnap.engine.configuration import Configuration
from qmpsnap.engine.half import Pair
from qmpsnap.errors import BaseChanged, Blocked, LocalFailed, UsageError
from qmpsnap.hypervisor.machine.relocate import Relocated, relocate
from qmpsnap.ids import disk_labels
from qmpsnap.store import image as frozen
from qmpsnap.store.manifest import Disk, Image, Shared, Storage
from qmpsnap.store.points import Points


@dataclass(frozen=True, slots=True)
class Restoration:
    """How to restore. *to*: a folder that is empty or not there yet, for all that is new.

    *cold*: boot from the disks, without the RAM. *standalone*: full copies instead of overlays.
    *qmp*: where the new QEMU's monitor listens (default: qmp.sock in *to*). *qemu*: another
    QEMU binary than the captured one. *isolated*: its network cards lead nowhere.
    """

    to: Path
    cold: bool = False
    standalone: bool = False
    revision: int | None = None
    qmp: Path | None = None
    qemu: Path | None = None
    isolated: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """What would be started, by *argv*, once its images are built.

    *fetched*: files that come from the snapshot, as this host's are others by now.
    *warnings*: what differs between the captured machine's host and this one.
    """

    pair: Pair
    wish: Restoration
    relocated: Relocated
    qmp: Path
    fetched: tuple[Shared, ...] = ()
    warnings: list[str] = field(default_factory=list)

    @property
    def argv(self) -> list[str]:
        return self.relocated.cmdline.argv()

    @property
    def notices(self) -> list[str]:
        return self.relocated.notices

    @property
    def log(self) -> Path:
        return self.wish.to / "qemu.log"


def storage_of(pair: Pair, points: Points, wish: Restoration) -> Storage:
    """The storage that is wanted: without a word the RAM's own, or for a cold boot the newest.

    Raises Blocked when there is none of that number.
    """
    there = {one.storage.revision: one.storage for one in points if one.storage.id == pair.id}
    number = wish.revision if wish.revision is not None else max(there) if wish.cold else 0
    if number not in there:
        known = ", ".join(map(str, sorted(there)))
        raise Blocked(f"{pair.vm} {pair.id} has no revision {number}; there are: {known}")
    return there[number]


def refuse_mode(pair: Pair, wish: Restoration) -> None:
    """Raises Blocked for a RAM that is not there, or not of these disks' instant."""
    if pair.manifest.ram.mode == "none" and not wish.cold:
        raise Blocked(f"{pair.vm} {pair.id} was taken without RAM", hint="`--cold` boots its disks")
    if pair.storage.revision and not wish.cold:
        raise Blocked(
            f"the RAM of {pair.vm} {pair.id} is of the instant of revision 0: with the disks of "
            f"revision {pair.storage.revision} its file systems would be destroyed",
            hint="`--cold` boots that revision; without --revision the RAM comes back",
        )


def refuse_hotplugged(machine: Configuration, wish: Restoration) -> None:
    """Raises Blocked for a RAM whose machine is not that of the command line."""
    if (strange := [*machine.hotplugged, *machine.unplugged]) and not wish.cold:
        raise Blocked(
            f"devices were plugged or unplugged at run time: {', '.join(strange)}; "
            "their state cannot be loaded into a machine of the command line",
            hint="`--cold` boots the disks",
        )


def images(pair: Pair, points: Points, disk: Disk) -> list[Image]:
    """What *disk* consists of, top first. Raises HalfMissing for a chain with a gap."""
    point = points.by_name.get(pair.storage.point)
    return points.images(point, disk.label) if point else disk.chain


def refuse_changed(pair: Pair, points: Points, disk: Disk) -> None:
    """Raises BaseChanged when an image of *disk* is not what it was, HalfMissing for a gap."""
    for one in images(pair, points, disk):
        if difference := frozen.changed(one):
            raise BaseChanged(f"disk {disk.device} of {pair.vm} {pair.id}: {difference}")


def refuse_folder(to: Path) -> None:
    """Raises UsageError when something is in the way, LocalFailed when we may not look."""
    try:
        if to.exists() and any(to.iterdir()):
            raise UsageError(f"{to} is not empty")
    except OSError as failed:
        raise LocalFailed(f"{to}: {failed.strerror}") from failed


def ready(
    pair: Pair, wish: Restoration, machine: Configuration, fetched: Sequence[Shared] = ()
) -> Ready:
    """The machine of *wish*, with the files *fetched* under its folder, not the host's own.

    Raises Blocked, HalfMissing, UsageError for one that cannot be.
    """
    line, cwd = machine.command_line()
    qmp = wish.qmp or wish.to / "qmp.sock"
    relocated = relocate(
        line,
        cwd=cwd,
        into=wish.to,
        machine_type=machine.machine_type,
        disks=places(pair, wish.to),
        incoming=not wish.cold,
        paused=False,
        qmp=qmp,
        isolated=wish.isolated,
        fetched={one.path for one in fetched},
    )
    binary = wish.qemu or Path(relocated.cmdline.binary)
    if not binary.exists():
        found = shutil.which(binary.name)
        if found is None:
            raise Blocked(f"the QEMU of the snapshot, {binary}, is not on this host")
        binary = Path(found)
    cmdline = type(relocated.cmdline)(str(binary), relocated.cmdline.options)
    return Ready(pair, wish, replace(relocated, cmdline=cmdline), qmp, tuple(fetched))


def places(pair: Pair, to: Path) -> Mapping[str, Path]:
    """Each disk's new image by its name on the command line."""
    found = {disk.origin: to / f"{disk.label}.qcow2" for disk in pair.storage.disks}
    empty = [left for left in pair.storage.left_out if left.virtual_size_bytes is not None]
    for left, label in zip(empty, disk_labels([left.device for left in empty]), strict=True):
        found[left.origin] = to / f"{label}.empty.qcow2"
    return found
