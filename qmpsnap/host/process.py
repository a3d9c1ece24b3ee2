"""The processes of this host, QEMU's above all: the only place that uses psutil."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec
import psutil

from qmpsnap.errors import LocalFailed
from qmpsnap.host import cgroup, unixsocket

T = TypeVar("T")


class ProcessFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is; None where we may not look. *started_at* is ISO 8601, UTC.

    *cgroups* maps each v1 controller (and "" for v2) to the process' group.
    """

    pid: int
    name: str
    exe: str | None
    argv: list[str] | None
    cwd: str | None
    started_at: str
    uid: int | None
    cgroups: dict[str, str]


def find_owner(socket_path: Path) -> int | None:
    """The process that listens at *socket_path*; of several, one that is called qemu.

    None when there is none, or none that we may see. Raises LocalFailed.
    """
    owners = [pid for pid, _ in _listening(socket_path)]
    return next((pid for pid in owners if "qemu" in _called(pid)), owners[0] if owners else None)


def of_thread(thread_id: int) -> int | None:
    """The process that a thread of this host belongs to; None when there is no such thread."""
    try:
        status = Path(f"/proc/{thread_id}/status").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(fields["Tgid"])


def holder_of_connection(socket_path: Path) -> str | None:
    """Who is connected to the socket at *socket_path*, such as "virsh (process 4711)".

    None when nobody is, or when it cannot be found out.
    """
    with suppress(OSError, LocalFailed):
        for name in {name for _, name in _listening(socket_path)}:
            for pid, _ in _holding(unixsocket.peers(name)):
                return f"{_called(pid)} (process {pid})"
    return None


def describe(pid: int) -> ProcessFacts:
    """What the process is. Raises LocalFailed when it is gone."""
    process = _process(pid)
    return ProcessFacts(
        pid=pid,
        name=_called(pid),
        exe=_allowed(process.exe) or None,
        argv=_allowed(process.cmdline),
        cwd=_allowed(process.cwd) or None,
        started_at=_moment(process.create_time()),
        uid=_allowed(lambda: process.uids().effective),
        cgroups=cgroup.groups_of(pid),
    )


def started(pid: int) -> float:
    """When the process was started, in seconds since the epoch, to a hundredth.

    `ProcessFacts.started_at` counts from a boot time that the kernel cuts to whole seconds: it
    tells processes apart, and may be a second early. Raises LocalFailed when it is gone.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as gone:
        raise LocalFailed(f"there is no process {pid} any more") from gone
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def identified(process: ProcessFacts | None) -> ProcessFacts | None:
    """What tells it from another; its command line is long, and may hold secrets."""
    if process is None:
        return None
    return msgspec.structs.replace(process, exe=None, argv=None, cwd=None, cgroups={})


def still_runs(known: ProcessFacts) -> bool:
    """Whether that very process lives, and is not merely waiting to be reaped."""
    try:
        one = psutil.Process(known.pid)
        zombie = one.status() == psutil.STATUS_ZOMBIE
        return not zombie and _moment(one.create_time()) == known.started_at
    except psutil.Error:
        return False


def ends(known: ProcessFacts, within: float) -> bool:
    """Whether that very process has ended, or does so within *within* seconds. Blocks."""
    try:
        pidfd = os.pidfd_open(known.pid)
    except ProcessLookupError:
        return True
    try:
        return not still_runs(known) or bool(select.select([pidfd], [], [], within)[0])
    finally:
        os.close(pidfd)


def _listening(socket_path: Path) -> Iterator[tuple[int, str]]:
    """Each process that has the socket at *socket_path*, with the name it was bound to."""
    real = os.path.realpath(socket_path)
    try:
        names = dict(unixsocket.listeners(socket_path))
    except OSError as failed:
        raise LocalFailed(f"/proc/net/unix: {failed.strerror}") from failed
    for pid, inode in _holding(names):
        name = names[inode]
        if name.startswith("/") or os.path.realpath(Path(f"/proc/{pid}/cwd", name)) == real:
            yield pid, name


def _holding(inodes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Each (process, inode) of the sockets *inodes*; processes that we may not see are left out."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    for pid in psutil.pids() if wanted else []:
        with suppress(OSError):
            links = list(Path(f"/proc/{pid}/fd").iterdir())
            for link in links:
                with suppress(OSError):
                    if (inode := wanted.get(str(link.readlink()))) is not None:
                        yield pid, inode


def _process(pid: int) -> psutil.Process:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess as gone:
        raise LocalFailed(f"there is no process {pid} any more") from gone


def _allowed(ask: Callable[[], T]) -> T | None:
    """What *ask* says, or None where it is not for us to know. Raises LocalFailed."""
    try:
        return ask()
    except psutil.NoSuchProcess as gone:
        raise LocalFailed(f"there is no process {gone.pid} any more") from gone
    except (psutil.AccessDenied, OSError):
        return None


def _called(pid: int) -> str:
    """The name of the program, or of the process where the program cannot be seen."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/exe").readlink().name
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "?"


def _moment(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return moment.replace("+00:00", "Z")
