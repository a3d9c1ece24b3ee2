"""What holds while an input is tried: the only place that bounds time, memory and writing.

A witness sees each file that Python opens for writing, makes, renames or removes (PEP 578), and
each process that it would start, and forbids what is not below the folder that is given to it; the
one process that may be started is qemu-img.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# events, and of each path among their arguments the place, and that of the folder it starts from
_CHANGES = {
    "os.remove": ((0, 1),), "os.rename": ((0, 2), (1, 3)), "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),), "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.truncate": ((0, 9),),
    "os.chmod": ((0, 2),), "os.chown": ((0, 3),), "os.utime": ((0, 3),), "os.setxattr": ((0, 9),),
    "os.removexattr": ((0, 9),),
}  # fmt: skip
_NEVER = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill",
          "os.killpg", "signal.pthread_kill"}  # fmt: skip


class WroteOutside(BaseException):
    """Something was about to be changed that is not below the scratch folder."""


class TooLong(BaseException):
    """An input was not through within its time."""


class _Witness:
    """Stays for the life of the process, as hooks do; looks only while a *folder* is set."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.hooked = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else False
            if writes or (isinstance(flags, int) and flags & _WRITING):
                self._look(event, path)
        elif event in _CHANGES:
            for path, folder in _CHANGES[event]:
                self._look(event, arguments[path], arguments[folder : folder + 1])
        elif event in _NEVER and not (event == "subprocess.Popen" and arguments[0] == "qemu-img"):
            raise WroteOutside(f"{event} {arguments!r:.200}")

    def _look(self, event: str, path: Any, below: tuple[Any, ...] = ()) -> None:
        if isinstance(path, int):
            return  # it was opened, and looked at, before
        if below and below[0] >= 0:
            path = f"/proc/self/fd/{below[0]}/{os.fsdecode(path)}"
        real = os.path.realpath(os.fsdecode(path))
        folder = self.folder
        inside = folder is None or real == folder or real.startswith(f"{folder}/")
        if not inside and real != "/dev/null":
            raise WroteOutside(f"{event} {real}")


_witness = _Witness()


@contextmanager
def guarded(memory: int = 1 << 30) -> Iterator[Path]:
    """For the block nothing is written but below the folder that is given, nor is much memory had.

    *memory* in bytes, on top of what the process has by now.
    """
    if not _witness.hooked:
        sys.addaudithook(_witness)
        _witness.hooked = True
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + memory
    old = signal.signal(signal.SIGALRM, _clock.late)
    _clock.rings_at = 0.0
    with tempfile.TemporaryDirectory(prefix="qmpsnap-fuzz-", dir=_memory()) as name:
        folder = os.path.realpath(name)
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
        _witness.folder = folder
        try:
            yield Path(folder)
        finally:
            _witness.folder = None
            resource.setrlimit(resource.RLIMIT_AS, before)
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)


class _Clock:
    """One alarm for many short blocks: to set it for each would be most of what they take."""

    def __init__(self) -> None:
        self.rings_at, self.inside = 0.0, False

    def late(self, _number: int, _frame: Any) -> None:
        self.rings_at = 0.0
        if self.inside:
            raise TooLong


_clock = _Clock()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises TooLong in the block when it takes longer, or twice as long at most."""
    now = time.monotonic()
    if not now + seconds <= _clock.rings_at <= now + 2 * seconds:
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
        _clock.rings_at = now + 2 * seconds
    _clock.inside = True
    try:
        yield
    finally:
        _clock.inside = False


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
