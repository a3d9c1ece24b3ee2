"""What a restore would do, decided without doing it: the images, the command line, the refusals."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qmpsnap.engine.configuration import Configuration
from qmpsnap.engine.half import Pair
from qmpsnap.engine.limiting import Choice, Limit
from qmpsnap.engine.ramback import Memory
from qmpsnap.errors import BaseChanged, Blocked, LocalFailed, UsageError
from qmpsnap.host.site import Site
from qmpsnap.host.swtpm import Wanted
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
    QEMU binary than the captured one. *isolated*: its network cards lead nowhere. *secrets*: the
    file to read each -object secret from, by its id, where the captured machine had it in none.
    *limits*: those of a control group of its own, made below *limits_parent* (as in
    /proc/PID/cgroup). *eager*: all RAM is loaded before the guest runs. *pages*: the folder
    for page images that come from the store, which others map as well (default: one in *to*).
    *ram_in*: the folder, empty or not there yet, in which page images are made in any case.
    """

    to: Path
    cold: bool = False
    standalone: bool = False
    revision: int | None = None
    qmp: Path | None = None
    qemu: Path | None = None
    isolated: bool = False
    secrets: Mapping[str, Path] = field(default_factory=dict)
    limits: Choice = Choice.NONE
    eager: bool = False
    limits_parent: str | None = None
    pages: Path | None = None
    ram_in: Path | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """What would be started, by *argv*, once its images are built.

    *fetched*: files that come from the snapshot, as this host's are others by now.
    *tpm*: the swtpm that is started beside it, which finds *tpm_files* of the snapshot.
    *memory*: how its RAM comes back.
    *warnings*: what differs between the captured machine's host and this one. *limits*: those
    that it gets, of a new control group at *site* (None: of none).
    """

    pair: Pair
    wish: Restoration
    relocated: Relocated
    qmp: Path
    fetched: tuple[Shared, ...] = ()
    tpm: Wanted | None = None
    tpm_files: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    limits: list[Limit] = field(default_factory=list)
    site: Site | None = None

    @property
    def argv(self) -> list[str]:
        return self.relocated.cmdline.argv()

    @property
    def companions(self) -> list[list[str]]:
        """What has to be started before it, and ends with it."""
        return [self.tpm.argv()] if self.tpm is not None else []

    @property
    def notices(self) -> list[str]:
        return self.relocated.notices

    @property
    def log(self) -> Path:
        return self.wish.to / "qemu.log"

    @property
    def tpm_log(self) -> Path:
        return self.wish.to / "swtpm.log"


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
    """Raises Blocked for a RAM whose machine no command line makes."""
    if wish.cold:
        return
    if machine.reconciled is not None and machine.reconciled.troubles:
        raise Blocked("; ".join(machine.reconciled.troubles), hint="`--cold` boots the disks")
    if machine.reconciled is None and (strange := [*machine.hotplugged, *machine.unplugged]):
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
    known = machine.reconciled
    called = known.origins if known else {}
    qmp = wish.qmp or wish.to / "qmp.sock"
    relocated = relocate(
        line,
        cwd=cwd,
        into=wish.to,
        machine_type=machine.machine_type,
        disks={called.get(name, name): at for name, at in places(pair, wish.to).items()},
        incoming=not wish.cold,
        paused=False,
        qmp=qmp,
        isolated=wish.isolated,
        secrets=wish.secrets,
        fetched={one.path for one in fetched},
    )
    relocated.notices.extend(_withheld(machine))
    if wish.qemu is None and pair.signed is not None and pair.signed.verdict != "trusted":
        raise Blocked(
            f"{relocated.cmdline.binary} is named by a snapshot that nobody trusted has signed: "
            "it is not run",
            hint="`--qemu PATH` says which QEMU to run",
        )
    binary = wish.qemu or Path(relocated.cmdline.binary)
    if not binary.exists():
        found = shutil.which(binary.name)
        if found is None:
            raise Blocked(f"the QEMU of the snapshot, {binary}, is not on this host")
        binary = Path(found)
    cmdline = type(relocated.cmdline)(str(binary), relocated.cmdline.options)
    notices = [*known.notes, *(f"left out: {one}" for one in known.troubles)] if known else []
    notices += relocated.notices
    moved = replace(relocated, cmdline=cmdline, notices=notices)
    return Ready(pair, wish, moved, qmp, tuple(fetched))


def _withheld(machine: Configuration) -> list[str]:
    """What the machine will not have, since secrets are in no snapshot."""
    words = machine.details.withheld if machine.details else []
    # an object without its secret is refused, if it was not given anew
    return [f"{one}: is in no snapshot" for one in words if not one.startswith("-object ")]


def places(pair: Pair, to: Path) -> Mapping[str, Path]:
    """Each disk's new image by its name on the captured command line."""
    found = {disk.origin: to / f"{disk.label}.qcow2" for disk in pair.storage.disks}
    empty = [left for left in pair.storage.left_out if left.virtual_size_bytes is not None]
    for left, label in zip(empty, disk_labels([left.device for left in empty]), strict=True):
        found[left.origin] = to / f"{label}.empty.qcow2"
    return found
