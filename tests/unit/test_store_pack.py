import os
import shutil
import subprocess
import threading

import pytest
from blake3 import blake3

from qmpsnap.errors import DigestMismatch, LocalFailed
from qmpsnap.store.pack import compress, unpack_to_fd
from tests.rig.halves import names

CONTENT = os.urandom(3 << 20) + bytes(9 << 20) + b"tail"


@pytest.fixture
def packed(tmp_path):
    (tmp_path / "raw").write_bytes(CONTENT)
    return compress(tmp_path / "raw", tmp_path / "raw.zst")


@pytest.mark.parametrize("content", [b"", b"x", CONTENT])
def test_there_and_back(tmp_path, content):
    (tmp_path / "raw").write_bytes(content)
    packed = compress(tmp_path / "raw", tmp_path / "raw.zst")
    assert packed.bytes_raw == len(content)
    assert packed.blake3_raw == blake3(content).hexdigest()
    assert packed.bytes == (tmp_path / "raw.zst").stat().st_size
    assert packed.blake3 == blake3((tmp_path / "raw.zst").read_bytes()).hexdigest()
    with (tmp_path / "back").open("wb") as back:
        unpacked = unpack_to_fd(
            tmp_path / "raw.zst",
            back.fileno(),
            raw_bytes=packed.bytes_raw,
            raw_blake3=packed.blake3_raw,
        )
    assert unpacked == len(content)
    assert (tmp_path / "back").read_bytes() == content


@pytest.mark.skipif(not shutil.which("zstd"), reason="needs the zstd program")
def test_the_program_unpacks_it_as_well(tmp_path, packed):
    subprocess.run(["zstd", "-dq", tmp_path / "raw.zst", "-o", tmp_path / "back"], check=True)
    assert (tmp_path / "back").read_bytes() == CONTENT


def test_zeros_take_no_room(tmp_path):
    with (tmp_path / "raw").open("wb") as file:
        file.truncate(256 << 20)
    assert compress(tmp_path / "raw", tmp_path / "raw.zst").bytes < 64 << 10


def test_through_a_pipe(tmp_path, packed):
    reading, writing = os.pipe()
    got = bytearray()

    def drain() -> None:
        while chunk := os.read(reading, 65536):
            got.extend(chunk)

    reader = threading.Thread(target=drain)
    reader.start()
    unpack_to_fd(tmp_path / "raw.zst", writing)
    os.close(writing)
    reader.join()
    os.close(reading)
    assert got == CONTENT


def test_a_reader_that_went_away(tmp_path, packed):
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(LocalFailed, match="EPIPE"):
        unpack_to_fd(tmp_path / "raw.zst", writing)
    os.close(writing)


@pytest.mark.parametrize("keep", [0, 3, 100, 1 << 20, -1])
def test_cut_short(tmp_path, packed, keep):
    whole = (tmp_path / "raw.zst").read_bytes()
    (tmp_path / "raw.zst").write_bytes(whole[:keep])
    with (tmp_path / "back").open("wb") as back, pytest.raises(DigestMismatch):
        unpack_to_fd(tmp_path / "raw.zst", back.fileno())


def test_another_size_than_announced_writes_nothing(tmp_path, packed):
    with (tmp_path / "back").open("wb") as back, pytest.raises(DigestMismatch, match="not 5"):
        unpack_to_fd(tmp_path / "raw.zst", back.fileno(), raw_bytes=5)
    assert (tmp_path / "back").stat().st_size == 0


def test_another_content_than_announced(tmp_path, packed):
    with (tmp_path / "back").open("wb") as back, pytest.raises(DigestMismatch, match="BLAKE3"):
        unpack_to_fd(tmp_path / "raw.zst", back.fileno(), raw_blake3="ab" * 32)


def test_a_target_that_exists_is_kept(tmp_path, packed):
    with pytest.raises(LocalFailed, match="EEXIST"):
        compress(tmp_path / "raw", tmp_path / "raw.zst")
    assert names(tmp_path) == ["raw", "raw.zst"]
