"""What every test may ask for: a QEMU of each version, and two roots for an engine."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.rig.qemu import VERSIONS, binaries, binary


def pytest_report_header() -> list[str]:
    lines = []
    for version, path in binaries().items():
        told = "none"
        if path.exists():
            ran = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
            told = ran.stdout.splitlines()[0]
        lines.append(f"QEMU {version}: {told}")
    return lines


@pytest.fixture(params=VERSIONS)
def qemu(request: pytest.FixtureRequest) -> Path:
    """Each QEMU in turn."""
    return binary(request.param)


@pytest.fixture
def qemu72() -> Path:
    return binary("7.2")


@pytest.fixture
def short(tmp_path: Path) -> Iterator[Path]:
    """A folder with a short name on disk: the path of a unix socket has 107 characters at most."""
    path = Path(tempfile.mkdtemp(prefix="qs", dir="/var/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def store() -> Iterator[Path]:
    """A store on another file system than the local root's; for a trial only."""
    path = Path(tempfile.mkdtemp(prefix="qs", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory that is not there yet."""
    path = Path(tempfile.mkdtemp(prefix="qs", dir="/dev/shm"))
    yield path / "images"
    shutil.rmtree(path)


@pytest.fixture
def children() -> Callable[[], list[psutil.Process]]:
    """The processes that the test has begun and that are there; not those of tests before it."""
    before = set(psutil.Process().children())
    return lambda: [one for one in psutil.Process().children() if one not in before]
