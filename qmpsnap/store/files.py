"""Whole files or no files: the only place that publishes, copies and digests what is kept."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3

from qmpsnap.errors import DigestMismatch, LocalFailed, StoreAway, StoreError
from qmpsnap.store.layout import PARTIAL
from qmpsnap.store.manifest import FileEntry

Side = type[StoreError] | type[LocalFailed]
"""Which of the two roots a path is on: the error that its troubles are raised as."""

Progress = Callable[[int, int, str], None]
"""Told bytes done, bytes in all, and what is being done."""

CHUNK = 4 << 20
PIECE = 256 << 10
"""Read at a time, so that a store of 100 kB/s is seen to make progress every few seconds."""
_SYNC_AT_MOST = 8 * CHUNK
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
"""What a file system says that makes no links, or no more of this file."""
_PLAIN = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.ESTALE: "the file handle is stale: the server has another file system now",
}

_PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN,
    errno.EREMOTEIO, errno.EAGAIN, errno.EINTR, errno.EBADF,
}  # fmt: skip
"""What a store says that may be well again when it is asked once more."""


@contextmanager
def told(path: Path, side: Side) -> Iterator[None]:
    """OSErrors of the body become *side*'s error, which names *path* and the errno.

    One of the store that may pass by itself is a StoreAway.
    """
    try:
        yield
    except OSError as failed:
        number = failed.errno or 0
        name = errno.errorcode.get(number, "unknown error")
        kind = StoreAway if side is StoreError and number in _PASSING else side
        raise kind(
            f"{failed.filename or path}: {_PLAIN.get(number, failed.strerror)} ({name})"
        ) from failed


def make_folders(path: Path, below: Path, *, side: Side) -> None:
    """Make *path* and its parents up to, and without, *below*: mode 0700, durable.

    *below* must be there: a root that is not mounted is not replaced by a folder. A symbolic link
    on the way is refused, as it could lead anywhere. Raises *side*.
    """
    with told(path, side):
        here = below
        for part in path.relative_to(below).parts:
            parent, here = here, here / part
            with suppress(FileExistsError):
                here.mkdir(mode=0o700)
                sync_folder(parent)
            if not stat.S_ISDIR(here.lstat().st_mode):
                raise side(f"{here}: not a folder of ours")


def sync_folder(path: Path) -> None:
    """Make the names in *path* durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def opened(path: Path, side: Side) -> Iterator[int]:
    """A regular file, open for reading: never through a symbolic link, never a pipe that waits.

    Raises *side*; the body's own OSErrors become *side*'s too.
    """
    with told(path, side):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise side(f"{path}: not a regular file")
            yield descriptor
        finally:
            os.close(descriptor)


@contextmanager
def partial(path: Path, side: Side) -> Iterator[int]:
    """A new file under the `.partial` name of *path*, which takes its own name when the body ends.

    It is durable then. A body that fails leaves neither. What an earlier run left under the
    `.partial` name is written anew. Raises *side*, also when *path* exists by then.
    """
    part = path.with_name(path.name + PARTIAL)
    with told(path, side):
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            try:
                yield descriptor
                os.fsync(descriptor)  # NFS: a failed write may be told only here, or by close()
            finally:
                os.close(descriptor)
            _settle(part, path)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        sync_folder(path.parent)


def _settle(part: Path, path: Path) -> None:
    try:
        os.link(part, path)  # unlike a rename, this never replaces
    except OSError as failed:
        if failed.errno == errno.EEXIST and path.exists() and path.samefile(part):
            return  # NFS: the answer to our first attempt was lost, and it was made again
        if failed.errno not in NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from failed
        part.rename(path)


def forget_partial(path: Path, side: Side) -> None:
    """Remove the other name of *path* that a run left which died before it was unlinked.

    Nobody may be writing *path* meanwhile. Raises *side*.
    """
    with told(path, side):
        path.with_name(path.name + PARTIAL).unlink(missing_ok=True)


def publish(path: Path, content: bytes, *, side: Side = StoreError) -> None:
    """Make *content* appear at *path*: whole, durable, mode 0600, never over another content.

    A file that holds *content* already is as good. Raises *side*.
    """
    if os.path.lexists(path):
        if read_small(path, side=side, limit=len(content) + 1) != content:
            raise side(f"{path}: exists, with another content")
        forget_partial(path, side)
        return
    with partial(path, side) as descriptor:
        write_all(descriptor, content)


