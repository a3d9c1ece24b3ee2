"""QEMU finds nothing wrong with what we write, and reads from it what the disk held."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qmpsnap.errors import LocalFailed
from qmpsnap.store.clusters import CLUSTER, clusters
from qmpsnap.store.increment import write
from qmpsnap.store.sink import Cancelled
from tests.rig.halves import names

MIB, GIB = 1 << 20, 1 << 30
pytestmark = pytest.mark.skipif(
    not shutil.which("qemu-img") and not os.environ.get("CI"), reason="needs qemu-img"
)
Read = Callable[[int, int], bytes]


def written(
    dst: Path,
    size: int,
    extents: list[tuple[int, int]],
    read: Read,
    *,
    backing: str = "base",
    format: str = "raw",
    reserve: int = 0,
    limit: int | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> int:
    return write(
        dst,
        virtual_size=size,
        backing=backing,
        backing_format=format,
        extents=extents,
        read=lambda pieces: [read(*piece) for piece in pieces],
        reserve=reserve,
        limit=limit,
        cancelled=cancelled,
        on_progress=on_progress,
    )


def qemu_img(*words: str | Path) -> str:
    ran = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{words}: {ran.stdout}{ran.stderr}"
    return ran.stdout


def is_sound(path: Path, like: Path) -> None:
    """Clean by QEMU's check, which tells leaks by its status, and the same bytes as raw *like*."""
    qemu_img("check", "-q", "-f", "qcow2", path)
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", path, like)


def sparse(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def reader(path: Path) -> Read:
    def read(offset: int, length: int) -> bytes:
        with path.open("rb") as content:
            content.seek(offset)
            return content.read(length)

    return read


KIND = st.sampled_from(["data", "zeros", "mixed", "same"])
WRITES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 400_000), KIND), max_size=8
)
SIZES = st.one_of(
    st.integers(1, 3 * MIB),
    st.sampled_from([512, CLUSTER, CLUSTER + 1, 512 * MIB, 512 * MIB + 512, 3 * GIB + 4096]),
    st.integers(1, 5 * GIB),
)


