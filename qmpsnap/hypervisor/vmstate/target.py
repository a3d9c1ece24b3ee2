"""Where a captured stream goes: a file on a local disk, whichever way this QEMU takes it.

`direct` lets QEMU write the file itself. `drained` puts a pipe and a process of its own between:
what reads never stops reading, even when the disk is full or the engine is dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qmpsnap.errors import CommandRefused, LocalFailed, MigrationFailed, MonitorLost
from qmpsnap.hypervisor.monitor import Monitor, settle
from qmpsnap.shield import finish

_DRAIN = Path(__file__).with_name("drain.py")
_FDNAME = "qmpsnap-out"
_OPAQUE = "qmpsnap"
_A_BIT = 1 << 20  # bytes: with less room than that a file system counts as full


@dataclass(frozen=True, slots=True)
class Target:
    """*uri* is what `migrate` is given."""

    uri: str


@asynccontextmanager
async def direct(monitor: Monitor, path: Path, *, file_uri: bool) -> AsyncIterator[Target]:
    """A new file at *path* that QEMU writes; whole and fsynced when the block ends well.

    We keep a descriptor of our own open to the end: the last close of a freshly written file can
    block QEMU's main loop, and the guest with it, for a second (seen on 7.2, 10.0 and 11.1).

    Raises LocalFailed when the file cannot be made or synced, or has no room.
    """
    fd = _create(path)
    set_id: int | None = None
    try:
        try:
            await monitor.send_fd(fd)
            if file_uri:
                set_id = (await monitor.query("add-fd", _Set, {"opaque": _OPAQUE})).fdset_id
                yield Target(f"file:/dev/fdset/{set_id}")
            else:  # 7.2 has no file: URI; 11 takes no regular file as fd:
                await monitor.execute("getfd", {"fdname": _FDNAME})
                yield Target(f"fd:{_FDNAME}")
            await _in_thread_synced(fd, path)
        except MigrationFailed as failed:
            if full := _full(fd):
                raise LocalFailed(f"{path}: {full}; {failed}") from failed
            raise
    except BaseException:
        await finish(asyncio.to_thread(_emptied, fd), within=10)
        raise
    finally:
        try:
            await finish(_forget(monitor, set_id), within=10)
        finally:
            await asyncio.to_thread(os.close, fd)


@asynccontextmanager
async def drained(monitor: Monitor, path: Path, *, size: int) -> AsyncIterator[Target]:
    """A new file at *path*, of which *size* bytes are allocated before the guest is touched.

    The reading process has a session of its own and reads to the end whatever happens. When the
    block ends well the file holds the whole stream, synced; else LocalFailed.
    """
    fd = _create(path)
    reading, writing = os.pipe()
    try:
        try:
            await asyncio.to_thread(os.posix_fallocate, fd, 0, size)
        except OSError as full:
            await finish(asyncio.to_thread(_emptied, fd), within=10)
            raise LocalFailed(
                f"{path}: no room for the guest's RAM ({size >> 20} MiB): {full.strerror}"
            ) from full
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", str(_DRAIN), str(reading), str(fd)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            # it outlives us for as long as QEMU has the pipe: who waits for our end reads to ours
            stderr=asyncio.subprocess.DEVNULL,
            pass_fds=(reading, fd),
            start_new_session=True,
        )
        os.close(reading)
        reading = -1
        # an interpreter that is still starting would take a CPU from QEMU while the guest is held
        assert process.stdout is not None
        await process.stdout.readline()
        await monitor.send_fd(writing)
        await monitor.execute("getfd", {"fdname": _FDNAME})
        os.close(writing)
        writing = -1
        ended = False
        try:
            yield Target(f"fd:{_FDNAME}")
            ended = True
        finally:
            if not ended:
                await finish(_forget(monitor, None), within=10)
        report, _ = await process.communicate()
        outcome = json.loads(report or b"{}")
        if outcome.get("error") or "bytes" not in outcome:
            raise LocalFailed(f"{path}: {outcome.get('error') or 'the reading process died'}")
    finally:
        for open_fd in (reading, writing, fd):
            if open_fd >= 0:
                os.close(open_fd)


class _Fd(msgspec.Struct, frozen=True):
    opaque: str | None = None


class _Set(msgspec.Struct, frozen=True, rename="kebab"):
    fdset_id: int
    fds: list[_Fd] = []


def _create(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as failed:
        raise LocalFailed(f"{path}: {failed.strerror}") from failed


def _full(fd: int) -> str:
    """Why the file takes no more, if so: QEMU does not tell that apart from its other troubles."""
    try:
        os.posix_fallocate(fd, os.fstat(fd).st_size, _A_BIT)
    except OSError as full:
        return os.strerror(full.errno or 0)
    return ""


def _emptied(fd: int) -> None:
    """Give back the room of what is no use any more: the guest may write to that file system."""
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)


async def _in_thread_synced(fd: int, path: Path) -> None:
    try:
        await asyncio.to_thread(os.fsync, fd)
    except OSError as failed:
        raise LocalFailed(f"{path}: {failed.strerror}") from failed


async def _forget(monitor: Monitor, set_id: int | None) -> None:
    async def forgotten(current: Monitor) -> None:
        if set_id is None:
            await current.execute("closefd", {"fdname": _FDNAME})
        else:
            await current.execute("remove-fd", {"fdset-id": set_id})

    # refused: QEMU has taken it by itself, or never had it
    with contextlib.suppress(CommandRefused, MonitorLost):
        await settle(monitor, forgotten)


async def forget_all(monitor: Monitor) -> None:
    """Close the descriptors that an engine that died left in QEMU."""
    for fdset in await monitor.query("query-fdsets", list[_Set]):
        if any(fd.opaque == _OPAQUE for fd in fdset.fds):
            await _forget(monitor, fdset.fdset_id)
    await _forget(monitor, None)
