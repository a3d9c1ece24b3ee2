"""Which host a VM's folder on the store belongs to: the only place that takes and checks leases.

A lease is the file in `STORE/VM/lease` with the highest number. It is taken, and kept, by making
the next number, which a server lets only one client do; see decision 24.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Literal

import msgspec

from qmpsnap.dialect import schema
from qmpsnap.errors import DamagedData, LeaseHeld, LeaseLost, StoreError
from qmpsnap.spelling import encode
from qmpsnap.store import naming, rival
from qmpsnap.store.files import NO_LINKS, make_folders, opened, sync_folder, told, write_all
from qmpsnap.store.head import version_of
from qmpsnap.store.layout import StoreRoot

_NEW = ".new"
_LOOK_EVERY = 5.0  # seconds after which a long verb sees whether it still has it
_TRIES = 1000
_LONGEST = 86400.0  # seconds; no lease lasts longer, whatever it says of itself
_DAMAGED = 3600.0  # nor one that says nothing
_GONE = {errno.ENOENT, errno.ESTALE}


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """A file of `STORE/VM/lease`.

    *holder* is a host's local root, *host* its name, *token* one process of it. *since* is told by
    that host's clock, for people. It lasts for *term_s* from the file's mtime on, unless it was
    *given_up*.
    """

    format: Literal["qmpsnap-lease"] = "qmpsnap-lease"
    version: Literal[1] = 1
    vm: str
    holder: str
    host: str
    token: str
    since: str
    term_s: float
    given_up: bool = False


class Claimant(msgspec.Struct, frozen=True, kw_only=True):
    """Who wants a lease, for how long; *seen* is the local file that remembers a rival's."""

    holder: str
    host: str
    term_s: float
    seen: str


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a VM belongs to now: nobody where *holder* is None; *ends_in_s* by the store's clock.

    *newest* is its newest snapshot on the store, whole or not, whoever has taken it.
    """

    vm: str
    holder: str | None = None
    host: str | None = None
    since: str | None = None
    ends_in_s: float | None = None
    ours: bool = False
    newest: str | None = None


class Held:
    """A lease that this process has. Whoever writes into the VM's folder calls `check` first."""

    def __init__(self, root: StoreRoot, who: Claimant, lease: Lease, number: int) -> None:
        self._root, self._who, self._lease, self._number = root, who, lease, number
        self._checked = self._renewed = _clock()

    def check(self) -> None:
        """It is still ours, and lasts on. Raises LeaseLost, naming who has it; StoreError."""
        now = _clock()
        here, following = self._path(self._number), self._path(self._number + 1)
        with told(here, StoreError):
            try:
                if now - self._renewed >= self._who.term_s / 3:
                    os.utime(here)  # the server's clock sets it, not ours
                    self._renewed = now
                made = _made(here, following, self._lease)
            except OSError as failed:
                if failed.errno not in _GONE:
                    raise
                made = False
        if not made:
            self._lost()
        self._number += 1
        self._checked = now
        with suppress(OSError):
            here.unlink()

    def beat(self) -> None:
        """As `check`, if the last one was a while ago: to be called all the time."""
        if _clock() - self._checked >= min(_LOOK_EVERY, self._who.term_s / 3):
            self.check()

    def give_up(self) -> None:
        """Anybody may have it from now on. Raises LeaseLost, StoreError."""
        self.check()
        self._lease = msgspec.structs.replace(self._lease, given_up=True)
        with _written(self._root, self._lease) as (path, _), told(path, StoreError):
            if not _made(path, self._path(self._number + 1), self._lease):
                self._lost()
            self._path(self._number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return _file(self._root, self._lease.vm, number)

    def _lost(self) -> None:
        standing = look(self._root, self._lease.vm, self._who)
        raise LeaseLost(f"the lease of {self._lease.vm} was lost: {in_words(standing)}")


def take(root: StoreRoot, vm: str, who: Claimant, *, by_force: bool = False) -> Held:
    """The lease of *vm*, if nobody else has it, or *by_force*.

    One that has run out by the store's clock is nobody's; nor is one that *who* has seen unchanged
    for as long as it was to last. Raises LeaseHeld, which names the holder; StoreRefused when the
    store takes *vm* for another VM; StoreError.
    """
    make_folders(root.lease(vm), root.path, side=StoreError)
    with told(root.path, StoreError):
        naming.refuse_alias(root, vm)  # another host may have made the folder just now
    lease = Lease(
        vm=vm, holder=who.holder, host=who.host, token=token_hex(16), term_s=who.term_s,
        since=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )  # fmt: skip
    with _written(root, lease) as (path, now), told(path, StoreError):
        for _ in range(_TRIES):
            newest = _newest(root, vm)
            if newest and not by_force and not _free(root, vm, newest, who, now):
                continue  # it was replaced while we looked
            mine = _file(root, vm, newest + 1)
            if not _made(path, mine, lease):
                continue
            if _newest(root, vm) == newest + 1:
                held = Held(root, who, lease, newest + 1)
                _tidied(root, vm, newest + 1, now)
                rival.forget(Path(who.seen))
                return held
            # this number had been used before, and its file removed: it counts for nothing
            mine.unlink(missing_ok=True)
    raise StoreError(f"{root.lease(vm)}: too many want the lease at once")


def look(root: StoreRoot, vm: str, who: Claimant, *, rivals: bool = False) -> Standing:
    """Whom *vm* belongs to; nothing is taken. Raises StoreError, ManifestError.

    With *rivals* only another one than *who* is told: nothing is written where that has it.
    """
    folder = root.lease(vm)
    with told(folder, StoreError):
        last = str(max(root.ids(vm), default="")) or None
        for _ in range(_TRIES):
            newest = _newest(root, vm)
            if not newest:
                return Standing(vm=vm, newest=last)
            found = _read(_file(root, vm, newest))
            if found is None:
                continue
            lease, mtime = found
            if rivals and lease.holder == who.holder:
                return Standing(vm=vm, newest=last)
            with _written(root, msgspec.structs.replace(lease, token=token_hex(16))) as (_, now):
                left = lease.term_s - (now - mtime)
            if lease.given_up or left <= 0:
                return Standing(vm=vm, newest=last)
            return Standing(
                vm=vm, holder=lease.holder, host=lease.host, since=lease.since,
                ends_in_s=round(left, 1), ours=lease.holder == who.holder,
                newest=last,
            )  # fmt: skip
    raise StoreError(f"{folder}: the lease changes all the time")


def in_words(standing: Standing) -> str:
    """Who has it, and until when."""
    if standing.holder is None:
        return "it belongs to nobody now"
    whose = "this host" if standing.ours else f"the host {standing.host} ({standing.holder[:8]})"
    left = max(0, round(standing.ends_in_s or 0))
    return f"it belongs to {whose} for {left} s more, or longer if that renews it"


def schemas() -> dict[str, dict[str, object]]:
    """The JSON Schema of a lease, by the word that it says of itself."""
    return {"qmpsnap-lease": schema(Lease)}


def _free(root: StoreRoot, vm: str, number: int, who: Claimant, now: float) -> bool:
    """False when it has gone. Raises LeaseHeld when it is another one's."""
    found = _read(_file(root, vm, number))
    if found is None:
        return False
    lease, mtime = found
    left = lease.term_s - (now - mtime)
    if lease.holder == who.holder or lease.given_up or left <= 0:
        return True
    # a store whose clock was put back may say for hours that a lease is new
    if rival.unchanged_for(Path(who.seen), f"{number} {lease.token} {mtime}") > lease.term_s:
        return True
    standing = Standing(vm=vm, holder=lease.holder, host=lease.host, ends_in_s=left)
    raise LeaseHeld(f"{vm} is not this host's on the store: {in_words(standing)}")


@contextmanager
def _written(root: StoreRoot, lease: Lease) -> Iterator[tuple[Path, float]]:
    """*lease* in a file of its own, whole and durable, and the store's time when it was written."""
    path = root.lease(lease.vm) / f"{lease.token}{_NEW}"
    with told(path, StoreError):
        try:
            _write(path, encode(lease))
            yield path, path.stat().st_mtime
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _made(path: Path, to: Path, lease: Lease) -> bool:
    """*to* is *lease*, made by us; False when somebody else made it. Raises OSError."""
    try:
        os.link(path, to, follow_symlinks=False)
    except FileExistsError:
        # NFS: also when the answer to our first attempt was lost, and it was made again
        found = _read(to)
        return found is not None and found[0].token == lease.token
    except OSError as failed:
        if failed.errno not in NO_LINKS:
            raise
        try:
            _write(to, encode(lease))
        except FileExistsError:
            return False
    sync_folder(to.parent)
    return True


def _read(path: Path) -> tuple[Lease, float] | None:
    """The lease and its mtime; None when it has gone. One that is damaged is a stranger's."""
    try:
        with opened(path, StoreError) as descriptor:
            mtime, content = os.fstat(descriptor).st_mtime, os.read(descriptor, 65536)
    except StoreError as failed:
        if isinstance(failed.__cause__, OSError) and failed.__cause__.errno in _GONE:
            return None
        raise
    try:
        version_of(content, "qmpsnap-lease", 1, path)
        lease = msgspec.json.decode(content, type=Lease)
        return msgspec.structs.replace(lease, term_s=min(lease.term_s, _LONGEST)), mtime
    except (DamagedData, msgspec.DecodeError, UnicodeDecodeError):
        vm = path.parent.parent.name
        return Lease(vm=vm, holder="?", host="?", token="?", since="?", term_s=_DAMAGED), mtime


def _newest(root: StoreRoot, vm: str) -> int:
    """The highest number; 0 when there is none. Raises OSError."""
    try:
        return max((_number(path.name) for path in root.lease(vm).iterdir()), default=0)
    except FileNotFoundError:
        return 0


def _number(name: str) -> int:
    stem, _, suffix = name.partition(".")
    return int(stem) if suffix == "json" and stem.isdecimal() and stem.isascii() else 0


def _file(root: StoreRoot, vm: str, number: int) -> Path:
    return root.lease(vm) / f"{number:08d}.json"


def _tidied(root: StoreRoot, vm: str, number: int, now: float) -> None:
    """What was before *number* goes, the lowest first: while one is there, those after it are.

    So do files that were never given a number, of processes that died.
    """
    with suppress(OSError):
        for path in sorted(root.lease(vm).iterdir()):
            stale = path.name.endswith(_NEW) and now - path.stat().st_mtime > _LONGEST
            if stale or 0 < _number(path.name) < number:
                path.unlink(missing_ok=True)


def _clock() -> float:
    """Seconds that no change of the time touches, and that a suspended host counts too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
