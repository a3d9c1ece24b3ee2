"""A history, carried out on a real QEMU: operations, and all that must hold between them."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from qmpsnap.engine.engine import Engine
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.errors import Blocked, SnapError, StoreError
from qmpsnap.host import journal
from qmpsnap.store import half, shipping, wire, worker
from qmpsnap.store.files import Progress, told
from qmpsnap.store.layout import StoreRoot
from qmpsnap.store.points import read as read_points
from qmpsnap.store.remote import Store
from tests.histories import deeds
from tests.histories.deeds import VM
from tests.histories.history import Operation
from tests.histories.model import Disk, Model, Point, State, difference
from tests.rig.graph import ask, chains, status, untouched
from tests.rig.qemu import Running, running
from tests.rig.wire import Fault, Wire, Witness, wired, witness

log = logging.getLogger(__name__)
T = TypeVar("T")
_AT_THE_END: list[Operation] = [["check"], ["restart"], ["check"]]
# of files of which each engine writes the next one: that takes the place of what was left
_WRITTEN_AGAIN = {"last.partial", "identity.json.partial", "usage.json.partial"}
_UUID = "8d9a1f1e-5b0c-4f0e-9a51-3d2f6b1c7e42"


class Wrong(AssertionError):
    """A history came out otherwise than it must."""


class Near(Store):
    """The store's verbs without a process for each: a history asks for hundreds of them."""

    async def _ask(
        self,
        request: wire.AnyRequest,
        kind: type[T],
        on_progress: Progress | None = None,
        *,
        pass_fds: tuple[int, ...] = (),
    ) -> T:
        answer = await asyncio.to_thread(self._answer, request)
        return msgspec.json.decode(msgspec.json.encode(answer), type=kind)

    def _answer(self, request: wire.AnyRequest) -> Any:
        root = StoreRoot(Path(request.root))
        with told(root.path, StoreError):
            match request:  # those that the worker would report the progress of
                case wire.Catalogue(vm=vm):
                    return half.catalogue(root, vm, _quiet)
                case wire.Ship():
                    return shipping.ship(root, request, _quiet)
                case wire.Verify():
                    return half.verify(root, request, _quiet)
            return worker.answer_to(request)


def _quiet(done: int, total: int, what: str) -> None:
    """Nobody looks on."""


