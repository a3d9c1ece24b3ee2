"""A file system that fails on demand: a folder passed through FUSE, spoken by hand, as root.

There is no device-mapper everywhere, and a shim in the engine would miss qemu-img. The server is a
process of its own, so that whoever waits for it cannot wait for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rig.qemu import ROOT

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_MAX_WRITE = 128 << 10
_MAX_PAGES, _BIG_WRITES = 1 << 22, 1 << 5
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Manners:
    """What a file system is like that does not fail: *folds*, it takes names that differ in case
    for one; *lowers*, and writes them down small; *longest*: no name has more bytes; *ahead*: its
    clock is by so many seconds, of which there may be less than none."""

    folds: bool = False
    lowers: bool = False
    longest: int = 255
    ahead: int = 0

    def words(self) -> list[str]:
        return [str(int(it)) for it in (self.folds, self.lowers, self.longest, self.ahead)]

    @classmethod
    def of(cls, words: Sequence[str]) -> Manners:
        folds, lowers, longest, ahead = map(int, words)
        return cls(bool(folds), bool(lowers), longest, ahead)


_GOOD = Manners()


@dataclass(frozen=True, slots=True)
class BadFs:
    """*path* shows what is in a folder elsewhere; images in it fail as they are told to."""

    path: Path
    control: Path
    seen: Path

    def fails(self, how: str = "") -> None:
        """From now on: `write N` and `fsync N` are EIO after N bytes of an image; `slow S` takes
        S seconds a write; `hang` does not return before it is told otherwise; `full` and `readonly`
        are ENOSPC and EROFS for whatever makes something new. "": nothing fails."""
        new = self.control.with_suffix(".new")
        new.write_text(how)
        self.seen.write_bytes(b"")
        new.rename(self.control)

    @property
    def happened(self) -> int:
        """How often it has failed since it was told to."""
        return self.seen.stat().st_size


@contextlib.contextmanager
def badfs(
    path: Path, aside: Path, *, images: bool = True, manners: Manners = _GOOD
) -> Iterator[BadFs]:
    """A file system at *path* for the block, its content in *aside*. Needs root and /dev/fuse.

    Without *images*, all of its files fail, not only those of disks.
    """
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        if os.environ.get("CI"):
            pytest.fail("no FUSE here: root and /dev/fuse are needed")
        pytest.skip("no FUSE here: root and /dev/fuse are needed")
    path.mkdir()
    (aside / "content").mkdir(parents=True)
    it = BadFs(path, aside / "control", aside / "seen")
    it.fails()
    line = [
        "setpriv",
        "--pdeathsig=KILL",
        sys.executable,
        "-m",
        "tests.faults.badfs",
        str(path),
        str(aside),
        "images" if images else "all",
        *manners.words(),
    ]
    server = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == b"ready\n"
        yield it
        it.fails()
    finally:
        server.kill()  # whoever still waits for it gets an error
        server.wait()
        server.stdout.close()
        _libc.umount2(os.fsencode(path), _MNT_DETACH)


class _Server:
    def __init__(self, aside: Path, *, images: bool, manners: Manners) -> None:
        self._manners = manners
        self._control, self._seen = aside / "control", aside / "seen"
        self._every = not images
        self._nodes = {1: os.open(aside / "content", os.O_PATH)}
        self._images: set[int] = set()
        self._written = 0

    def answer(self, opcode: int, node: int, body: bytes) -> bytes | None:
        """The reply to one request; None if it wants none. Raises OSError."""
        if opcode in (2, 42):  # FORGET: few files, and a short life
            return None
        do: Callable[[int, bytes], bytes] | None = getattr(self, f"_{_NAMES.get(opcode)}", None)
        if do is None:
            raise OSError(errno.ENOSYS, "")
        return do(node, body)

    def _init(self, _: int, body: bytes) -> bytes:
        _, _, ahead, _ = struct.unpack_from("<4I", body)
        flags = _MAX_PAGES | _BIG_WRITES
        numbers = (7, 31, ahead, flags, 12, 10, _MAX_WRITE, 1, _MAX_WRITE // 4096, 0)
        return struct.pack("<4I2H2I2H", *numbers).ljust(64, b"\0")

    def _lookup(self, node: int, body: bytes) -> bytes:
        name = self._name(node, body)
        return self._entry(os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._nodes[node]))

    def _name(self, node: int, body: bytes) -> bytes:
        """How the first name in *body* is written down in a folder."""
        name = body.split(b"\0", 1)[0]
        if len(name) > self._manners.longest:
            raise OSError(errno.ENAMETOOLONG, "")
        if self._manners.folds:
            there = (os.fsencode(one.name) for one in Path(self._path(node)).iterdir())
            name = next((one for one in there if one.lower() == name.lower()), name)
        return name.lower() if self._manners.lowers else name

    def _entry(self, fd: int) -> bytes:
        found = os.fstat(fd)
        known = 1 if found.st_ino == os.fstat(self._nodes[1]).st_ino else found.st_ino + 1
        if known in self._nodes:
            os.close(fd)
        else:
            self._nodes[known] = fd  # while it is open, its number is not given again
        return struct.pack("<4Q2I", known, 0, 0, 0, 0, 0) + self._attr(found)

    def _path(self, node: int) -> str:
        return f"/proc/self/fd/{self._nodes[node]}"

    def _attr(self, of: os.stat_result) -> bytes:
        times = [at + self._manners.ahead * 10**9
                 for at in (of.st_atime_ns, of.st_mtime_ns, of.st_ctime_ns)]  # fmt: skip
        seconds, rest = [at // 10**9 for at in times], [at % 10**9 for at in times]
        return _ATTR.pack(
            of.st_ino, of.st_size, of.st_blocks, *seconds, *rest, of.st_mode, of.st_nlink,
            of.st_uid, of.st_gid, 0, of.st_blksize, 0,
        )  # fmt: skip

    def _getattr(self, node: int, _: bytes) -> bytes:
        return struct.pack("<Q2I", 0, 0, 0) + self._attr(os.fstat(self._nodes[node]))

    def _setattr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size, _, atime, mtime, _, ans, mns, _, mode = struct.unpack_from(
            "<2I6Q4I", body
        )
        path = self._path(node)
        if valid & 1:
            Path(path).chmod(stat.S_IMODE(mode))
        if valid & 8:
            os.truncate(path, size)
        if valid & 0x30:
            now, ahead = time.time_ns(), self._manners.ahead * 10**9
            times = [now if valid & bit else at - ahead for bit, at in
                     ((0x80, atime * 10**9 + ans), (0x100, mtime * 10**9 + mns))]  # fmt: skip
            os.utime(path, ns=(times[0], times[1]))
        return self._getattr(node, b"")

    def _mkdir(self, node: int, body: bytes) -> bytes:
        self._new()
        mode, mask = struct.unpack_from("<2I", body)
        os.mkdir(self._name(node, body[8:]), mode & ~mask, dir_fd=self._nodes[node])
        return self._lookup(node, body[8:])

    def _unlink(self, node: int, body: bytes) -> bytes:
        os.unlink(self._name(node, body), dir_fd=self._nodes[node])
        return b""

    def _rmdir(self, node: int, body: bytes) -> bytes:
        os.rmdir(self._name(node, body), dir_fd=self._nodes[node])
        return b""

    def _rename(self, node: int, body: bytes, skip: int = 8) -> bytes:
        self._new()
        (to,) = struct.unpack_from("<Q", body)
        old, _, new = body[skip:].partition(b"\0")
        old, new = self._name(node, old), self._name(to, new)
        os.rename(old, new, src_dir_fd=self._nodes[node], dst_dir_fd=self._nodes[to])
        return b""

    def _rename2(self, node: int, body: bytes) -> bytes:
        if struct.unpack_from("<I", body, 8)[0]:
            raise OSError(errno.EINVAL, "")
        return self._rename(node, body, 16)

    def _link(self, node: int, body: bytes) -> bytes:
        self._new()
        (old,) = struct.unpack_from("<Q", body)
        name = self._name(node, body[8:])
        os.link(self._path(old), name, dst_dir_fd=self._nodes[node], follow_symlinks=True)
        return self._lookup(node, body[8:])

    def _open(self, node: int, body: bytes) -> bytes:
        (flags,) = struct.unpack_from("<I", body)
        wanted = flags & (os.O_ACCMODE | os.O_TRUNC)
        return self._opened(os.open(self._path(node), wanted))

    def _opened(self, fd: int) -> bytes:
        self._images.discard(fd)
        if self._every or any(
            kind in str(Path(f"/proc/self/fd/{fd}").readlink()) for kind in (".qcow2", ".raw")
        ):
            self._images.add(fd)
        return struct.pack("<Q2I", fd, 0, 0)

    def _create(self, node: int, body: bytes) -> bytes:
        self._new()
        flags, mode, mask, _ = struct.unpack_from("<4I", body)
        name = self._name(node, body[16:])
        wanted = flags & (os.O_ACCMODE | os.O_TRUNC | os.O_EXCL) | os.O_CREAT
        fd = os.open(name, wanted, mode & ~mask, dir_fd=self._nodes[node])
        return self._lookup(node, body[16:]) + self._opened(fd)

    def _read(self, _: int, body: bytes) -> bytes:
        fd, offset, size = struct.unpack_from("<2QI", body)
        return os.pread(fd, size, offset)

    def _write(self, _: int, body: bytes) -> bytes:
        fd, offset, size = struct.unpack_from("<2QI", body)
        if fd in self._images:
            self._may_fail("write", size)
        return struct.pack("<2I", os.pwrite(fd, body[40 : 40 + size], offset), 0)

    def _fsync(self, _: int, body: bytes) -> bytes:
        (fd,) = struct.unpack_from("<Q", body)
        if fd in self._images:
            self._may_fail("fsync", 0)
        os.fsync(fd)
        return b""

    def _may_fail(self, what: str, size: int) -> None:
        how, _, number = self._control.read_text().partition(" ")
        self._written = self._written + size if how else 0
        if how == what and self._written > float(number):
            self._note()
            raise OSError(errno.EIO, "")
        if what == "write":
            self._new()
        if how == "slow" and what == "write":
            self._note()
            time.sleep(float(number))
        if how == "hang" and what == "write":
            self._note()
            while self._control.read_text() == how:
                time.sleep(0.01)

    def _new(self) -> None:
        """Before anything is made, renamed or removed."""
        if number := _MAKING.get(self._control.read_text()):
            self._note()
            raise OSError(number, "")

    def _note(self) -> None:
        with self._seen.open("ab") as seen:
            seen.write(b".")

    def _statfs(self, node: int, _: bytes) -> bytes:
        told = os.statvfs(self._path(node))
        numbers = (told.f_blocks, told.f_bfree, told.f_bavail, told.f_files, told.f_ffree)
        return struct.pack(
            "<5Q4I24x", *numbers, told.f_bsize, self._manners.longest, told.f_frsize, 0
        )

    def _release(self, _: int, body: bytes) -> bytes:
        os.close(struct.unpack_from("<Q", body)[0])
        return b""

    def _opendir(self, node: int, _: bytes) -> bytes:
        return struct.pack("<Q2I", os.open(self._path(node), os.O_RDONLY), 0, 0)

    def _readdir(self, _: int, body: bytes) -> bytes:
        fd, offset, size = struct.unpack_from("<2QI", body)
        found = b""
        names = sorted(os.fsencode(one.name) for one in os.scandir(fd))
        for at, text in enumerate(names[offset:], start=offset + 1):
            one = struct.pack("<2Q2I", at, at, len(text), 0) + text
            one = one.ljust(-(-len(one) // 8) * 8, b"\0")
            if len(found) + len(one) > size:
                break
            found += one
        return found

    def _fsyncdir(self, _: int, body: bytes) -> bytes:
        os.fsync(struct.unpack_from("<Q", body)[0])
        return b""


_MAKING = {"full": errno.ENOSPC, "readonly": errno.EROFS}
_NAMES = {
    1: "lookup", 3: "getattr", 4: "setattr", 9: "mkdir", 10: "unlink", 11: "rmdir", 12: "rename",
    13: "link", 14: "open", 15: "read", 16: "write", 17: "statfs", 18: "release", 20: "fsync",
    26: "init", 27: "opendir", 28: "readdir", 29: "release", 30: "fsyncdir", 35: "create",
    45: "rename2",
}  # fmt: skip


def _serve(path: Path, aside: Path, *, images: bool, manners: Manners) -> None:
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if _libc.mount(b"badfs", os.fsencode(path), b"fuse", 0, options) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    print("ready", flush=True)
    server = _Server(aside, images=images, manners=manners)
    while True:
        try:
            request = os.read(fuse, _MAX_WRITE + 8192)
        except OSError as failed:
            if failed.errno in {errno.ENOENT, errno.EINTR, errno.EAGAIN}:
                continue
            return  # unmounted
        _, opcode, unique, node, *_ = _IN.unpack_from(request)
        reply: bytes | None = b""
        number = 0
        try:
            reply = server.answer(opcode, node, request[_IN.size :])
        except OSError as failed:
            number = -(failed.errno or errno.EIO)
        if reply is not None:
            with contextlib.suppress(OSError):  # the caller was killed meanwhile
                os.write(fuse, _OUT.pack(_OUT.size + len(reply), number, unique) + reply)


if __name__ == "__main__":
    _, mounted, beside, which, *how = sys.argv
    _serve(Path(mounted), Path(beside), images=which == "images", manners=Manners.of(how))
