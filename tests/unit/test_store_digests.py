import os

import pytest
from blake3 import blake3

from qmpsnap.errors import LocalFailed
from qmpsnap.store import digests
from qmpsnap.store.files import CHUNK
from qmpsnap.store.manifest import Digests, decode
from tests.rig.halves import ID, LATER

CONTENT = bytes(range(256)) * 20_000


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / ID
    path.mkdir()
    (path / "storage.json").write_bytes(b"{}\n")
    (path / "vda.qcow2").write_bytes(CONTENT)
    (path / "vdb.raw").write_bytes(b"")
    return path


NAMES = ["vda.qcow2", "vdb.raw"]


def test_taken_and_checked(folder):
    told = []
    taken = digests.take(folder, ID, NAMES, lambda *one: told.append(one))
    assert taken == Digests(
        point=ID,
        images={
            "vda.qcow2": blake3(CONTENT).hexdigest(),
            "vdb.raw": blake3().hexdigest(),
            "storage.json": blake3(b"{}\n").hexdigest(),
        },
    )
    assert decode((folder / "digests.json").read_bytes(), Digests, folder) == taken
    assert told[-1] == (len(CONTENT), len(CONTENT), "hashing")
    assert digests.check(folder, NAMES) == []
    assert digests.take(folder, ID, NAMES) == taken


@pytest.mark.parametrize("offset", [0, CHUNK - 1, CHUNK, len(CONTENT) - 1])
def test_one_byte(folder, offset):
    digests.take(folder, ID, NAMES)
    times = (folder / "vda.qcow2").stat()
    with (folder / "vda.qcow2").open("r+b") as file:
        file.seek(offset)
        file.write(bytes([CONTENT[offset] ^ 1]))
    os.utime(folder / "vda.qcow2", ns=(times.st_atime_ns, times.st_mtime_ns))
    ((name, what),) = digests.check(folder, NAMES)
    assert name == "vda.qcow2"
    assert str(folder / "vda.qcow2") in what
    with pytest.raises(LocalFailed, match="another content"):
        digests.take(folder, ID, NAMES)
    digests.take(folder, ID, NAMES, anew=True)
    assert digests.check(folder, NAMES) == []


def test_what_is_missing(folder):
    ((name, what),) = digests.check(folder, NAMES)
    assert name == "digests.json"
    assert "was never hashed" in what
    digests.take(folder, ID, ["vda.qcow2"])
    assert digests.check(folder, NAMES) == [
        ("vdb.raw", f"{folder / 'vdb.raw'}: was never hashed"),
    ]
    (folder / "vda.qcow2").unlink()
    ((name, what),) = digests.check(folder, ["vda.qcow2"])
    assert name == "vda.qcow2"
    assert "ENOENT" in what
    with pytest.raises(LocalFailed):
        digests.take(folder, ID, NAMES, anew=True)


def test_the_manifests_beside_the_images(folder):
    digests.take(folder, ID, NAMES)
    (folder / "storage.json").rename(folder / "kept.json")
    assert digests.check(folder, NAMES) == []
    (folder / "merged.json").write_bytes(b"{}\n")
    assert [name for name, _ in digests.check(folder, NAMES)] == ["merged.json"]
    (folder / "merged.json").unlink()
    (folder / "kept.json").write_bytes(b"{} ")
    assert [name for name, _ in digests.check(folder, NAMES)] == ["kept.json"]
    (folder / "kept.json").unlink()
    ((name, what),) = digests.check(folder, NAMES)
    assert name == "storage.json"
    assert "is missing" in what


def test_digests_of_another_point(folder):
    digests.take(folder, LATER, NAMES)
    ((name, what),) = digests.check(folder, NAMES)
    assert name == "digests.json"
    assert f"is of {LATER}" in what
    (folder / "digests.json").write_bytes(b"{")
    ((name, what),) = digests.check(folder, NAMES)
    assert name == "digests.json"
    assert "digests.json" in what


def test_a_revision_has_the_name_of_both(tmp_path):
    folder = tmp_path / ID / LATER
    folder.mkdir(parents=True)
    digests.take(folder, f"{ID}/{LATER}", [])
    assert digests.check(folder, []) == []


SPARSE = {
    "hole": ([], 3 * CHUNK + 5),
    "hole first": ([(2 * CHUNK + 4096, b"x" * 5000)], 2 * CHUNK + 9096),
    "hole last": ([(0, b"x" * 70_000)], 5 * CHUNK),
    "between": ([(0, b"x" * 4096), (CHUNK + 65536, b"y" * CHUNK), (4 * CHUNK, b"z")], 9 * CHUNK),
}


@pytest.mark.parametrize("data", SPARSE)
def test_holes_count_as_zeros(tmp_path, data):
    pieces, size = SPARSE[data]
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        for at, content in pieces:
            file.seek(at)
            file.write(content)
        file.truncate(size)
    assert digests.digest(path) == blake3(path.read_bytes()).hexdigest()
    assert digests.digest(path, from_disk=True) == digests.digest(path)


def test_holes_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.seek(1 << 28)
        file.write(b"x" * 4096)
    asked, real = [], os.preadv

    def preadv(descriptor, buffers, offset):
        asked.append(offset)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    digests.digest(path)
    assert asked == [1 << 28]
