"""A copy is the same bytes with holes, or it is not there at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpsnap.errors import LocalFailed
from qmpsnap.store.copying import Cancelled, Copied, copy
from tests.rig.halves import names
from tests.rig.room import room

MIB = 1 << 20
needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 and not os.environ.get("CI"), reason="mounts file systems"
)


def copied(
    src: Path,
    dst: Path,
    *,
    limit: int | None = None,
    reserve: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Copied:
    return copy(
        src, dst, limit=limit, reserve=reserve, cancelled=cancelled, on_progress=on_progress
    )


def sparse(path: Path, size: int, *pieces: tuple[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, content in pieces:
            file.seek(offset)
            file.write(content)
    return path


def occupied(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """24 MiB with holes, of which 9 MiB are data and one of these is zeros."""
    pieces = [(0, os.urandom(4 * MIB)), (10 * MIB, bytes(MIB)), (16 * MIB, os.urandom(4 * MIB))]
    return sparse(tmp_path / "source", 24 * MIB, *pieces)


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No file system writes past the page cache; how often one was asked to."""
    return through_the_cache(monkeypatch)


def through_the_cache(patch: pytest.MonkeyPatch) -> list[int]:
    asked: list[int] = []
    real = fcntl.fcntl

    def refused(descriptor: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            asked.append(1)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, command, flags)

    patch.setattr("fcntl.fcntl", refused)
    return asked


