"""What lies under a path: the only place that reads the mount table and asks for free space."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from qmpsnap.errors import LocalFailed

NETWORK_TYPES = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "glusterfs", "beegfs", "afs"}
    | {"fuse.glusterfs", "fuse.sshfs", "fuse.ceph", "fuse.ceph-fuse"}
)
_NFS_MAGIC = 0x6969
_TMPFS_MAGIC = 0x01021994
_libc = ctypes.CDLL(None, use_errno=True)


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the mount table; *network* says that its data lies on another machine."""

    source: str
    point: str
    fstype: str
    network: bool
    options: list[str]


class Filesystem(msgspec.Struct, frozen=True, kw_only=True):
    """The file system under *path*, which is absolute and free of symbolic links."""

    path: str
    mount: Mount
    device: int
    magic: int
    free_bytes: int
    total_bytes: int
    free_inodes: int
    read_only: bool

    @property
    def network(self) -> bool:
        """Whether the data lies on another machine: by the type's name, or by NFS's magic."""
        return self.mount.network or self.magic == _NFS_MAGIC

    @property
    def in_memory(self) -> bool:
        """Whether its data is memory of this host, as on tmpfs: a hole that is read becomes one."""
        return self.magic == _TMPFS_MAGIC


def mount_of(path: Path, *, resolve: bool = True) -> Mount:
    """The mount that holds *path*, or that would hold it once it exists.

    No other mount is touched, so that a dead one elsewhere cannot hang us. With `resolve=False`
    not even *path* is: it is then taken as it is spelled, which a dead store allows.

    Raises LocalFailed when the mount table cannot be read.
    """
    spelled = os.path.realpath(path) if resolve else os.path.normpath(path.absolute())
    try:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as failed:
        raise LocalFailed(f"the mount table cannot be read: {failed.strerror}") from failed
    found = deepest(spelled, parsed(table))
    if found is None:
        raise LocalFailed(f"no mount holds {spelled}")
    return found


def deepest(path: str, mounts: Iterable[Mount]) -> Mount | None:
    """The mount of the longest mount point above *path*; of two on one point, the later one."""
    best: Mount | None = None
    for mount in mounts:
        inside = mount.point == "/" or path == mount.point or path.startswith(f"{mount.point}/")
        if inside and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


def parsed(table: str) -> Iterator[Mount]:
    """The mounts of a `mountinfo` (proc(5)); a row that is cut short is none."""
    for row in table.splitlines():
        with suppress(LookupError, ValueError):
            yield _parse(row)


def _parse(line: str) -> Mount:
    # "36 35 98:0 /root /point rw,noatime master:1 - ext3 /dev/root rw,errors=continue"
    before, _, after = line.partition(" - ")
    fields, (fstype, source, *more) = before.split(" "), after.split(" ")
    options = dict.fromkeys([*fields[5].split(","), *(more[0].split(",") if more else [])])
    return Mount(
        source=_plain(source),
        point=_plain(fields[4]),
        fstype=fstype,
        network=fstype in NETWORK_TYPES,
        options=list(options),
    )


def _plain(field: str) -> str:
    """Undo the table's octal escapes: a blank in a path is written \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def examine(path: Path) -> Filesystem:
    """The facts of the file system that holds *path*, or its nearest parent that exists.

    Blocks for as long as that file system does: a store is examined in the store's worker.

    Raises LocalFailed when the system refuses.
    """
    resolved = Path(os.path.realpath(path))
    there = resolved
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        numbers, status = os.statvfs(there), there.stat()
        magic = _magic(there)
    except OSError as failed:
        raise LocalFailed(f"{there}: {failed.strerror}") from failed
    return Filesystem(
        path=str(resolved),
        mount=mount_of(there),
        device=status.st_dev,
        magic=magic,
        free_bytes=numbers.f_bavail * numbers.f_frsize,
        total_bytes=numbers.f_blocks * numbers.f_frsize,
        free_inodes=numbers.f_favail,
        read_only=bool(numbers.f_flag & os.ST_RDONLY),
    )


def in_memory(path: Path) -> bool:
    """Whether *path* lies on tmpfs, or is a memfd. Raises OSError."""
    return _magic(path) == _TMPFS_MAGIC


def _magic(path: Path) -> int:
    # statvfs() leaves f_type out; statfs() has it as its first long
    answer = (ctypes.c_long * 64)()
    if _libc.statfs(os.fsencode(path), answer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(answer[0]) & 0xFFFFFFFF


def sync_dir(path: Path) -> None:
    """Make the names in the folder *path* durable. Raises LocalFailed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as failed:
        raise LocalFailed(f"{path}: {failed.strerror}") from failed
