"""What a QEMU answers over QMP, as the modules that ask for it understand it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from qmpsnap.engine import details, recover, survey
from qmpsnap.errors import CommandRefused, SnapError
from qmpsnap.hypervisor import abilities
from qmpsnap.hypervisor.block import bitmap, fold, graph, job
from qmpsnap.hypervisor.guest import runstate
from qmpsnap.hypervisor.machine import attach, figures, inventory, reconcile
from qmpsnap.hypervisor.machine.plugged_disks import Image
from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.hypervisor.vmstate import migration, postcopy, target
from tests.fuzz import mutation, samples
from tests.fuzz.record import _LINE, FILE, called
from tests.fuzz.surface import Surface

Told = dict[str, Any]
Ask = Callable[["Recorded"], Awaitable[object]]
_REFUSED = "$refused"
_LINE_OF = ["qemu-system-x86_64", *_LINE]


class Recorded(Monitor):
    """Answers as *told*, which has been heard of a QEMU once; what is not in it is refused."""

    def __init__(self, told: Told) -> None:
        self.path, self.told, self.asked = Path("/run/qmp.sock"), told, set[str]()

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        name = called(command, arguments)
        self.asked.add(name)
        asks = command.startswith(("query-", "qom-", "x-debug", "device-list", "human"))
        found = self.told.get(name, {_REFUSED: "it is not known"} if asks else {})
        if isinstance(found, dict) and isinstance(found.get(_REFUSED), str):
            raise CommandRefused(command, "GenericError", found[_REFUSED])
        return found

    urgently = execute

    @property
    def lost(self) -> bool:
        return False

    @contextmanager
    def listen(self, *_names: str) -> Iterator[Any]:
        yield None


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def driven(work: Coroutine[Any, Any, object]) -> object:
    """What comes of *work*, on a loop that all of this process share."""
    return _loop().run_until_complete(work)


@cache
def _versions() -> dict[str, Told]:
    return json.loads(FILE.read_bytes())


def _seeds(ask: Ask) -> list[Told]:
    """Of each QEMU what it answers to what is asked there."""
    found = []
    for told in _versions().values():
        monitor = Recorded(told)
        with suppress(SnapError):
            driven(_of(ask, monitor))
        found.append({name: told[name] for name in sorted(monitor.asked & told.keys())})
    return found


async def _of(ask: Ask, monitor: Recorded) -> object:
    return await ask(monitor)


def _replies(name: str, ask: Ask, *, slow: bool = False) -> Surface:
    def tried(given: Any, _scratch: Path) -> object:
        return driven(_of(ask, Recorded(given if isinstance(given, dict) else {})))

    return Surface(f"qmp-{name}", lambda: _seeds(ask), tried, mutation.tree, slow=slow)


async def _graph(monitor: Recorded) -> object:
    seen = await graph.query(monitor)
    for name in seen.nodes:
        seen.path(graph.NodeName(name)), seen.parents(graph.NodeName(name))
    for disk in seen.disks:
        assert all(isinstance(one, str) for one in (disk.name, *disk.names))
        attached = attach.facts(_LINE_OF, Path("/"))
        site = survey._site(disk, seen, attached, set(), Path("/vm"), Path("/l"))
        assert site.origin is not None and site.flash in (True, False)  # noqa: PT018
        bitmap.classify(disk.chain, bitmap.name_of("vm", "vda", samples.ID))
        # figures are worked with
        [one.virtual_size + one.actual_size for one in disk.chain]
        [one.count + one.granularity for node in disk.chain for one in node.bitmaps]
    return seen


async def _machine(monitor: Recorded) -> object:
    seen = await inventory.take(monitor)
    survey._ram_bytes(seen)
    return _read_again(seen)


def _read_again(seen: Any) -> Any:
    """As a file has it; words that are no text are refused before it comes to that."""
    try:
        text = msgspec.json.encode(seen)
    except UnicodeEncodeError:
        return seen
    return msgspec.json.decode(text, type=type(seen))


async def _inventoried() -> inventory.Inventory:
    told = next(iter(_versions().values()))
    return await inventory.take(Recorded(told))


async def _details(monitor: Recorded) -> object:
    line = attach.facts(_LINE_OF, Path("/")).line
    subject = details.Subject(await _inventoried(), None, line, Path("/"), (), None, True)
    return _read_again(await details.take(monitor, subject))


async def _reconciled(monitor: Recorded) -> object:
    line = attach.facts(_LINE_OF, Path("/")).line
    seen = await inventory.take(monitor)
    block = await graph.query(monitor)
    images = [Image(disk, "x", "/x") for disk in block.disks]
    return await reconcile.reconcile(monitor, seen, line, images, block.nodes)


async def _migration(monitor: Recorded) -> object:
    now = await migration.query(monitor)
    now.refuse_over()
    return now


async def _tuned(monitor: Recorded) -> object:
    async with migration.tuned(monitor, {"events"}, {"downtime-limit": 1}):
        return None


async def _recovered(monitor: Recorded) -> object:
    owed = msgspec.convert(samples.sample(recover.Owed), recover.Owed)
    machine: Any = None
    with suppress(SnapError):
        await recover._refuse_other(monitor, machine, msgspec.structs.replace(owed, uuid=None))
    await recover._is_the_same(monitor, owed)
    with suppress(SnapError):
        await abilities.broken_off(monitor)
    await target.forget_all(monitor)
    await recover._migration_ended(monitor, msgspec.structs.replace(owed, failure_safe=True))
    return await recover._set_back(monitor, owed)


async def _states(monitor: Recorded) -> object:
    return (
        await runstate.query(monitor), await job.at_work(monitor), await bitmap.query(monitor),
        await fold.took_over(monitor, graph.NodeName("d1")),
    )  # fmt: skip


ALL = [
    _replies("graph", _graph),
    _replies("states", _states),
    _replies("abilities", abilities.probe),
    _replies("inventory", _machine),
    _replies("details", _details, slow=True),
    _replies("reconcile", _reconciled, slow=True),
    _replies("figures", figures.query),
    _replies("migration", _migration),
    _replies("tuned", _tuned),
    _replies("recover", _recovered),
    _replies("postcopy", postcopy.trouble),
]
