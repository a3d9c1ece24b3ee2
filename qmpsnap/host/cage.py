"""A control group of our own for one process: the only place that makes and removes groups."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import select
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qmpsnap.errors import Blocked
from qmpsnap.host.site import Site
from qmpsnap.shield import finish

log = logging.getLogger(__name__)
_PREFIX = "qmpsnap-"
_WITHIN = 10.0  # seconds for the groups to be gone once their last process has ended
# Puts itself into the groups and becomes "$@" behind `--`: what runs was never anywhere else.
_ENTER = """\
while [ "$1" != -- ]; do echo 0 >"$1/cgroup.procs" || exit 126; shift; done; shift; exec "$@"
"""
# Waits for the last holder. The kernel closes the files of a process before it takes it out of its
# group: hence the tries.
_REMOVE = """\
exec 9<"$1" && flock 9 && exec 9<&- || exit
for one; do tries=0
  while [ -d "$one" ] && ! rmdir "$one" 2>/dev/null && [ $((tries += 1)) -lt 100 ]; do
    sleep 0.05
  done
done
"""
_NOBODYS = '"$@" &'


@dataclass(slots=True)
class Cage:
    """Groups of one name, one in each hierarchy that is needed.

    *words* before a command line start it inside, from its first moment. The descriptors *hold*
    are for it to inherit: the groups stay as long as somebody has them.
    """

    folders: tuple[Path, ...]
    hold: tuple[int, ...]
    _left: bool = field(default=False, init=False)

    @property
    def words(self) -> list[str]:
        return ["/bin/sh", "-c", _ENTER, "sh", *map(str, self.folders), "--"]

    def leave(self) -> None:
        """What is inside goes on without us; the groups go when it ends."""
        self._left = True


@asynccontextmanager
async def made(site: Site, name: str) -> AsyncIterator[Cage]:
    """Groups for *site*, called `qmpsnap-NAME-` and a random end, their limits set.

    They are gone after the block, unless it has left them; whoever is inside must have ended then.
    A process of nobody's removes them when the last holder has ended, so they go also when we are
    killed. Were it killed as well, the next `made` in the same place removes what is left.

    Raises Blocked, naming controller and file, when the kernel refuses; then nothing is left.
    """
    if site.troubles:
        raise Blocked("; ".join(site.troubles))
    async with contextlib.AsyncExitStack() as stack:
        cage = await asyncio.to_thread(_made, site, name)
        done = _watched(cage)
        stack.callback(os.close, done)
        try:
            yield cage
        finally:
            for number in cage.hold:
                os.close(number)
            if not cage._left:
                await finish(_gone(cage, done), within=_WITHIN + 5)


def _made(site: Site, name: str) -> Cage:
    called = f"{_PREFIX}{name}-{secrets.token_hex(3)}"
    places = {hierarchy: parent / called for hierarchy, parent in site.parents.items()}
    folders = tuple(dict.fromkeys(places.values()))  # v1 controllers may be mounted together
    with contextlib.ExitStack() as stack:
        _swept(site)
        for name in site.enable:
            _write(name, site.parents[""] / "cgroup.subtree_control", f"+{name}")
        hold = []
        for folder in folders:
            hold.append(_make(folder))
            stack.callback(_unmake, folder, hold[-1])
        for one in site.settings:
            _write(one.controller, places[one.hierarchy] / one.file, one.text)
        stack.pop_all()
    return Cage(folders, tuple(hold))


def _write(controller: str, file: Path, text: str) -> None:
    try:
        number = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(number, text.encode())
        finally:
            os.close(number)
    except OSError as failed:
        raise Blocked(f"{controller}: {file}: {text!r}: {failed.strerror}") from failed


def _make(folder: Path) -> int:
    """Makes *folder*, and gives a descriptor of it that says that it is in use."""
    with _alone(folder.parent, fcntl.LOCK_SH):
        try:
            folder.mkdir()
        except OSError as failed:
            raise Blocked(f"{folder}: {failed.strerror}") from failed
        # not below 10, which are those that a shell uses for its redirections
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        number = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 10)
        os.close(opened)
        fcntl.flock(number, fcntl.LOCK_EX)
    return number


def _unmake(folder: Path, number: int) -> None:
    os.close(number)
    folder.rmdir()


@contextlib.contextmanager
def _alone(parent: Path, kind: int) -> Iterator[None]:
    """Between the making of a group and its lock nobody takes it for one that was left."""
    number = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(number, kind)
        yield
    finally:
        os.close(number)


def _swept(site: Site) -> None:
    for parent in set(site.parents.values()):
        with contextlib.suppress(OSError), _alone(parent, fcntl.LOCK_EX | fcntl.LOCK_NB):
            for folder in parent.glob(f"{_PREFIX}*"):
                _removed(folder)


def _removed(folder: Path) -> None:
    """*folder*, unless somebody holds it, or somebody is inside."""
    try:
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder.rmdir()
            log.warning("removed the control group %s that was left behind", folder)
    finally:
        os.close(number)


def _watched(cage: Cage) -> int:
    """Starts who removes the groups; the descriptor that comes back ends when they are gone."""
    remove = ["/bin/sh", "-c", _REMOVE, "sh", *map(str, cage.folders)]
    words = ["/bin/sh", "-c", _NOBODYS, "sh", *remove]
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        null = subprocess.DEVNULL
        subprocess.run(  # it comes back at once: the shell does not wait for its child
            words, stdin=null, stdout=theirs, stderr=null, start_new_session=True, check=True
        )
    finally:
        os.close(theirs)
    return ours


async def _gone(cage: Cage, done: int) -> None:
    seen, _, _ = await asyncio.to_thread(select.select, [done], [], [], _WITHIN)
    left = [str(folder) for folder in cage.folders if folder.exists()]
    if left:
        told = "somebody is still inside" if seen else f"not within {_WITHIN:g} s"
        log.warning("control groups are left behind, %s: %s", told, ", ".join(left))
