"""Where everything lies on the two roots: the only place that puts their paths together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.errors import UsageError
from qmpsnap.ids import SnapshotId, is_snapshot_id, is_vm_name

STORAGE = "storage.json"
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
PAIRED = "paired.json"
IDENTITY = "identity.json"
KEPT = "kept.json"
MERGED = "merged.json"
DIGESTS = "digests.json"
SHARED = "shared"
SPOOL = "spool"
LEASE = "lease"
RAM = "ram"
PROTECTED = "protected"
PARTIAL = ".partial"
KEYS = ".keys"
GOING = ".going"

Id = SnapshotId | str


@dataclass(frozen=True, slots=True)
class _Root:
    path: Path

    def vm(self, name: str) -> Path:
        """The folder of a VM. Raises UsageError for a name that may not be a folder of ours."""
        if not is_vm_name(name):
            raise UsageError(f"not a name for a VM: {name!r}")
        return self.path / name

    def snapshot(self, vm: str, id: Id) -> Path:
        """The folder of one half. Raises UsageError for what is no snapshot ID."""
        if not is_snapshot_id(str(id)):
            raise UsageError(f"not a snapshot id: {str(id)!r}")
        return self.vm(vm) / str(id)

    def shared(self, vm: str) -> Path:
        """The folder of the files that the snapshots of *vm* share, named by their digests."""
        return self.vm(vm) / SHARED

    def vms(self) -> list[str]:
        """The VMs that have a folder here, by name; other names are left out. Raises OSError."""
        return sorted(name for name in _folders(self.path) if is_vm_name(name))

    def ids(self, vm: str) -> list[SnapshotId]:
        """The snapshots that have a folder here, oldest first. Raises OSError."""
        names = _folders(self.vm(vm))
        return sorted(SnapshotId(name) for name in names if is_snapshot_id(name))


@dataclass(frozen=True, slots=True)
class LocalRoot(_Root):
    """The paths of the local halves, of what belongs to a VM on this host, and of the spools."""

    @property
    def host(self) -> Path:
        """Which local root this is, to others that use the same store."""
        return self.path / "host.json"

    def rival(self, vm: str) -> Path:
        """What was seen of another host's lease of *vm*."""
        return self.vm(vm) / "rival.json"

    @property
    def keys(self) -> Path:
        """The folder of this host's keys, unless it is elsewhere; no VM can be called so."""
        return self.path / KEYS

    def lock(self, vm: str) -> Path:
        return self.vm(vm) / "lock"

    def journal(self, vm: str) -> Path:
        return self.vm(vm) / "journal"

    def identity(self, vm: str) -> Path:
        return self.vm(vm) / IDENTITY

    def last(self, vm: str) -> Path:
        """The newest ID that was ever given to a snapshot of *vm*."""
        return self.vm(vm) / "last"

    def usage(self, vm: str) -> Path:
        """The figures of the newest snapshot, which the next one counts from."""
        return self.vm(vm) / "usage.json"

    def notes(self, vm: str) -> Path:
        """What the files in `shared` were like on this host when they were read."""
        return self.vm(vm) / f"{SHARED}.json"

    def hurt(self, vm: str) -> Path:
        """Packs on the store that were damaged when they were last read."""
        return self.vm(vm) / "hurt.json"

    def layers(self, vm: str) -> Path:
        """The folder of the overlays that take writes: no snapshot's, as they still change."""
        return self.vm(vm) / "layers"

    def ram(self, vm: str, id: Id | None = None) -> Path:
        """The folder of the page images that are kept, or of those of one snapshot."""
        folder = self.vm(vm) / RAM
        return folder if id is None else folder / self.snapshot(vm, id).name

    def storage(self, vm: str, id: Id) -> Path:
        return self.snapshot(vm, id) / STORAGE

    def point(self, vm: str, name: str) -> Path:
        """The folder of a point: of a snapshot (`ID`), or of a revision of it (`ID/REVISION`)."""
        id, _, revision = name.partition("/")
        if revision and not is_snapshot_id(revision):
            raise UsageError(f"not a revision: {revision!r}")
        return self.snapshot(vm, id) / revision

    def image(self, vm: str, point: str, label: str, format: str) -> Path:
        """The image that *point* has written of the disk *label*."""
        return self.point(vm, point) / f"{label}.{format}"

    def revisions(self, vm: str, id: Id) -> list[SnapshotId]:
        """The revisions that have a folder in a snapshot's, oldest first. Raises OSError."""
        names = _folders(self.snapshot(vm, id))
        return sorted(SnapshotId(name) for name in names if is_snapshot_id(name))

    def paired(self, vm: str, id: Id) -> Path:
        return self.snapshot(vm, id) / PAIRED

    def spool(self, vm: str, id: Id) -> Path:
        """The folder of a store half that is not shipped yet."""
        return self.snapshot(vm, id) / SPOOL


@dataclass(frozen=True, slots=True)
class StoreRoot(_Root):
    """The paths of the store halves."""

    def manifest(self, vm: str, id: Id) -> Path:
        return self.snapshot(vm, id) / MANIFEST

    def lease(self, vm: str) -> Path:
        """The folder of the files that say which host *vm* belongs to."""
        return self.vm(vm) / LEASE


def aside(path: Path) -> Path:
    """Where the shared file *path* lies while a sweep decides, or when that was cut off."""
    return path.with_name(path.name + GOING)


def _folders(path: Path) -> Iterator[str]:
    """The real folders in *path*, no symbolic links; none if it is not there."""
    try:
        entries = list(path.iterdir())
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            yield entry.name
