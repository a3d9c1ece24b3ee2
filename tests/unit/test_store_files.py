import errno
import os
import stat
from pathlib import Path

import pytest

from qmpsnap.errors import DigestMismatch, LocalFailed, StoreError, UsageError
from qmpsnap.store import files
from qmpsnap.store.files import (
    PIECE,
    copy_verified,
    digest_bytes,
    digest_file,
    make_folders,
    partial,
    publish,
    read_small,
    replace,
    told,
)
from qmpsnap.store.layout import LocalRoot, StoreRoot
from qmpsnap.store.manifest import FileEntry
from tests.rig.halves import names


def entry(content: bytes, name: str = "a") -> FileEntry:
    return FileEntry(name=name, bytes=len(content), blake3=digest_bytes(content))


def test_published_whole_and_private(tmp_path):
    publish(tmp_path / "a", b"words")
    assert (tmp_path / "a").read_bytes() == b"words"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert (tmp_path / "a").stat().st_nlink == 1
    publish(tmp_path / "a", b"words")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("other", [b"", b"word", b"wordsx", b"WORDS"])
def test_never_over_another_content(tmp_path, other):
    publish(tmp_path / "a", other)
    with pytest.raises(LocalFailed, match="another content"):
        publish(tmp_path / "a", b"words", side=LocalFailed)
    assert (tmp_path / "a").read_bytes() == other


def test_what_an_interrupted_run_left_is_written_anew(tmp_path):
    (tmp_path / "a.partial").write_bytes(b"wor")
    publish(tmp_path / "a", b"words")
    assert names(tmp_path) == ["a"]


def test_a_planted_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "a.partial").symlink_to(victim)
    publish(tmp_path / "a", b"words")
    (tmp_path / "b").symlink_to(victim)
    with pytest.raises(StoreError):
        publish(tmp_path / "b", b"precious")
    assert victim.read_bytes() == b"precious"


def test_a_body_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), partial(tmp_path / "a", LocalFailed):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_one_that_came_first_is_not_replaced(tmp_path):
    with pytest.raises(StoreError, match="EEXIST"), partial(tmp_path / "a", StoreError):
        (tmp_path / "a").write_bytes(b"first")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("taken", [False, True])
def test_a_file_system_without_links(tmp_path, monkeypatch, taken):
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "link", refuse)
    if not taken:
        publish(tmp_path / "a", b"words")
        assert (tmp_path / "a").read_bytes() == b"words"
        return
    with pytest.raises(StoreError, match="EEXIST"), partial(tmp_path / "a", StoreError):
        (tmp_path / "a").write_bytes(b"first")
    assert (tmp_path / "a").read_bytes() == b"first"


def test_nfs_lost_the_answer_to_our_link(tmp_path, monkeypatch):
    link = os.link

    def twice(src: Path, dst: Path) -> None:
        link(src, dst)
        link(src, dst)

    monkeypatch.setattr(os, "link", twice)
    publish(tmp_path / "a", b"words")
    assert (tmp_path / "a").read_bytes() == b"words"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "no space is left (ENOSPC)"), (errno.EROFS, "read-only (EROFS)"),
     (errno.ESTALE, "(ESTALE)"), (errno.EDQUOT, "(EDQUOT)"), (errno.EIO, "(EIO)")],
)  # fmt: skip
@pytest.mark.parametrize("side", [StoreError, LocalFailed])
def test_the_errno_is_named(number, said, side):
    with pytest.raises(side) as raised, told(Path("/store/web"), side):
        raise OSError(number, os.strerror(number))
    assert said in str(raised.value)
    assert "/store/web" in str(raised.value)


def test_replace_is_whole_too(tmp_path):
    publish(tmp_path / "a", b"old")
    replace(tmp_path / "a", b"new", side=LocalFailed)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("size", [0, 1, 4 << 20, (8 << 20) + 5, 40 << 20])
