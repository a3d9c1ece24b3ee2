"""A guest runs on while its RAM still comes, whoever dies meanwhile, and gets all of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.arrivals import STATUS
from qmpsnap.engine.restore import Restoration, Restored
from qmpsnap.engine.wishes import Wishes
from qmpsnap.errors import VmBusy
from qmpsnap.hypervisor.monitor import connect
from tests.rig.arriving import bringers, family, gated, gone, killed, seen
from tests.rig.console import Console, Witness
from tests.rig.guest import booted
from tests.rig.qemu import ROOT, binary

pytestmark = pytest.mark.guest


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


def _same(scene: Scene, *found: Witness) -> None:
    assert all(one.ok and one.nonce == scene.before.nonce for one in found), found
    counts = [one.ram for one in found]
    assert sorted(counts) == counts


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
        asked = asyncio.create_task(console.witness(within=120))
        said = await asyncio.to_thread(scene.qmpsnap, "recover", "web")
        assert said.returncode == 0, said.stderr
        assert "its pages come again" in said.stdout
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
    # and one whose bringer had been killed leaves what `recover` removes
    async with _detached(scene, "to3"):
        await killed(scene.local)
    assert scene.traces() != []
    said = await asyncio.to_thread(scene.qmpsnap, "recover", "web")
    assert (said.returncode, scene.traces()) == (0, []), said
