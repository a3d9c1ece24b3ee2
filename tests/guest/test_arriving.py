"""A guest runs on while its RAM still comes, whoever dies meanwhile, and gets all of it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine import feeding
from qmpsnap.engine.arrivals import STATUS
from qmpsnap.engine.restore import Restoration, Restored
from qmpsnap.engine.wishes import Wishes
from qmpsnap.errors import VmBusy
from qmpsnap.hypervisor.monitor import connect
from tests.guest.test_damage import flipped, harmed
from tests.rig.arriving import bringers, family, gated, gone, killed, seen
from tests.rig.console import Console, Witness
from tests.rig.guest import booted
from tests.rig.qemu import ROOT, binary
from tests.rig.wire import Witness as Eye
from tests.rig.wire import witness

pytestmark = pytest.mark.guest
_MEMORY = 128  # MiB
_HOLE = (640 << 10, 1 << 20)  # a PC has its screen and its ROMs there


@dataclass(slots=True)
class Scene:
    """A snapshot of a guest that has ended; its RAM is on the *store* only."""

    home: Path
    store: Path
    before: Witness

    @property
    def local(self) -> Path:
        return self.home / "local"

    @property
    def gate(self) -> Path:
        return self.home / "gate"

    def engine(self) -> Engine:
        return gated(Engine(self.local, self.store, allow_local_store=True), self.gate)

    def traces(self) -> list[str]:
        """What is left of an arrival."""
        places = (*self.home.glob("to*/ram"), *self.home.glob(f"to*/{STATUS}"))
        return [str(one) for one in (*self.local.glob("web/arrivals/*"), *places)]

    def qmpsnap(self, *words: str) -> subprocess.CompletedProcess[str]:
        roots = ("--local", str(self.local), "--store", str(self.store), "--allow-local-store")
        return subprocess.run(
            [sys.executable, "-m", "qmpsnap", *words, *roots],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip


async def _taken(version: str, short: Path, store: Path) -> Scene:
    async with booted(binary(version), short) as guest:
        engine = Engine(short / "local", store, allow_local_store=True, ram_images=0)
        await engine.create(Machine("web", guest.qmp, guest.agent), Wishes(max_pause=30))
        before = await guest.console.witness(within=60)
    return Scene(short, store, before)


@asynccontextmanager
async def _detached(scene: Scene, name: str = "to") -> AsyncIterator[tuple[Restored, Console]]:
    """The machine that a `restore --detach` has left; it ends with the block."""
    to = scene.home / name
    engine = scene.engine()
    ready = await engine.prepare_restore("web", Restoration(to))
    async with engine.restored(ready, detach=True) as back:
        pass
    try:
        async with Console.open(to / "console.sock") as console:
            yield back, console
    finally:
        os.kill(back.process.pid, signal.SIGKILL)


async def _entered(scene: Scene, to: Path) -> None:
    engine = scene.engine()
    ready = await engine.prepare_restore("web", Restoration(to))
    async with engine.restored(ready):
        raise AssertionError("all of it has come")


def _same(scene: Scene, *found: Witness) -> None:
    assert all(one.ok and one.nonce == scene.before.nonce for one in found), found
    counts = [one.ram for one in found]
    assert sorted(counts) == counts


def _largest(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


def _ram(eye: Eye, home: Path) -> bytes:
    """All RAM as the guest sees it, with zeros for its hole."""
    found, path = b"", home / "ram"
    for start, end in ((0, _HOLE[0]), (_HOLE[1], _MEMORY << 20)):
        eye.ask("pmemsave", val=start, size=end - start, filename=str(path))
        found = found.ljust(start, b"\0") + path.read_bytes()
        path.unlink()
    return found


async def _stuck(eye: Eye, *places: int) -> asyncio.Task[str]:
    """QEMU's main loop waits for a page that is missing, at one of *places*; who looks there."""
    for at in places:
        look = {"command-line": f"xp /1xg {at}"}
        looking = asyncio.create_task(asyncio.to_thread(eye.ask, "human-monitor-command", **look))
        done, _ = await asyncio.wait([looking], timeout=1)
        if not done:
            return looking
    raise AssertionError(f"all pages are there: {places}")