@settings(max_examples=60, deadline=None)
@example(size=1, writes=[])
@example(size=1000, writes=[(0.0, 1, "data")])
@example(size=3 * GIB, writes=[(at / 7, 1, "data") for at in range(7)])
@example(size=GIB, writes=[(0.4999, 400_000, "data")])  # over the end of an L2 table
@given(size=SIZES, writes=WRITES)
def test_any_changes(size: int, writes: list[tuple[float, int, str]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, now = sparse(folder / "base", size), sparse(folder / "now", size)
        extents = []
        with base.open("r+b") as old, now.open("r+b") as new:
            for part, length, kind in writes:
                at = int(part * size)
                length = min(length, size - at)
                content = os.urandom(length)
                old.seek(at)
                old.write(content)
                new.seek(at)
                if kind == "data":
                    content = os.urandom(length)
                elif kind == "zeros":
                    content = bytes(length)
                elif kind == "mixed":
                    content = bytes(length - length // 2) + os.urandom(length // 2)
                new.write(content)
                if kind != "same":
                    extents.append((at, length))
            # where a later "same" lies over an earlier change, the two still differ only inside
            # of *extents* as long as it is changed in both
        random.Random(size).shuffle(extents)
        made = written(folder / "inc", size, extents, reader(now))
        is_sound(folder / "inc", now)  # outside of the extents the two are the same
        assert made == (folder / "inc").stat().st_size
        dirty = sum(end - start for start, end in clusters(extents, size))
        assert made <= (dirty + 16) * CLUSTER
        assert stat.S_IMODE((folder / "inc").stat().st_mode) == 0o600


def test_what_is_not_dirty_comes_from_beneath(tmp_path):
    """Written and dirty areas differ: a change outside of the extents must not get in."""
    base, now = sparse(tmp_path / "base", 4 * MIB), sparse(tmp_path / "now", 4 * MIB)
    base.write_bytes(b"b" * 4 * MIB)
    now.write_bytes(b"n" * 4 * MIB)
    expected = bytearray(b"b" * 4 * MIB)
    expected[CLUSTER : 3 * CLUSTER] = b"n" * 2 * CLUSTER
    written(tmp_path / "inc", 4 * MIB, [(CLUSTER + 5, CLUSTER)], reader(now))
    (tmp_path / "expected").write_bytes(expected)
    is_sound(tmp_path / "inc", tmp_path / "expected")


def test_zeros_hide_what_lies_beneath_and_take_no_room(tmp_path):
    base = sparse(tmp_path / "base", 64 * MIB)
    base.write_bytes(b"b" * 64 * MIB)
    made = written(tmp_path / "inc", 64 * MIB, [(0, 64 * MIB)], lambda _, length: bytes(length))
    assert made == 5 * CLUSTER
    is_sound(tmp_path / "inc", sparse(tmp_path / "zeros", 64 * MIB))


def test_a_thousand_small_changes_write_little_more(tmp_path):
    """64 MiB of dirty clusters, spread over 4 GiB: at most a tenth more is written."""
    now = sparse(tmp_path / "now", 4 * GIB)
    sparse(tmp_path / "base", 4 * GIB)
    extents = [(at * 4 * MIB, CLUSTER) for at in range(1024)]
    with now.open("r+b") as file:
        for at, length in extents:
            file.seek(at)
            file.write(os.urandom(length))
    made = written(tmp_path / "inc", 4 * GIB, extents, reader(now))
    assert 64 * MIB <= made <= 1.1 * 64 * MIB
    is_sound(tmp_path / "inc", now)


def test_more_than_one_refcount_block(tmp_path):
    """2 GiB of data fill one block of refcounts; the memory does not grow with them."""
    size = 2 * GIB + 64 * MIB
    sparse(tmp_path / "base", size)
    same = b"\1" * 4 * MIB
    tracemalloc.start()
    written(tmp_path / "inc", size, [(0, size)], lambda _, length: same[:length])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * MIB
    qemu_img("check", "-q", "-f", "qcow2", tmp_path / "inc")
    told = json.loads(qemu_img("map", "--output=json", "-f", "qcow2", tmp_path / "inc"))
    assert sum(one["length"] for one in told if one["data"] and one["depth"] == 0) == size


def test_a_chain_with_relative_names_can_be_moved(tmp_path):
    images = []
    for at, name in enumerate(["one", "two", "three"]):
        (tmp_path / "vm" / name).mkdir(parents=True)
        image = tmp_path / "vm" / name / "d, 0.qcow2"
        content = bytes([at + 1]) * CLUSTER
        if not images:
            qemu_img("create", "-q", "-f", "qcow2", image, "1M")
        else:
            beneath = os.path.relpath(images[-1], image.parent)
            made = written(
                image, MIB, [(at * CLUSTER, 1)], lambda _, length, it=content: it[:length],
                backing=beneath, format="qcow2",
            )  # fmt: skip
            assert made == image.stat().st_size
        images.append(image)
    moved = (tmp_path / "vm").rename(tmp_path / "elsewhere")
    expected = bytes(CLUSTER) + b"\2" * CLUSTER + b"\3" * CLUSTER
    (tmp_path / "expected").write_bytes(expected.ljust(MIB, b"\0"))
    is_sound(moved / "three/d, 0.qcow2", tmp_path / "expected")
    told = json.loads(qemu_img("info", "--output=json", moved / "three/d, 0.qcow2"))
    assert told["backing-filename"] == "../two/d, 0.qcow2"
    assert told["backing-filename-format"] == "qcow2"
    assert told["format-specific"]["data"]["compat"] == "1.1"


def test_qemu_writes_into_it_and_folds_it(tmp_path):
    """Whatever QEMU may do with an image of its own, it may do with ours."""
    base, now = sparse(tmp_path / "base", 3 * MIB), sparse(tmp_path / "now", 3 * MIB)
    now.write_bytes(os.urandom(MIB) + bytes(2 * MIB))
    written(tmp_path / "inc", 3 * MIB, [(0, 2 * MIB)], reader(now))
    orders = ["-c", "write -P 7 100k 300k", "-c", "discard 512k 128k", "-c", "write -P 9 2m 64k"]
    subprocess.run(["qemu-io", "-f", "qcow2", *orders, tmp_path / "inc"], check=True)
    content = bytearray(now.read_bytes())
    content[100 << 10 : 400 << 10] = b"\7" * (300 << 10)
    content[512 << 10 : 640 << 10] = bytes(128 << 10)
    content[2 * MIB : 2 * MIB + CLUSTER] = b"\x09" * CLUSTER
    now.write_bytes(content)
    is_sound(tmp_path / "inc", now)
    qemu_img("commit", "-q", "-f", "qcow2", tmp_path / "inc")
    assert base.read_bytes() == content


@pytest.mark.parametrize("name", ["", "x" * 1024, "nbd:what", "json:{}"])
def test_a_name_that_qemu_would_not_open(tmp_path, name):
    with pytest.raises(LocalFailed, match="backing file's name"):
        written(tmp_path / "inc", MIB, [], lambda _, length: bytes(length), backing=name)
    assert names(tmp_path) == []


def test_a_long_name(tmp_path):
    sparse(tmp_path / "base", MIB)
    name = "./" * 509 + "./base"
    assert len(name) == 1024
    written(tmp_path / "inc", MIB, [(0, 1)], lambda _, length: b"x" * length, backing=name[2:])
    qemu_img("check", "-q", "-f", "qcow2", tmp_path / "inc")
    assert (
        json.loads(qemu_img("info", "--output=json", tmp_path / "inc"))["backing-filename"]
        == (name[2:])
    )


def test_what_exists_stays(tmp_path):
    (tmp_path / "inc").write_bytes(b"precious")
    with pytest.raises(LocalFailed, match="inc: exists"):
        written(tmp_path / "inc", MIB, [], lambda _, length: bytes(length))
    assert (tmp_path / "inc").read_bytes() == b"precious"


def test_no_room(tmp_path):
    with pytest.raises(LocalFailed, match=rf"inc: no room: {5 * CLUSTER + MIB} bytes"):
        written(tmp_path / "inc", GIB, [(0, MIB)], lambda _, length: bytes(length), reserve=1 << 60)
    assert names(tmp_path) == []


@pytest.mark.parametrize("came", [b"", b"short"])
def test_too_little_is_not_taken(tmp_path, came):
    with pytest.raises(LocalFailed, match="bytes came for"):
        written(tmp_path / "inc", MIB, [(0, MIB)], lambda _offset, _length: came)
    assert names(tmp_path) == []


def test_a_disk_that_cannot_be_read(tmp_path):
    def bad(offset: int, length: int) -> bytes:
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(LocalFailed, match="the disk cannot be read: Connection reset"):
        written(tmp_path / "inc", MIB, [(0, MIB)], bad)
    assert names(tmp_path) == []


def test_cancelled_paced_and_told(tmp_path):
    heard: list[tuple[int, int, str]] = []
    answers = iter([False, False])
    with pytest.raises(Cancelled):
        written(
            tmp_path / "inc", 64 * MIB, [(0, 64 * MIB)], lambda _, length: b"x" * length,
            cancelled=lambda: next(answers, True),
        )  # fmt: skip
    assert names(tmp_path) == []
    begun = time.monotonic()
    written(
        tmp_path / "inc", 64 * MIB, [(0, 4 * MIB)], lambda _, length: b"x" * length,
        limit=8 * MIB, on_progress=lambda *told: heard.append(told),
    )  # fmt: skip
    assert time.monotonic() - begun > 0.4
    assert heard[-1] == (4 * MIB, 4 * MIB, "writing inc")


def test_on_nothing_it_is_the_whole_disk(tmp_path: Path) -> None:
    like = sparse(tmp_path / "like", 3 * MIB + 512)
    with like.open("r+b") as content:
        for at in (0, MIB + 5, 3 * MIB):
            content.seek(at)
            content.write(b"x" * 300)
    write(
        tmp_path / "whole",
        virtual_size=3 * MIB + 512,
        backing=None,
        backing_format="",
        extents=[(0, CLUSTER), (MIB, 2 * CLUSTER), (3 * MIB, 512)],
        read=lambda pieces: [reader(like)(*piece) for piece in pieces],
        reserve=0,
        limit=None,
        cancelled=lambda: False,
        on_progress=None,
    )
    is_sound(tmp_path / "whole", like)
    assert "backing" not in qemu_img("info", tmp_path / "whole")
