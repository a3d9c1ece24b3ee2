"""Stores on file systems that are odd for real: the rig's kernel has some that others have not."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpsnap.errors import StoreRefused
from qmpsnap.store.layout import LocalRoot, StoreRoot
from qmpsnap.store.lease import Claimant
from qmpsnap.store.remote import Store
from tests.nfs.conftest import Server
from tests.rig.halves import ID, LATER, names, spooled
from tests.rig.packed import IDS, Series, sparse, taken

pytestmark = [pytest.mark.nfs]
_MADE_BY = {"vfat": ["mkfs.vfat"], "msdos": ["mkfs.vfat"], "jfs": ["mkfs.jfs", "-q", "-O"]}
_NEEDED = ("loop", "nls_cp437", "nls_ascii", "nls_iso8859-1")


@pytest.fixture
def short(server: Server) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="qs"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def store(request: pytest.FixtureRequest, short: Path) -> Iterator[StoreRoot]:
    """A folder on a file system of the kind *request.param*, made for the test."""
    kind = request.param
    if shutil.which(_MADE_BY[kind][0]) is None:
        pytest.skip(f"there is no {_MADE_BY[kind][0]}")
    image, point = short / "image", short / "mounted"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    point.mkdir()
    subprocess.run([*_MADE_BY[kind], image], check=True, capture_output=True)
    subprocess.run(["modprobe", "-qa", kind, *_NEEDED], check=False)
    if subprocess.run(["mount", "-t", kind, "-o", "loop", image, point], check=False).returncode:
        pytest.skip(f"this kernel has no {kind}")
    (point / "store").mkdir()
    yield StoreRoot(point / "store")
    subprocess.run(["umount", point], check=True)


def who(folder: Path, host: str) -> Claimant:
    seen = str(folder / f"rival-{host}.json")
    return Claimant(holder=host, host=host, term_s=60, seen=seen)


@pytest.mark.parametrize("store", ["vfat", "jfs"], indirect=True)
async def test_names_that_differ_in_case_only(store: StoreRoot, short: Path) -> None:
    asked, local = Store(store, within=20), LocalRoot(short / "local")
    await asked.examine()
    assert names(store.path) == []
    await asked.ship(spooled(local, "Web", ID), "Web", ID, lease=who(short, "a"))
    spool = spooled(local, "web", LATER)
    for verb in (
        asked.ship(spool, "web", LATER, lease=who(short, "b")),
        asked.own("web", who(short, "b"), "seize"),
        asked.remove("web", ID, lease=who(short, "b")),
    ):
        with pytest.raises(StoreRefused, match="the names web and Web for one"):
            await verb
    assert await asked.verify("Web", ID) == []
    assert names(store.path) == ["Web"]
    assert names(store.vm("Web")) == [ID, "lease"]
    # all that a series does, on a file system without links, or with names that fold
    (short / "one").mkdir()
    series = Series(short / "one", "vm", store)
    taken(series, 4)
    series.remove(IDS[1])
    series.whole(IDS[0], IDS[2], IDS[3])
    (short / "two").mkdir()
    other = Series(short / "two", "other", store)
    kept = sparse(other)
    other.remove(IDS[0])
    other.whole(*kept)


@pytest.mark.parametrize("store", ["vfat"], indirect=True)
async def test_a_dot_at_the_end_is_dropped(store: StoreRoot, short: Path) -> None:
    asked = Store(store, within=20)
    assert (await asked.own("web", who(short, "a"))).ours
    with pytest.raises(StoreRefused, match=r"the names web\. and web for one"):
        await asked.own("web.", who(short, "b"), "seize")
    with pytest.raises(StoreRefused, match=r"the names new\. and new for one"):
        await asked.own("new.", who(short, "b"))


@pytest.mark.parametrize("store", ["msdos"], indirect=True)
async def test_eight_letters_and_three(store: StoreRoot, short: Path) -> None:
    with pytest.raises(StoreRefused, match="no names of 95 bytes such as ours"):
        await Store(store, within=20).examine()
    assert names(store.path) == []
