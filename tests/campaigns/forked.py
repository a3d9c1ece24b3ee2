"""An engine in a process of its own, forked off one that has imported all of it already.

A fresh interpreter takes half a second to import the engine; a campaign starts thousands.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qmpsnap.engine.engine import Engine
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import RamChoice, Wishes
from qmpsnap.errors import SnapError
from qmpsnap.hypervisor.guest import quiesce
from qmpsnap.hypervisor.vmstate import session
from tests.campaigns.awaits import Eye, Strike
from tests.rig.wire import witness

_METHOD = multiprocessing.get_context("forkserver")
_METHOD.set_forkserver_preload(["tests.campaigns.forked", "qmpsnap.hypervisor.vmstate.split"])


@dataclass(frozen=True, slots=True)
class Job:
    """A verb of the engine and all that it needs. *wishes* are those of `create`.

    *margin* and *longest*: seconds, the watchdog's margin and the longest freeze, if not those
    of the product.
    """

    verb: str
    machine: Machine
    local: Path
    store: Path
    wishes: Wishes = field(default_factory=Wishes)
    word: str = "latest"
    to: Path | None = None
    strike: Strike | None = None
    margin: float | None = None
    longest: float | None = None


class Forked:
    """A process that carries out *job*."""

    def __init__(self, job: Job) -> None:
        self._said, saying = _METHOD.Pipe(duplex=False)
        self.process = _METHOD.Process(target=_main, args=(job, saying))
        self.process.start()
        saying.close()

    def ended(self, within: float = 120) -> dict[str, Any]:
        """What it said, empty if it was killed. Raises TimeoutError, and kills it then."""
        try:
            # it may say more than a pipe holds, and waits then
            told = self._said.recv_bytes() if self._said.poll(within) else None
        except EOFError:
            told = b""
        if told is None:
            self.process.kill()
        self.process.join()
        self._said.close()
        if told is None:
            raise TimeoutError(f"not within {within:g} s")
        if not told and self.process.exitcode != -signal.SIGKILL:
            return {"error": f"it crashed: {self.process.exitcode}"}
        return dict(json.loads(told or b"{}"))


def run(job: Job, within: float = 120) -> dict[str, Any]:
    """What a fresh process says to *job*; `error` is in it when that failed."""
    return Forked(job).ended(within)


def _main(job: Job, saying: Connection) -> None:
    logging.getLogger().addHandler(logging.NullHandler())
    tempfile.tempdir = str(job.local.parent)  # the sockets of a copy
    if job.margin is not None:
        session.MARGIN = job.margin
    if job.longest is not None:
        # so soon that the watchdog, and not the engine's own bound, ends the freeze
        quiesce._MARGIN = job.longest - quiesce.MAX_FREEZE
    eye = Eye(job.strike)
    engine = Engine(job.local, job.store, allow_local_store=True)
    try:
        with asyncio.Runner(loop_factory=eye.loop) as runner:
            told = runner.run(_VERBS[job.verb](engine, job))
    except SnapError as failed:
        told = {"error": f"{type(failed).__name__}: {failed}", "exit_code": failed.exit_code}
    told |= {"visits": list(eye.visits.items()), "suspensions": eye.suspensions}
    saying.send_bytes(json.dumps(told).encode())
    saying.close()


async def _create(engine: Engine, job: Job) -> dict[str, Any]:
    return {"id": (await engine.create(job.machine, job.wishes)).id}


async def _refresh(engine: Engine, job: Job) -> dict[str, Any]:
    made = await engine.refresh(
        job.machine, job.word, quiesce=job.wishes.quiesce, max_pause=job.wishes.max_pause
    )
    return {"id": made.id, "revision": made.revision}


async def _recover(engine: Engine, job: Job) -> dict[str, Any]:
    return {"settled": [one.did for one in await engine.recover(job.machine)]}


async def _ship(engine: Engine, job: Job) -> dict[str, Any]:
    sent, waiting = await engine.ship("vm")
    return {"sent": [one.id for one in sent], "waiting": [str(one) for one in waiting]}


async def _list(engine: Engine, job: Job) -> dict[str, Any]:
    return {"states": {one.id: one.state for one in await engine.list("vm")}}


async def _verify(engine: Engine, job: Job) -> dict[str, Any]:
    seen = await engine.verify("vm", job.word, machine=job.machine)
    return {"findings": [str(one) for one in seen.findings]}


async def _restore(engine: Engine, job: Job) -> dict[str, Any]:
    assert job.to is not None
    cold = job.wishes.ram is RamChoice.NONE
    ready = await engine.prepare_restore("vm", Restoration(job.to, cold=cold), job.word)
    async with engine.restored(ready) as back:
        qmp = back.machine.qmp
        assert qmp is not None
        with witness(qmp) as eye:
            await asyncio.to_thread(eye.until_running, within=20)
    return {"restored": True}


_VERBS: dict[str, Callable[[Engine, Job], Coroutine[Any, Any, dict[str, Any]]]] = {
    "create": _create,
    "refresh": _refresh,
    "recover": _recover,
    "ship": _ship,
    "list": _list,
    "verify": _verify,
    "restore": _restore,
}