def test_copied_and_read_back(tmp_path, size):
    content = os.urandom(1 << 20) * (size >> 20) + b"x" * (size % (1 << 20))
    (tmp_path / "a").write_bytes(content)
    heard: list[tuple[int, int, str]] = []
    copy_verified(tmp_path / "a", tmp_path / "b", entry(content), lambda *one: heard.append(one))
    assert (tmp_path / "b").read_bytes() == content
    assert digest_file(tmp_path / "b") == (size, entry(content).blake3)
    for verb in ("copying a", "reading back a"):
        assert [done for done, _, what in heard if what == verb][-1:] == [size] * bool(size)
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize(("bytes_a_second", "longest"), [(100_000, 3), (50 << 20, 1), (1 << 40, 1)])
def test_a_slow_store_is_heard_of(tmp_path, monkeypatch, bytes_a_second, longest):
    """Between two signs of progress it has to take no more than it can in some seconds."""
    now, heard, told_at = [0.0], [], [0.0]
    synced = [0]

    def fdatasync(descriptor):
        now[0] += (os.fstat(descriptor).st_size - synced[0]) / bytes_a_second
        synced[0] = os.fstat(descriptor).st_size

    def progress(done, total, what):
        if what.startswith("copying"):
            heard.append(now[0] - told_at[0])
            told_at[0] = now[0]

    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    content = bytes(40 * PIECE)
    (tmp_path / "src").write_bytes(content)
    copy_verified(tmp_path / "src", tmp_path / "a", entry(content), progress)
    assert synced == [len(content)]
    assert max(heard) < longest
    if bytes_a_second > 1 << 20:
        assert len(heard) < 8


def test_a_copy_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "b").write_bytes(b"words")
    before = (tmp_path / "b").stat().st_ino
    copy_verified(tmp_path / "gone", tmp_path / "b", entry(b"words"))
    assert (tmp_path / "b").stat().st_ino == before


def test_a_copy_that_is_another_is_left_alone(tmp_path):
    (tmp_path / "a").write_bytes(b"words")
    (tmp_path / "b").write_bytes(b"other")
    with pytest.raises(StoreError, match="another content"):
        copy_verified(tmp_path / "a", tmp_path / "b", entry(b"words"))
    assert (tmp_path / "b").read_bytes() == b"other"


@pytest.mark.parametrize("found", [b"word", b"wordz", b"words and more"])
def test_a_source_that_changed(tmp_path, found):
    (tmp_path / "a").write_bytes(found)
    with pytest.raises(DigestMismatch, match="/a:"):
        copy_verified(tmp_path / "a", tmp_path / "b", entry(b"words"))
    assert names(tmp_path) == ["a"]


def test_a_target_that_keeps_something_else(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"words")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, b"W" + bytes(data)[1:]))
    with pytest.raises(StoreError, match="reads back other"):
        copy_verified(tmp_path / "a", tmp_path / "b", entry(b"words"))
    assert names(tmp_path) == ["a"]


def test_each_side_has_its_own_error(tmp_path):
    (tmp_path / "a").write_bytes(b"words")
    with pytest.raises(LocalFailed, match="ENOENT"):
        copy_verified(tmp_path / "gone", tmp_path / "b", entry(b"words"))
    with pytest.raises(StoreError, match="ENOENT"):
        copy_verified(tmp_path / "a", tmp_path / "no" / "b", entry(b"words"))


def test_a_pipe_does_not_hold_us(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="not a regular file"):
        read_small(tmp_path / "pipe", side=StoreError)


def test_folders_only_below_a_root_that_is_there(tmp_path):
    with pytest.raises(StoreError, match="ENOENT"):
        make_folders(tmp_path / "root/web/x", tmp_path / "root", side=StoreError)
    assert names(tmp_path) == []
    make_folders(tmp_path / "web/x", tmp_path, side=StoreError)
    assert stat.S_IMODE((tmp_path / "web/x").stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to("/tmp")
    with pytest.raises(StoreError, match="not a folder of ours"):
        make_folders(tmp_path / "link/x", tmp_path, side=StoreError)


def test_layout_takes_no_foreign_names(tmp_path):
    for name in ("..", "", "a/b", ".hidden", "20261122T165057123Z"):
        with pytest.raises(UsageError):
            LocalRoot(tmp_path).vm(name)
    with pytest.raises(UsageError):
        StoreRoot(tmp_path).manifest("web", "..")


def test_layout_lists_what_is_ours(tmp_path):
    root = LocalRoot(tmp_path)
    assert LocalRoot(tmp_path / "none").vms() == []
    for name in ("20261122T165058000Z", "20261122T165057123Z", "layers", "journal"):
        (tmp_path / "web" / name).mkdir(parents=True)
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "elsewhere").symlink_to("/tmp")
    assert root.vms() == ["web"]
    assert [str(id) for id in root.ids("web")] == ["20261122T165057123Z", "20261122T165058000Z"]
