"""The only place that remembers, by name, the QEMUs that we started."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from qmpsnap.errors import UNREADABLE, ManifestError, Refused, UsageError
from qmpsnap.ids import is_vm_name

_FORMAT = "qmpsnap-registered-vm"
_VERSION = 1


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """A running QEMU; *started* is its start time in clock ticks since boot, as in /proc."""

    format: str = _FORMAT
    version: int = _VERSION
    name: str
    pid: int
    started: int
    qmp: str
    agent: str | None = None


def directory() -> Path:
    """Where the entries are: $QMPSNAP_RUNTIME_DIR, /run/qmpsnap, or $XDG_RUNTIME_DIR/qmpsnap.

    Raises UsageError when none of them can be.
    """
    if given := os.environ.get("QMPSNAP_RUNTIME_DIR"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/run/qmpsnap")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "qmpsnap"
    raise UsageError("no directory for sockets", hint="set QMPSNAP_RUNTIME_DIR")


def folder(name: str) -> Path:
    """The folder of the VM *name*, mode 0700, made if need be: for its entry and its sockets.

    Raises UsageError for what cannot be a VM's name.
    """
    if not is_vm_name(name):
        raise UsageError(f"not a name for a VM: {name!r}")
    path = directory() / name
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def register(name: str, pid: int, qmp: Path, agent: Path | None = None) -> Iterator[Registered]:
    """The VM *name* is found, as long as its process *pid* lives or until the block ends.

    Raises Refused when a living process has the name.
    """
    entry = enter(name, pid, qmp, agent)
    try:
        yield entry
    finally:
        with _locked(name) as path:
            if _read(path) == entry:
                path.unlink(missing_ok=True)


def enter(name: str, pid: int, qmp: Path, agent: Path | None = None) -> Registered:
    """As `register`, for a process that outlives us: the entry stays, and is stale one day.

    Raises Refused when a living process has the name.
    """
    started = _started(pid)
    if started is None:
        raise Refused(f"{name}: there is no process {pid}")
    entry = Registered(
        name=name, pid=pid, started=started, qmp=str(qmp), agent=str(agent) if agent else None
    )
    with _locked(name) as path:
        if (other := _alive(_read(path))) and other.pid != pid:
            raise Refused(f"{name}: this name is in use by the process {other.pid}")
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        part.touch(mode=0o600)
        part.write_bytes(msgspec.json.encode(entry))
        part.replace(path)
    return entry


def find(name: str) -> Registered | None:
    """The VM *name*, if its process lives. Raises ManifestError for an entry we cannot read."""
    return _alive(_read(_path(name))) if is_vm_name(name) else None


def names() -> list[str]:
    """The VMs that live, in the order of their names."""
    entries = sorted(directory().glob("*/vm.json"))
    return [path.parent.name for path in entries if _alive(_read(path))]


def _path(name: str) -> Path:
    return directory() / name / "vm.json"


def _read(path: Path) -> Registered | None:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        entry = msgspec.json.decode(raw, type=Registered)
    except UNREADABLE as odd:
        raise ManifestError(f"{path}: {odd}") from odd
    if entry.format != _FORMAT or entry.version > _VERSION:
        raise ManifestError(f"{path}: {entry.format} version {entry.version} is not known here")
    return entry


def _alive(entry: Registered | None) -> Registered | None:
    # process ids are used again: the start time tells who it is
    return entry if entry and _started(entry.pid) == entry.started else None


def _started(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, started = fields[0], int(fields[19])
    return None if state in "ZX" else started


@contextlib.contextmanager
def _locked(name: str) -> Iterator[Path]:
    """The path of the entry of *name*, which nobody else changes meanwhile."""
    home = folder(name)
    number = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield home / "vm.json"
    finally:
        os.close(number)
