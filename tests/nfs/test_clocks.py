"""A real NFS server whose clock is hours from this host's: the rig's kernel has a clock to set."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpsnap.errors import LeaseHeld, LeaseLost
from qmpsnap.store import lease
from qmpsnap.store.layout import StoreRoot
from qmpsnap.store.lease import Claimant
from qmpsnap.store.remote import Store
from tests.nfs.conftest import Server
from tests.rig.halves import ID
from tests.rig.packed import IDS, Series, taken

pytestmark = [pytest.mark.nfs]

MOUNT = Path(os.environ.get("NFS_MOUNT", "/mnt/nfs"))
TERM = 4.0


@pytest.fixture(params=[-11, 5])
def hours(request: pytest.FixtureRequest, server: Server) -> Iterator[int]:
    """This kernel's clock is ahead of the server's by so many hours."""
    if "User Mode" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("sets the clock: only in a kernel that is a process")
    ahead: int = request.param
    clock, seconds = time.CLOCK_REALTIME, time.time() + ahead * 3600
    time.clock_settime(clock, seconds)
    yield ahead
    time.clock_settime(clock, time.time() - ahead * 3600)


@pytest.fixture
def store(hours: int) -> Iterator[StoreRoot]:
    path = MOUNT / f"clocks-{os.getpid()}-{hours}"
    path.mkdir()
    yield StoreRoot(path)
    shutil.rmtree(path)


@pytest.fixture
def short() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="qs"))
    yield path
    shutil.rmtree(path)


def who(folder: Path, host: str, term: float = TERM) -> Claimant:
    seen = str(folder / f"rival-{host}.json")
    return Claimant(holder=host, host=host, term_s=term, seen=seen)


def test_a_lease_ends_by_the_servers_clock(hours: int, store: StoreRoot, short: Path) -> None:
    began = time.monotonic()
    held = lease.take(store, "web", who(short, "a"))
    (file,) = store.lease("web").iterdir()
    assert abs(time.time() - file.stat().st_mtime - hours * 3600) < 60
    refused = 0
    while True:
        try:
            lease.take(store, "web", who(short, "b"))
        except LeaseHeld:
            refused += 1
            continue
        break
    took = time.monotonic() - began
    print(f"{hours:+} h: refused {refused} times in {took:.2f} s")
    assert refused > 0
    assert TERM - 0.5 < took < 2 * TERM
    with pytest.raises(LeaseLost):
        held.check()


def test_a_lease_is_kept_by_the_servers_clock(store: StoreRoot, short: Path) -> None:
    held, began = lease.take(store, "web", who(short, "a")), time.monotonic()
    while time.monotonic() - began < 2 * TERM:
        held.beat()
        with pytest.raises(LeaseHeld):
            lease.take(store, "web", who(short, "b"))
    held.check()


async def test_what_is_shared_is_swept_and_kept(store: StoreRoot, short: Path) -> None:
    series = Series(short, store=store)
    taken(series, 4)
    claimed = {"lease": who(short, "a", 60.0)}
    asked = Store(store, within=20)
    await asked.remove("web", IDS[1], **claimed)
    await asked.sweep("web", **claimed)
    series.whole(IDS[0], IDS[2], IDS[3])
    standing = await asked.own("web", claimed["lease"], "look")
    assert (standing.ours, standing.newest) == (True, IDS[3])
    assert 0 < (standing.ends_in_s or 0) <= 60
    assert ID not in {one.id for one in (await asked.catalogue("web")).found}
