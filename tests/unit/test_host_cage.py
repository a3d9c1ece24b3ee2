"""Real control groups: limits set, entered from the very start, and gone again whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from qmpsnap.errors import Blocked
from qmpsnap.host import cage, cgroup, site
from qmpsnap.host.limits import GroupLimits, limits
from qmpsnap.host.settings import Setting
from qmpsnap.host.site import Site
from tests.rig.groups import settable
from tests.rig.qemu import ROOT

GROUPS = 'cat /proc/self/cgroup; echo; exec sleep "$0"'
ENGINE = """
import asyncio, subprocess, sys
sys.path.insert(0, sys.argv[1])
from qmpsnap.host import cage, site
from tests.rig.groups import settable
async def main():
    async with cage.made(site.site(settable()), sys.argv[2]) as group:
        words = [*group.words, *sys.argv[3:]]
        inside = subprocess.Popen(words, pass_fds=group.hold, stdout=subprocess.DEVNULL)
        print(inside.pid, *group.folders, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


def inside(group: cage.Cage, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*group.words, *words], pass_fds=group.hold, stdout=subprocess.PIPE)


def waiting(folder: Path) -> bool:
    """Whether somebody waits for the lock of *folder*."""
    inode = f":{folder.stat().st_ino} "
    rows = [row for row in Path("/proc/locks").read_text().splitlines() if inode in row]
    return any("->" in row for row in rows)


async def until(true: Callable[[], bool]) -> None:
    """Waits for what a process of nobody's does."""
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


@pytest.fixture
def here() -> Site:
    return site.site(settable())


async def test_inside_from_the_first_moment(here: Site) -> None:
    assert here.troubles == ()
    async with cage.made(here, "test") as group:
        own = {name: parent / group.folders[0].name for name, parent in here.parents.items()}
        assert set(own.values()) == set(group.folders)
        process = inside(group, "sh", "-c", GROUPS, "0")
        out, _ = await asyncio.to_thread(process.communicate)
        for name, folder in own.items():
            line = next(row for row in out.decode().splitlines() if f":{name}" in row)
            assert line.endswith(f"/{folder.name}")
            assert cgroup.groups_of(os.getpid())[name] in line
        wanted, seen = settable(), limits(own)
        for field in ("cpu_max_count", "memory_max_bytes", "pids_max_count", "cpus"):
            if getattr(wanted, field) is not None:
                assert getattr(seen, field) == getattr(wanted, field)
    assert not any(folder.exists() for folder in group.folders)


async def test_what_is_left_goes_when_it_ends(here: Site) -> None:
    async with cage.made(here, "test") as group:
        process = inside(group, "sleep", "60")
        group.leave()
    try:
        assert all(folder.exists() for folder in group.folders)
        # whoever removes them waits for what is inside, and does not try again and again
        await until(lambda: waiting(group.folders[0]))
    finally:
        process.kill()
        process.communicate()
    await until(lambda: not any(folder.exists() for folder in group.folders))


async def test_an_error_leaves_nothing(here: Site) -> None:
    with pytest.raises(ZeroDivisionError):
        async with cage.made(here, "test") as group:
            raise ZeroDivisionError
    assert not any(folder.exists() for folder in group.folders)


@contextlib.asynccontextmanager
async def engine(
    name: str, *words: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, int, list[Path]]]:
    """Another engine with a group, and *words* inside: its process and the line that it prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ENGINE, ROOT, name, *words, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        pid, *folders = (await process.stdout.readline()).decode().split()
    try:
        yield process, int(pid), [*map(Path, folders)]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_an_engine_that_is_killed_leaves_no_group(here: Site) -> None:
    async with engine("killed", "setpriv", "--pdeathsig=KILL", "sleep", "60") as (process, _, made):
        # setpriv may not have asked for its signal yet
        await until(lambda: _asked(made))
        process.kill()
        await process.wait()
        await until(lambda: not any(folder.exists() for folder in made))


def _asked(folders: list[Path]) -> bool:
    pids = (folders[0] / "cgroup.procs").read_text().split()
    names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids]
    return names == ["sleep"]


async def test_what_an_earlier_engine_left_is_removed(here: Site) -> None:
    """One that was killed together with whom it had told to remove it."""
    parents = [*dict.fromkeys(here.parents.values())]
    left = [parent / f"qmpsnap-left-{os.getpid()}" for parent in parents]
    async with engine("used", "sleep", "60") as (_, pid, used):
        for folder in left:
            folder.mkdir()
        async with cage.made(here, "test"):
            assert not any(folder.exists() for folder in left)
            assert all(folder.exists() for folder in used)
        os.kill(pid, signal.SIGKILL)


async def test_what_the_kernel_refuses_leaves_nothing(here: Site) -> None:
    hierarchy, parent = next(iter(here.parents.items()))
    bad = Setting(hierarchy, "pids", "no.such.file", "1")
    broken = Site(here.parents, here.folders, (*here.settings, bad), (), (), ())
    with pytest.raises(Blocked, match=r"pids: /.*/no\.such\.file: '1': "):
        async with cage.made(broken, "refused"):
            pytest.fail("made")
    assert not [*parent.glob("qmpsnap-refused-*")]


async def test_what_cannot_be_is_not_tried(here: Site) -> None:
    wanted = GroupLimits(cpus=[9999])
    hopeless = site.site(wanted)
    assert hopeless.troubles
    with pytest.raises(Blocked, match="cpuset"):
        async with cage.made(hopeless, "refused"):
            pytest.fail("made")


async def test_a_group_of_v2_without_limits(here: Site) -> None:
    """Where the controllers are v1's, v2 has groups all the same: entered and removed as well."""
    own = cgroup.folders_of(os.getpid()).get("")
    if own is None or (own / "cgroup.type").exists():
        pytest.skip("v2 lets no process into a group below ours")
    async with cage.made(Site({"": own}, {}, (), (), (), ()), "two") as group:
        process = inside(group, "cat", "/proc/self/cgroup")
        out, _ = await asyncio.to_thread(process.communicate)
    assert out.decode().splitlines()[-1] == f"0::/{group.folders[0].name}"
    assert not group.folders[0].exists()
