"""One engine at a time a VM: the only place that takes a lock on the local root."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from qmpsnap import private
from qmpsnap.errors import UNREADABLE, LocalFailed, VmBusy


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a lock: its process, its verb, and since when (ISO 8601, UTC)."""

    pid: int
    what: str
    since: str


@asynccontextmanager
async def held(path: Path, what: str) -> AsyncIterator[None]:
    """For the body, no other engine passes *path*; *what* is the verb that others are told.

    The kernel gives the lock back when the body ends, and also when the process dies. The file
    stays: were it deleted, two engines could hold locks on two files of one name.

    Raises VmBusy, naming the holder, or LocalFailed.
    """
    descriptor = taken(path, what)
    try:
        yield
    finally:
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def taken(path: Path, what: str) -> int:
    """As `held`, for as long as anybody has the descriptor open that is returned.

    A process that inherits it goes on holding the lock when its parent lets go.
    """
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as failed:
        try:
            if isinstance(failed, BlockingIOError):
                raise VmBusy(_busy(path, descriptor)) from None
            raise LocalFailed(f"{path}: {failed.strerror}") from failed
        finally:
            os.close(descriptor)
    _sign(descriptor, what)
    return descriptor


def is_taken(path: Path) -> bool:
    """Whether somebody holds that lock now; not where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _open(path: Path) -> int:
    try:
        private.folders(path.parent)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as failed:
        raise LocalFailed(f"{path}: {failed.strerror}") from failed


def _sign(descriptor: int, what: str) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    text = msgspec.json.encode(Holder(pid=os.getpid(), what=what, since=now))
    # A full disk must not keep `recover` out: the lock holds without its holder's name.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)


def _busy(path: Path, descriptor: int) -> str:
    vm = path.parent.name
    try:
        holder = msgspec.json.decode(os.pread(descriptor, 4096, 0), type=Holder)
    except (OSError, *UNREADABLE):
        return f"{vm} is held by another qmpsnap (its name is not in {path})"
    return f"{vm} is held by `{holder.what}` of process {holder.pid} since {holder.since}"