class World:
    """The VM of one history, its roots, and the model of what they must hold."""

    def __init__(self, qemu: Path, home: Path, disks: list[dict[str, Any]]) -> None:
        self.home, self._qemu = home, qemu
        self.local, self.store, self._images = home / "local", home / "store", home / "images"
        self._disks = disks
        self._labels = [f"v{index}" for index in range(len(disks))]
        self.model = Model(
            {label: Disk(one["size"]) for label, one in zip(self._labels, disks, strict=True)}
        )
        self.counts: collections.Counter[str] = collections.Counter()
        self._stack = contextlib.AsyncExitStack()
        self._running: Running | None = None
        self._wire: Wire | None = None
        self._owing: list[State] | None = None
        self._tops: dict[str, Path] = {}
        self._sound: set[str] = set()
        self.engine = Engine(self.local, self.store, allow_local_store=True)
        self.engine.roots = replace(
            self.engine.roots, store=Near(self.engine.roots.store.root, within=60)
        )

    async def open(self) -> None:
        for folder in (self._images, self.store):
            folder.mkdir()
        for label, one in zip(self._labels, self._disks, strict=True):
            self._tops[label] = self._made(label, one)
        await self._start()

    async def close(self) -> None:
        await self._stack.aclose()

    def _made(self, label: str, one: dict[str, Any]) -> Path:
        size = one["size"]
        if one["kind"] != "backed":
            path = self._images / f"{label}.{one['kind']}"
            _qemu_img("create", "-f", one["kind"], path, size)
            return path
        base, path = self._images / f"{label}.base.raw", self._images / f"{label}.qcow2"
        content = bytes((index // 4096) % 251 for index in range(0, size, 4096))
        data = b"".join(bytes([value]) * 4096 for value in content)[:size]
        base.write_bytes(data)
        self.model.disks[label].write(0, data)
        _qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", base, path, size)
        return path

    # -- the VM ------------------------------------------------------------------------------

    @property
    def machine(self) -> Machine:
        """The VM by its own socket."""
        return Machine(VM, self.home / "qmp")

    @property
    def _vm(self) -> Running:
        assert self._running is not None
        return self._running

    async def _start(self) -> None:
        line = ["-M", "pc", "-m", "32", "-nodefaults", "-uuid", _UUID]
        for label, one in zip(self._labels, self._disks, strict=True):
            top = self._tops[label]
            driver = "raw" if top.suffix == ".raw" else "qcow2"
            unmap = ",discard=unmap,file.discard=unmap" if one["unmap"] else ""
            line += [
                "-blockdev",
                f"driver={driver},node-name=n{label}{unmap},file.driver=file,file.filename={top}",
                *("-device", f"virtio-blk-pci,drive=n{label},id={label}"),
            ]
        for name in ("qmp", "witness"):
            (self.home / name).unlink(missing_ok=True)
        await self._stack.aclose()
        self._running = await self._stack.enter_async_context(
            running(self._qemu, *line, directory=self.home)
        )
        self._wire = self._stack.enter_context(wired(self.home / "wire", self._running.qmp))
        with witness(self._running.witness) as eye:
            eye.until_running(within=20)

    async def _ended(self, end: Callable[[], None]) -> None:
        """QEMU ends by *end*; what it wrote to last is remembered."""
        before = {
            name: [Path(one) for one in files] for name, files in (await self._chains()).items()
        }
        if self._owing is not None:
            self._sound.clear()
        end()
        await self._settled_offline(before)

    async def _chains(self) -> dict[str, list[str]]:
        return await chains(self._vm.witness)

    async def _settled_offline(self, before: dict[str, list[Path]]) -> None:
        await self._stack.aclose()
        if journal.pending(self.local / VM / "journal"):
            await self.engine.recover(self.machine)
            self.counts["recovered offline"] += 1
        for label, files in before.items():
            self._tops[label] = next(path for path in files if path.exists())
        await self._live_is_right("after QEMU ended")
        # a raw image's bitmaps end with QEMU
        self._sound -= {
            label for label in self._labels if any(path.suffix == ".raw" for path in before[label])
        }

    async def _live_is_right(self, when: str) -> None:
        for label, top in self._tops.items():
            found = await self._read(top)
            if problem := _difference(self.model.disks[label], found):
                raise Wrong(f"the guest's disk {label} ({top}) {when}: {problem}")

    async def _read(self, image: Path) -> bytes:
        with tempfile.NamedTemporaryFile(prefix="qh", dir="/dev/shm") as raw:
            format = "raw" if image.suffix == ".raw" else "qcow2"
            await asyncio.to_thread(
                _qemu_img, "convert", "-f", format, "-O", "raw", image, raw.name
            )
            raw.seek(0)
            return raw.read()

    # -- what the guest does -----------------------------------------------------------------

    def _stroke(self, eye: Witness, stroke: Operation) -> None:
        word, index, offset, size, *pattern = stroke
        label = self._labels[index]
        disk = self.model.disks[label]
        offset %= disk.size
        size = min(size, disk.size - offset)
        match word:
            case "data":
                self._io(eye, label, f"write -P {pattern[0]} {offset} {size}")
                disk.write(offset, bytes(pattern) * size)
            case "zero":
                self._io(eye, label, f"write -z {offset} {size}")
                disk.write(offset, bytes(size))
            case "unmap":
                self._io(eye, label, f"write -z -u {offset} {size}")
                disk.write(offset, bytes(size))
            case "discard":
                self._io(eye, label, f"discard {offset} {size}")
                self._discarded(eye, label, offset, size)
        self.model.changed()

    def _discarded(self, eye: Witness, label: str, offset: int, size: int) -> None:
        """A discard may do nothing to a piece of it, or turn it into zeros: look which."""
        at, end = offset, offset + size
        while at < end:
            upto = min(end, (at // 4096 + 1) * 4096)
            if "verification failed" not in self._io(eye, label, f"read -P 0 {at} {upto - at}"):
                self.model.disks[label].write(at, bytes(upto - at))
            at = upto

    def _io(self, eye: Witness, label: str, command: str) -> str:
        """One command of qemu-io on what the device *label* has, and what it said.

        It says it on QEMU's standard output, and nothing on the monitor.
        """
        device = f"/machine/peripheral/{label}/virtio-backend"
        with self._vm.log.open() as log:
            log.seek(0, os.SEEK_END)
            line = f'qemu-io -d {device} "{command}"'
            eye.ask("human-monitor-command", **{"command-line": line})
            said = log.read()
        word = {"write": "wrote", "discard": "discard", "read": "read"}.get(command.split()[0], "")
        size = command.split()[-1]
        if f"{word} {size}/{size} bytes" not in said and word:
            raise Wrong(f"{label}: {command}: {said}")
        return said

    def _flush(self) -> None:
        with witness(self._vm.witness) as eye:
            for label in self._labels:
                self._io(eye, label, "flush")

    # -- operations --------------------------------------------------------------------------

    async def carry_out(self, operation: Operation) -> None:
        """One operation of a history; raises Wrong, and whatever an engine must not raise."""
        word, *arguments = operation
        self.counts[word] += 1
        if self._owing is not None and not self._can_wait(word):
            await self._recover()
        match word:
            case "write":
                with witness(self._vm.witness) as eye:
                    self.model.begin()
                    for stroke in arguments[0]:
                        self._stroke(eye, stroke)
            case "create" | "refresh" | "delete" | "prune":
                if (deed := self._deed(operation)) is not None:
                    await self._deed_done(deed, operation)
            case "fault":
                inner, fault = arguments
                if (deed := self._deed(inner)) is not None:
                    if self._owing is not None:
                        await self._recover()
                    await self._fault(deed, fault)
            case "restart":
                vm = self._vm
                await self._ended(lambda: _quit(vm))
                await self._start()
            case "kill":
                self._flush()
                await self._ended(self._killed)
                await self._start()
            case "resize":
                await self._resize(*arguments)
            case "check":
                await self.check()

    def _can_wait(self, word: str) -> bool:
        """Whether *word* can come before a recovery; `create` and `refresh` settle it themselves.

        What a deletion that was cut off has left of a snapshot is nothing to refresh.
        """
        cut = self._faulty["verb"] if self._faulty is not None else ""
        refreshable = cut in {"create", "refresh"}
        return word in {"write", "create", "restart", "kill"} or (word == "refresh" and refreshable)

    def _killed(self) -> None:
        self._vm.kill()
        self._sound.clear()

    async def _resize(self, index: int, more: int) -> None:
        label = self._labels[index]
        disk = self.model.disks[label]
        if disk.size + more > 16 << 20:
            return
        top = (await self._chains())[label][0]
        for node in await ask(self._vm.witness, "query-named-block-nodes", {"flat": True}):
            if node["drv"] in {"qcow2", "raw"} and node["file"] == top and not node["ro"]:
                size = (disk.size + more + 511) // 512 * 512
                if any(one.get("inconsistent") for one in node.get("dirty-bitmaps", [])):
                    return  # after a kill QEMU refuses this until our next snapshot
                await ask(
                    self._vm.witness, "block_resize", {"node-name": node["node-name"], "size": size}
                )
                disk.resize(size)
                self._sound.discard(label)
                return
        raise Wrong(f"no node of {top} to resize")

    def _deed(self, operation: Operation) -> dict[str, Any] | None:
        """*operation* with the IDs that it means now; None when there is no snapshot to mean."""
        word, *arguments = operation
        there = self.model.snapshots()
        if word == "create":
            asked = arguments[0]
            return {**asked, "verb": word, "include": [self._labels[i] for i in asked["include"]]}
        if not there:
            return None
        if word == "prune":
            return {"verb": word, "last": arguments[0], "merging": arguments[1]}
        deed = {"verb": word, "id": there[arguments[0] % len(there)]}
        return {**deed, **arguments[1]} if word == "refresh" else deed

    async def _deed_done(self, deed: dict[str, Any], operation: Operation) -> None:
        owed, self._owing = self._owing, None
        self.model.begin()
        try:
            if deed.get("meanwhile"):
                strokes = asyncio.create_task(self._meanwhile(deed["meanwhile"]))
                try:
                    done = await deeds.do(self.engine, self.machine, deed)
                finally:
                    await strokes  # nothing is written under the operation that comes next
            else:
                done = await deeds.do(self.engine, self.machine, deed)
        except Blocked as blocked:
            if deed["verb"] != "create" or deed["level"] not in {"inc", "diff"}:
                raise
            # the disks that were asked for
            labels = set(deed["include"] or self._labels)
            if deed["level"] == "inc" and labels <= self._sound:
                raise Wrong(f"an increment was possible, and was refused: {blocked}") from blocked
            self.counts["blocked"] += 1
            done = {}
        await self._reconcile(deed, done, owed, self.model.states())
        if (verb := deed["verb"]) in {"create", "refresh"} and done:
            self._learn(done)
        elif verb in {"delete", "prune"}:
            self._sound.clear()

    def _learn(self, done: dict[str, Any]) -> None:
        for label, level in done["levels"].items():
            self.counts[f"level {level}"] += 1
            if level != "overlay":
                self._sound.add(label)

    async def _meanwhile(self, strokes: list[Operation]) -> None:
        """The guest writes while the engine is at work."""

        def written() -> None:
            with witness(self._vm.witness) as eye:
                for stroke in strokes:
                    self._stroke(eye, stroke)
                    time.sleep(0.03)

        await asyncio.to_thread(written)

    async def _fault(self, deed: dict[str, Any], fault: dict[str, Any]) -> None:
        assert self._wire is not None
        self.model.begin()
        self._sound.clear()
        self.counts[f"fault {fault['how']}"] += 1
        self._flush()
        how, at = fault["how"], fault["at"]
        machine = Machine(VM, self._wire.path)
        before: dict[str, list[Path]] = {}
        if how in {"engine at call", "engine at note", "engine at command"}:
            die = None if how == "engine at command" else at
            with deeds.dying(
                deed, qmp=machine.socket, local=self.local, store=self.store, die=die
            ) as process:
                if how == "engine at command":
                    self._wire.arm(Fault(at, delivered=fault["delivered"], then=process.kill))
                await deeds.outcome(process)
            self.counts["happened"] += process.returncode == -9
            if process.returncode not in {0, -9}:
                raise Wrong(f"{deed} ended with {process.returncode}")
        else:
            vm = self._vm

            def killed() -> None:
                before.update(
                    (name, [Path(one) for one in files])
                    for name, files in asyncio.run(chains(vm.witness)).items()
                )
                vm.kill()

            then = killed if how == "qemu" else None
            self._wire.arm(
                Fault(at, delivered=fault["delivered"], then=then, dead=fault.get("dead", False))
            )
            try:
                await deeds.do(self.engine, machine, deed)
            except SnapError as failed:
                log.info("%s: %s: %s", how, type(failed).__name__, failed)
            self.counts["happened"] += self._wire.happened.is_set()
        self._wire.arm(None)
        self._owing = self.model.states()
        if before:
            await self._settled_offline(before)
            await self._start()
            self._owing = None
            await self._reconcile(deed, {}, self.model.states(), [])
            return
        self._wire.close()
        self._wire.listen()
        with witness(self._vm.witness) as eye:
            eye.until_running(within=10)
        self._faulty = deed
        if not fault["later"]:
            await self._recover()

    _faulty: dict[str, Any] | None = None

    async def _recover(self) -> None:
        owed, self._owing = self._owing, None
        await self.engine.recover(self.machine)
        assert self._faulty is not None
        await self._reconcile(self._faulty, {}, owed, [])

    # -- what must hold ----------------------------------------------------------------------

    async def _reconcile(
        self, deed: dict[str, Any], done: dict[str, Any], owed: list[State] | None, now: list[State]
    ) -> None:
        """The model learns which snapshots there are; those that nothing explains are wrong.

        *done* is the deed's own word; without it all or nothing of it may have happened. *owed*:
        the states of a deed before, which was broken off.
        """
        if journal.pending(self.local / VM / "journal"):
            raise Wrong(f"the journal owes something after {deed}")
        _, waiting = await self.engine.ship(VM)
        if waiting:
            raise Wrong(f"not shipped after {deed}: {waiting}")
        entries = await self.engine.list(VM)
        if odd := [(one.id, one.state, one.why) for one in entries if one.state != "paired"]:
            raise Wrong(f"after {deed}: {odd}")
        there = {one.id for one in entries}
        known = set(self.model.snapshots())
        gone = known - there
        if "kept" in done and set(done["kept"]) != there:
            raise Wrong(f"{deed} keeps {sorted(done['kept'])}; there are {sorted(there)}")
        allowed = {deed.get("id")} if deed["verb"] == "delete" else set()
        if self._faulty is not None:
            allowed |= {self._faulty.get("id")} if self._faulty["verb"] == "delete" else set()
        pruned = "prune" in {deed["verb"], self._faulty["verb"] if self._faulty else ""}
        if not pruned and not gone <= allowed:
            raise Wrong(f"{deed}: {sorted(gone)} went")
        if done.get("deleted") in there:
            raise Wrong(f"{deed}: it is still there")
        self.model.forget(gone)
        mine = (done.get("id"), done.get("revision", 0))
        for id in sorted(there):
            for storage in await self.engine.revisions(VM, id):
                key = (id, storage.revision)
                if key in self.model.points:
                    continue
                states = now if key == mine else owed
                if states is None or (not now and done and key == mine):
                    raise Wrong(f"{key} came with {deed}, which made {mine}")
                labels = tuple(disk.label for disk in storage.disks)
                self.model.points[key] = Point(id, storage.revision, labels, states, str(deed))
        if done.get("id") and mine not in self.model.points:
            raise Wrong(f"{deed} made {mine}, which is not there")
        self._faulty = None

    async def check(self) -> None:
        """Every promise, with nothing owed."""
        if self._owing is not None:
            await self._recover()
        await self._guest_is_free()
        self._no_leftovers(await self._chains())
        gate = asyncio.Semaphore(3)
        async with asyncio.TaskGroup() as group:
            for number, point in enumerate(list(self.model.points.values())):
                group.create_task(self._restores(point, gate, standalone=number % 3 == 0))
            for id in self.model.snapshots():
                group.create_task(self._verifies(id, gate))

    async def _guest_is_free(self) -> None:
        if (state := await status(self._vm.witness)) != "running":
            raise Wrong(f"the guest is {state}")
        await untouched(self._vm.witness)
        nodes = await ask(self._vm.witness, "query-named-block-nodes", {"flat": True})
        odd = [
            (node["node-name"], bitmap.get("name"))
            for node in nodes
            for bitmap in node.get("dirty-bitmaps", [])
            if not bitmap.get("name", "").startswith("qmpsnap:") or bitmap["busy"]
        ]
        if odd:
            raise Wrong(f"bitmaps {odd}")

    def _no_leftovers(self, seen: dict[str, list[str]]) -> None:
        used = {Path(name) for chain in seen.values() for name in chain}
        kept = {
            Path(image.path)
            for key in self.model.points
            for storage in [self._storage(key)]
            for disk in storage
            for image in disk.chain
        }
        for path in [*self._images.iterdir(), *(self.local / VM / "layers").glob("*")]:
            if path not in used | kept and not path.name.endswith(".base.raw"):
                # the tops that a delete has folded into what lay beneath are gone, ours too
                raise Wrong(f"{path} is of no use to anybody")
        for path in self.home.rglob("*"):
            if path.name in _WRITTEN_AGAIN:
                continue
            if path.suffix in {".partial", ".plain", ".part"} or ".partial" in path.name:
                raise Wrong(f"{path} was left")

    def _storage(self, key: tuple[str, int]) -> list[Any]:
        points = read_points(self.engine.roots.local, VM)
        return [
            disk
            for point in points
            for disk in point.storage.disks
            if (point.storage.id, point.storage.revision) == key
        ]

    async def _restores(self, point: Point, gate: asyncio.Semaphore, *, standalone: bool) -> None:
        name = f"{point.snapshot} revision {point.revision} ({point.by})"
        async with gate:
            folder = Path(tempfile.mkdtemp(prefix="r", dir=self.home))
            try:
                wish = Restoration(
                    folder, cold=True, revision=point.revision, standalone=standalone
                )
                try:
                    await self.engine.prepare_restore(VM, wish, point.snapshot)
                except SnapError as failed:
                    raise Wrong(f"{name} is not restored: {failed}") from failed
                found = {
                    label: await self._read(folder / f"{label}.qcow2") for label in point.labels
                }
            finally:
                shutil.rmtree(folder)
        self.counts["restored"] += 1
        if problem := point.judge(found):
            raise Wrong(f"{name}: {problem}")

    async def _verifies(self, id: str, gate: asyncio.Semaphore) -> None:
        async with gate:
            seen = await self.engine.verify(VM, id)
        if seen.findings:
            raise Wrong(f"verify {id}: {seen.findings}")


def _difference(disk: Disk, found: bytes) -> str:
    return difference(disk.content, found)


def _quit(vm: Running) -> None:
    with witness(vm.witness) as eye:
        eye.ask("quit")
        # its end closes the monitor
        with contextlib.suppress(ConnectionError, OSError):
            while True:
                eye.ask("query-status")


def _qemu_img(*arguments: object) -> None:
    ran = subprocess.run(
        ["qemu-img", arguments[0], "-q", *map(str, arguments[1:])],
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise Wrong(f"qemu-img {arguments}: {ran.stderr}")


@contextlib.asynccontextmanager
async def world(qemu: Path, folder: Path, disks: list[dict[str, Any]]) -> AsyncIterator[World]:
    home = Path(tempfile.mkdtemp(prefix="qh", dir=folder))
    one = World(qemu, home, disks)
    try:
        await one.open()
        yield one
    finally:
        await one.close()
        shutil.rmtree(home, ignore_errors=True)


async def carried_out(
    told: dict[str, Any], qemu: Path, folder: Path, *, within: float = 240
) -> collections.Counter[str]:
    """The whole history *told*, checked at its end; how often what happened.

    Raises Wrong with the operation at which it went wrong.
    """
    done = "the start"
    try:
        async with asyncio.timeout(within), world(qemu, folder, told["disks"]) as one:
            for number, operation in enumerate([*told["operations"], *_AT_THE_END]):
                done = f"operation {number}, {operation}"
                began = time.monotonic()
                await one.carry_out(operation)
                log.debug("%5.1f s %s", time.monotonic() - began, done)
            return one.counts
    except Exception as failed:
        raise Wrong(f"{done}: {_told(failed)}") from failed


def _told(failure: BaseException) -> str:
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return f"{type(failure).__name__}: {failure}"