@pytest.fixture(params=["direct", "cached"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Past the page cache, and through it."""
    if request.param == "cached":
        through_the_cache(monkeypatch)
    return str(request.param)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that holds 16 MiB."""
    with room(tmp_path / "small", "16M") as root:
        yield root


def test_the_same_bytes_private_and_sparse(source, tmp_path):
    heard: list[tuple[int, int, str]] = []
    made = copied(source, tmp_path / "copy", on_progress=lambda *told: heard.append(told))
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o600
    assert occupied(tmp_path / "copy") <= 10 * MIB
    assert names(tmp_path) == ["copy", "source"]
    if made.means == "copy":
        assert made.bytes_written == 9 * MIB
        assert heard[-1] == (9 * MIB, 9 * MIB, "copying source")


def test_through_the_cache_zeros_become_holes(source, tmp_path, cached):
    made = copied(source, tmp_path / "copy")
    assert cached == [1]
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert made == Copied("copy", 8 * MIB)
    assert occupied(tmp_path / "copy") <= 9 * MIB


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(0, 12 * MIB),
    pieces=st.lists(
        st.tuples(st.integers(0, 12 * MIB), st.integers(1, 200_000), st.booleans()), max_size=6
    ),
    way=st.sampled_from(["direct", "cached", "little"]),
)
def test_any_file(size: int, pieces: list[tuple[int, int, bool]], way: str) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        if way == "cached":
            through_the_cache(patch)
        if way == "little":
            patch.setattr("os.pwrite", _little)
            patch.setattr("os.preadv", _few)
        written = [
            (at, (os.urandom(length) if data else bytes(length))[: size - at])
            for at, length, data in pieces
            if at < size
        ]
        source = sparse(folder / "source", size, *written)
        copied(source, folder / "copy")
        assert (folder / "copy").read_bytes() == source.read_bytes()


_pwrite, _preadv = os.pwrite, os.preadv


def _little(descriptor: int, content: memoryview, at: int) -> int:
    return _pwrite(descriptor, content[: 65536 + 4096 * (at // 4096 % 3)], at)


def _few(descriptor: int, views: list[memoryview], at: int) -> int:
    return _preadv(descriptor, [views[0][:70_001]], at)


def test_paced(tmp_path, way):
    source = sparse(tmp_path / "source", 8 * MIB, (0, os.urandom(8 * MIB)))
    begun = time.monotonic()
    made = copied(source, tmp_path / "copy", limit=16 * MIB)
    if made.means == "copy":
        assert time.monotonic() - begun > 0.45


def test_what_exists_stays(source, tmp_path):
    (tmp_path / "copy").write_bytes(b"precious")
    with pytest.raises(LocalFailed, match="copy: exists"):
        copied(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"precious"
    assert names(tmp_path) == ["copy", "source"]


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "none"):
        with pytest.raises(LocalFailed, match=name):
            copied(tmp_path / name, tmp_path / "copy")
    assert names(tmp_path) == ["folder", "pipe"]
    with pytest.raises(LocalFailed, match="absent"):
        copied(sparse(tmp_path / "a", 1), tmp_path / "absent/copy")


def test_no_room_from_the_start(source, tmp_path):
    reserve = 1 << 60
    with pytest.raises(LocalFailed, match=rf"copy: no room: 0 bytes.* {reserve} bytes"):
        copied(source, tmp_path / "copy", reserve=reserve)
    assert names(tmp_path) == ["source"]


@needs_mounts
def test_no_room_for_this_much(source, mounted):
    with pytest.raises(LocalFailed, match=rf"no room: {9 * MIB} bytes .* {8 * MIB} bytes"):
        copied(source, mounted / "copy", reserve=8 * MIB)
    assert names(mounted) == []
    copied(source, mounted / "copy", reserve=6 * MIB)


@needs_mounts
@pytest.mark.parametrize(("reserve", "says"), [(2 * MIB, "no room"), (0, "copy.*no space is left")])
def test_the_room_goes_while_it_is_copied(source, mounted, reserve, says, way, tmp_path):
    calls: list[int] = []

    def filled() -> bool:
        """Not cancelled; but somebody else writes."""
        calls.append(1)
        if len(calls) == 2:
            status = os.statvfs(mounted)
            (mounted / "other").write_bytes(bytes(status.f_bavail * status.f_frsize - MIB))
        return False

    with pytest.raises(LocalFailed, match=says):
        copied(source, mounted / "copy", reserve=reserve, cancelled=filled)
    assert names(mounted) == ["other"]


@pytest.mark.parametrize("looks", [0, 1, 2])
def test_cancelled(tmp_path, looks, way):
    source = sparse(tmp_path / "source", 16 * MIB, (0, os.urandom(16 * MIB)))
    answers = iter([False] * looks)
    with pytest.raises(Cancelled):
        copied(source, tmp_path / "copy", cancelled=lambda: next(answers, True))
    assert names(tmp_path) == ["source"]


def test_cancelled_while_it_holds_back(tmp_path, way):
    source = sparse(tmp_path / "source", MIB, (0, os.urandom(MIB)))
    begun = time.monotonic()
    with pytest.raises(Cancelled):
        copied(source, tmp_path / "copy", limit=1, cancelled=lambda: time.monotonic() > begun + 0.1)
    assert time.monotonic() - begun < 20
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize(("call", "named"), [("read", "source"), ("pwrite", "copy")])
def test_a_bad_disk_is_named(source, tmp_path, way, monkeypatch, call, named):
    def bad(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if call == "read":
        call = "preadv" if way == "direct" else "pread"
    monkeypatch.setattr(f"os.{call}", bad)
    with pytest.raises(LocalFailed, match=rf"{named}: .*\(EIO\)"):
        copied(source, tmp_path / "copy")
    assert names(tmp_path) == ["source"]


def test_a_source_that_shrinks(source, tmp_path, way):
    def shrunk() -> bool:
        os.truncate(source, 17 * MIB)
        return False

    with pytest.raises(LocalFailed, match=r"source: ends at .* somebody writes"):
        copied(source, tmp_path / "copy", cancelled=shrunk)
    assert names(tmp_path) == ["source"]


@needs_mounts
def test_a_block_device(source, tmp_path):
    run = ["losetup", "--read-only", "--find", "--show", source]
    device = subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()
    try:
        made = copied(Path(device), tmp_path / "copy")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert made == Copied("copy", 8 * MIB)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


@needs_mounts
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_reflink_where_the_file_system_can(tmp_path, kind):
    if not shutil.which(f"mkfs.{kind}") and not os.environ.get("CI"):
        pytest.skip(f"needs mkfs.{kind}")
    image, root = sparse(tmp_path / "image", 400 * MIB), tmp_path / kind
    root.mkdir()
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
    subprocess.run(["mount", "-t", kind, "-o", "loop", image, root], check=True)
    try:
        source = sparse(root / "source", 64 * MIB, (MIB, os.urandom(32 * MIB)))
        heard: list[tuple[int, int, str]] = []
        made = copied(source, root / "copy", on_progress=lambda *told: heard.append(told))
        assert made == Copied("reflink", 0)
        assert (root / "copy").read_bytes() == source.read_bytes()
        assert stat.S_IMODE((root / "copy").stat().st_mode) == 0o600
        assert names(root) == ["copy", "source"]
    finally:
        subprocess.run(["umount", root], check=True)