def replace(path: Path, content: bytes, *, side: Side) -> None:
    """Put *content* in the place of what *path* holds: always one or the other. Raises *side*."""
    part = path.with_name(path.name + PARTIAL)
    with told(path, side):
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            write_all(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        part.replace(path)
        sync_folder(path.parent)


def read_small(path: Path, *, side: Side, limit: int = 16 << 20) -> bytes:
    """The first *limit* bytes of *path*. Raises *side*."""
    with opened(path, side) as descriptor:
        return b"".join(_chunks(descriptor, limit))


def digest_bytes(content: bytes) -> str:
    """The BLAKE3 of *content*, as it stands in the manifests."""
    return blake3(content).hexdigest()


def digest_file(
    path: Path, *, side: Side = StoreError, on_progress: Progress | None = None
) -> tuple[int, str]:
    """The size in bytes and the BLAKE3 of *path*. Raises *side*."""
    hasher, done = blake3(), 0
    with opened(path, side) as descriptor:
        total = os.fstat(descriptor).st_size
        for chunk in _chunks(descriptor):
            hasher.update(chunk)
            done += len(chunk)
            if on_progress is not None:
                on_progress(done, total, f"reading {path.name}")
    return done, hasher.hexdigest()


def expect(
    path: Path, entry: FileEntry, *, side: Side, on_progress: Progress | None = None
) -> None:
    """Raises DigestMismatch when *path* is not the file that *entry* describes, and *side*."""
    expect_size(path, entry, side=side)
    if digest_file(path, side=side, on_progress=on_progress) != (entry.bytes, entry.blake3):
        raise DigestMismatch(f"{path}: the content is not what the manifest says (BLAKE3)")


def expect_size(path: Path, entry: FileEntry, *, side: Side) -> None:
    """As `expect`, without a look at the content."""
    with opened(path, side) as descriptor:
        size = os.fstat(descriptor).st_size
    if size != entry.bytes:
        raise DigestMismatch(f"{path}: has {size} bytes, not {entry.bytes}")


def copy_verified(
    src: Path,
    dst: Path,
    entry: FileEntry,
    on_progress: Progress | None = None,
    *,
    source: Side = LocalFailed,
    target: Side = StoreError,
) -> None:
    """Publish a copy of *src* at *dst* and read it back from there before it gets its name.

    A *dst* that is already what *entry* says is left alone. Progress is told for what has reached
    the target's disk, not its cache.

    Raises DigestMismatch when *src* is not what *entry* says; *target* when *dst* holds something
    else or does not give back what was written; *source* and *target* for their own troubles.
    """
    if os.path.lexists(dst):
        try:
            expect(dst, entry, side=target, on_progress=on_progress)
        except DigestMismatch as other:
            raise target(f"{dst}: exists, with another content") from other
        forget_partial(dst, target)
        return
    with opened(src, source) as reading, partial(dst, target) as writing:
        hasher, done, synced, step = blake3(), 0, 0, PIECE
        for chunk in _read_as(src, source, reading):
            hasher.update(chunk)
            write_all(writing, chunk)
            done += len(chunk)
            if done - synced >= step or done >= entry.bytes:
                began = time.monotonic()
                os.fdatasync(writing)
                step, synced = _next_step(step, time.monotonic() - began), done
                _tell(on_progress, done, entry.bytes, f"copying {entry.name}")
            if done > entry.bytes:
                break
        if (done, hasher.hexdigest()) != (entry.bytes, entry.blake3):
            raise DigestMismatch(f"{src}: the content is not what the manifest says (BLAKE3)")
        read_back(writing, dst, entry, on_progress, target)


def _next_step(step: int, took: float) -> int:
    """How many bytes are to be synced next, when *step* of them took as many seconds.

    Nothing is known of a sync before it ends, and a slow store must not pass for a dead one.
    """
    if took < 0.25:
        return min(2 * step, _SYNC_AT_MOST)
    return step if took < 1 else max(step // 4, PIECE)


def copy_to_fd(
    path: Path, fd: int, entry: FileEntry, *, side: Side, on_progress: Progress | None = None
) -> int:
    """Write *path* into *fd*, which may be a pipe and is left open; the bytes are returned.

    Raises DigestMismatch when it was not what *entry* says (known only at the end), *side*, and
    LocalFailed when *fd* takes no more.
    """
    hasher, done = blake3(), 0
    with opened(path, side) as reading:
        for chunk in _read_as(path, side, reading):
            hasher.update(chunk)
            done += len(chunk)
            if done > entry.bytes:
                break
            with told(Path(f"/proc/self/fd/{fd}"), LocalFailed):
                write_all(fd, chunk)
            _tell(on_progress, done, entry.bytes, f"reading {entry.name}")
    if (done, hasher.hexdigest()) != (entry.bytes, entry.blake3):
        raise DigestMismatch(f"{path}: the content is not what the manifest says (BLAKE3)")
    return done


def _read_as(path: Path, side: Side, descriptor: int) -> Iterator[bytes]:
    """The chunks of *path*, its OSErrors told as *side*'s before an outer `told` sees them."""
    chunks = _chunks(descriptor)
    while True:
        with told(path, side):
            chunk = next(chunks, b"")
        if not chunk:
            return
        yield chunk


def read_back(
    descriptor: int, path: Path, entry: FileEntry, on_progress: Progress | None, side: Side
) -> None:
    """Raises *side* unless the server, not our cache, gives back what *entry* says. OSError."""
    os.fsync(descriptor)
    # What is in our cache proves nothing about the server: drop it, and read again
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(descriptor, 0, os.SEEK_SET)
    hasher, done = blake3(), 0
    for chunk in _chunks(descriptor):
        hasher.update(chunk)
        done += len(chunk)
        _tell(on_progress, done, entry.bytes, f"reading back {entry.name}")
    if (done, hasher.hexdigest()) != (entry.bytes, entry.blake3):
        raise side(f"{path}: reads back other than it was written")


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of *content*, however little is taken at a time. Raises OSError."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _chunks(descriptor: int, limit: int | None = None) -> Iterator[bytes]:
    left = limit
    while chunk := os.read(descriptor, PIECE if left is None else min(PIECE, left)):
        yield chunk
        if left is not None:
            left -= len(chunk)


def _tell(on_progress: Progress | None, done: int, total: int, what: str) -> None:
    if on_progress is not None:
        on_progress(done, total, what)