async def _status(back: Restored) -> str:
    async with connect(back.machine.socket) as monitor:
        return str((await monitor.execute("query-migrate"))["status"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", ["7.2", "10.0", "11.1"])
async def test_who_brings_it_may_die(version: str, short: Path, store: Path) -> None:
    scene = await _taken(version, short, store)
    async with _detached(scene) as (back, console):
        # what it does now it does with pages that it waited for
        first = await console.witness(within=60)
        assert back.shown()["arriving"] == str(scene.home / "to" / STATUS)
        now = json.loads((scene.home / "to" / STATUS).read_text())
        assert now["done_bytes"] < now["total_bytes"]
        assert await _status(back) == "postcopy-active"
        # nobody can save it now, and nobody tries
        there = sorted(scene.local.rglob("*"))
        with pytest.raises(VmBusy, match=r"the RAM of web is still coming: .* are there"):
            await scene.engine().create(Machine("web", back.machine.qmp, back.machine.agent))
        assert sorted(path for path in scene.local.rglob("*") if path not in there) == []
        await killed(scene.local)
        with witness(back.machine.socket) as eye:
            # nobody can begin a session with it, while the guest waits as well
            looking = await _stuck(eye, *range(40 << 20, _MEMORY << 20, 5 << 20))
            asked = asyncio.create_task(console.witness(within=120))
            said = await asyncio.to_thread(scene.qmpsnap, "recover", "web")
            assert said.returncode == 0, said.stderr
            assert "its pages come again" in said.stdout
            await looking
        second = await asked
        kin = [one for pid in bringers(scene.local) for one in family(pid)]
        await seen(lambda: not (scene.home / "to" / STATUS).exists())
        await gone(kin)
        assert scene.traces() == []
        await console.run("sleep 0.3", within=30)
        _same(scene, first, second, await console.witness(within=60))
        assert console.alarms == []
        assert await _status(back) == "completed"
        said = await asyncio.to_thread(scene.qmpsnap, "recover")
        assert "nothing was owed" in said.stderr, said
        # it is a machine as any other
        again = Machine("web", back.machine.qmp, back.machine.agent)
        assert (await scene.engine().create(again, Wishes(max_pause=30, rebind=True))).state


_KILLED = """
import asyncio, json, os, signal, sys
from pathlib import Path
from qmpsnap import Engine
from qmpsnap.engine import restore
from tests.guest.test_damage import flipped, harmed
from tests.rig.arriving import gated

let_run = restore.runstate.let_run

async def and_die(monitor):
    await let_run(monitor)
    os.kill(os.getpid(), signal.SIGKILL)

async def main(local, store, gate, to):
    restore.runstate.let_run = and_die
    engine = gated(Engine(Path(local), Path(store), allow_local_store=True), Path(gate))
    ready = await engine.prepare_restore("web", restore.Restoration(Path(to)))
    async with engine.restored(ready, detach=True):
        pass

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.timeout(400)
async def test_the_engine_may_die_and_the_store_go_away(short: Path, store: Path) -> None:
    scene = await _taken("11.1", short, store)
    to = scene.home / "to"
    words = [sys.executable, "-c", _KILLED, scene.local, store, scene.gate, to]
    ended = await asyncio.to_thread(subprocess.run, words, cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    (pid,) = bringers(scene.local)
    kin = family(pid)
    note = json.loads(next(scene.local.glob("web/arrivals/*.json")).read_text())
    try:
        async with Console.open(to / "console.sock") as console:
            first = await console.witness(within=60)
            # the store is not there for a while, as when somebody unmounts it
            aside = store.with_name(f"{store.name}-aside")
            os.rename(store, aside)  # noqa: PTH104
            try:
                scene.gate.touch()
                await seen(lambda: json.loads((to / STATUS).read_text())["trouble"])
                assert bringers(scene.local) == [pid]
            finally:
                os.rename(aside, store)  # noqa: PTH104
            await seen(lambda: not (to / STATUS).exists())
            await gone(kin)
            assert scene.traces() == []
            await console.run("sleep 0.3", within=30)
            _same(scene, first, await console.witness(within=60))
            assert console.alarms == []
    finally:
        os.kill(note["process"]["pid"], signal.SIGKILL)
    # a machine that ends takes along who brings its RAM
    scene.gate.unlink()
    async with _detached(scene, "to2"):
        (pid,) = bringers(scene.local)
        kin = family(pid)
        assert scene.traces() != []
    await gone(kin)
    assert scene.traces() == []
    # so does a restore that is called off, which leaves nothing at all
    restoring = asyncio.create_task(_entered(scene, scene.home / "to4"))
    await seen(lambda: (scene.home / "to4" / STATUS).exists())
    kin = [one for pid in bringers(scene.local) for one in family(pid)]
    restoring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await restoring
    await gone(kin)
    assert len(kin) > 1
    assert [*scene.traces(), *(scene.home / "to4").iterdir()] == []
    # and one whose bringer had been killed leaves what `recover` removes
    async with _detached(scene, "to3"):
        await killed(scene.local)
    assert scene.traces() != []
    said = await asyncio.to_thread(scene.qmpsnap, "recover", "web")
    assert (said.returncode, scene.traces()) == (0, []), said


@pytest.mark.timeout(400)
async def test_every_page_comes(short: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a guest that stays paused, so that what it has can be compared."""
    async with booted(binary("11.1"), short, memory=_MEMORY) as guest:
        engine = Engine(short / "local", store, allow_local_store=True, ram_images=0)
        with witness(guest.qemu.witness) as eye:
            eye.ask("stop")
            await engine.create(Machine("web", guest.qmp), Wishes(max_pause=None))
            before = _ram(eye, short)
    scene = Scene(short, store, Witness("", 0, None, None, True))
    words = np.frombuffer(before, np.uint64)
    at = int(np.flatnonzero(words[: _HOLE[0] >> 3 << 6])[-1]) << 3
    async with _detached(scene) as (back, _):
        assert await _status(back) == "postcopy-active"
        await killed(scene.local)
        with witness(back.machine.socket) as eye:
            looking = await _stuck(eye, at)
            said = await asyncio.to_thread(scene.qmpsnap, "recover", "web")
            assert said.returncode == 0, said.stderr
            assert int((await looking).split()[1], 16) == words[at >> 3]
            await seen(lambda: scene.traces() == [])
            assert eye.ask("query-migrate")["status"] == "completed"
            assert eye.status == "paused"
            assert _ram(eye, short) == before
    # damage is no reason to end a guest that runs already: it waits, until that is mended
    pack = _largest(store / "web/shared")
    async with _detached(scene, "to3") as (back, _):
        with harmed(pack, flipped(pack.stat().st_size // 2)):
            scene.gate.touch()
            for _ in range(2):
                await seen(lambda: bringers(scene.local) == [])
                trouble = json.loads((short / "to3" / STATUS).read_text())["trouble"]
                # which of the two depends on what the bit is in zstd's frame
                assert re.search("another chunk|cannot be unpacked", trouble)
                async with asyncio.timeout(20):  # QEMU sees a moment later that its source has gone
                    while await _status(back) != "postcopy-paused":
                        pass
                (short / "to3" / STATUS).unlink()
                said = await asyncio.to_thread(scene.qmpsnap, "recover", "web")
                assert said.returncode == 0, said.stderr
            await seen(lambda: bringers(scene.local) == [])
        said = await asyncio.to_thread(scene.qmpsnap, "recover", "web")
        assert said.returncode == 0, said.stderr
        await seen(lambda: scene.traces() == [])
        with witness(back.machine.socket) as eye:
            assert _ram(eye, short) == before
    # the engine itself puts another in the place of one that is killed
    async with asyncio.TaskGroup() as group:
        scene.gate.unlink(missing_ok=True)
        engine = scene.engine()
        ready = await engine.prepare_restore("web", Restoration(short / "to2"))
        let_go, go = asyncio.Event(), feeding.Feeder.go
        monkeypatch.setattr(feeding.Feeder, "go", lambda one: (go(one), let_go.set()))
        killing = group.create_task(_killed_once(scene, let_go))
        async with engine.restored(ready) as again:
            assert killing.done()
            with witness(again.machine.socket) as eye:
                assert _ram(eye, short) == before
    assert scene.traces() == []


async def _killed_once(scene: Scene, let_go: asyncio.Event) -> None:
    """Who brings RAM is killed once the guest may run; then all may come."""
    await let_go.wait()
    await killed(scene.local)
    scene.gate.touch()
