"""A guest of a soak, and the ground that it stands on: roots and lines that can fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.badfs import BadFs, badfs
from tests.rig.console import Console, Heartbeat
from tests.rig.graph import ask, chains
from tests.rig.guest import Guest, blockdev, booted, disk
from tests.rig.qemu import ROOT
from tests.rig.wire import Wire, wired
from tests.soak.agentline import AgentLine, agent_line

VM = "soak"
_LOCAL_SIZE = "1200m"
DISKS = ("vd0", "vd1")


@dataclass(frozen=True, slots=True)
class Ran:
    """A verb that has ended, or was ended."""

    words: list[str]
    code: int
    out: str
    err: str

    @property
    def told(self) -> str:
        lines = self.err.strip().splitlines()
        return f"`{' '.join(self.words)}` ended with {self.code}: {lines[-1] if lines else ''}"


@dataclass
class Plot:
    """*local* is a small tmpfs, *store* a file system that fails when told to."""

    home: Path
    qemu: Path
    bad: BadFs
    content: Path
    tops: dict[str, Path] = field(default_factory=dict)
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    _guest: Guest | None = None
    _wire: Wire | None = None
    _line: AgentLine | None = None
    _listener: asyncio.Task[None] | None = None

    @property
    def local(self) -> Path:
        return self.home / "local"

    @property
    def guest(self) -> Guest:
        assert self._guest is not None
        return self._guest

    @contextlib.asynccontextmanager
    async def console(self) -> AsyncIterator[Console]:
        """The guest's console; as long as nobody has it, what it says is read all the same."""
        if self._listener is not None:
            self._listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listener
        try:
            yield self.guest.console
        finally:
            self._listener = asyncio.create_task(self.guest.console.listen())

    @property
    def wire(self) -> Wire:
        assert self._wire is not None
        return self._wire

    @property
    def line(self) -> AgentLine:
        assert self._line is not None
        return self._line

    def config(self) -> None:
        """Write the configuration that all verbs read."""
        (self.home / "qmpsnap.toml").write_text(
            f'local = "{self.local}"\nstore = "{self.bad.path}"\nallow_local_store = true\n'
            f'store_timeout = "10s"\nship_retry = "3s"\n[vm.{VM}]\nsocket = "{self.home}/wire"\n'
            f'agent_socket = "{self.home}/line"\n'
        )

    async def boot(self) -> None:
        """Start the guest from where its disks are now."""
        for name in DISKS:
            if name not in self.tops:
                kind = "qcow2" if name == "vd0" else "raw"
                self.tops[name] = disk(self.home / f"{name}.{kind}", kind, "48M")
        line = [
            word
            for name, top in self.tops.items()
            for word in blockdev(top, f"n{name}", top.suffix[1:], device=name)
        ]
        for name in ("qmp", "witness", "console.sock", "agent.sock", "beat.sock"):
            (self.home / name).unlink(missing_ok=True)
        self._guest = await self._stack.enter_async_context(
            booted(self.qemu, self.home, disks=line, memory=96)
        )
        self._wire = self._stack.enter_context(wired(self.home / "wire", self.guest.qmp))
        self._line = self._stack.enter_context(agent_line(self.home / "line", self.guest.agent))
        async with self.console():
            pass

    async def power_off(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await self._listener
        self._listener = None
        await self._stack.aclose()

    async def tops_now(self) -> dict[str, list[Path]]:
        """The files of each disk, top first, as QEMU has them."""
        found = await chains(self.guest.qemu.witness)
        return {name: [Path(one) for one in found[name]] for name in DISKS}

    async def start(
        self, *words: object, before: Callable[[], None] | None = None
    ) -> asyncio.subprocess.Process:
        """A verb as a process; *before* runs in it, as in subprocess.Popen."""
        kept = {name: value for name, value in os.environ.items() if "QMPSNAP" not in name}
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.soak.verb", *map(str, words)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self.home,
            env={
                **kept,
                "HOME": str(self.home),
                "PYTHONFAULTHANDLER": "1",
                "PYTHONPATH": str(ROOT),
                "QMPSNAP_CONFIG": str(self.home / "qmpsnap.toml"),
                "QMPSNAP_RUNTIME_DIR": str(self.home / "run"),
            },
            preexec_fn=before,
        )

    async def ended(self, process: asyncio.subprocess.Process, words: list[str]) -> Ran:
        talk = asyncio.ensure_future(process.communicate())
        try:
            async with asyncio.timeout(180):
                out, err = await asyncio.shield(talk)
        except TimeoutError:
            raise TimeoutError(
                f"{words} took more than 180 s: {await self._why(talk, process)}"
            ) from None
        assert process.returncode is not None
        return Ran(words, process.returncode, out.decode(), err.decode())

    async def _why(
        self, talk: asyncio.Future[tuple[bytes, bytes]], process: asyncio.subprocess.Process
    ) -> str:
        """What a verb waits for that is not over: as QEMU tells, and the verb, which is ended."""
        told = [f"the last commands: {self.wire.names[-8:]}"]
        for command in ("query-status", "query-jobs", "query-migrate", "query-block-exports"):
            try:
                told.append(f"{command}: {await ask(self.guest.qemu.witness, command)}")
            except (TimeoutError, OSError, AssertionError) as failed:
                told.append(f"{command}: {failed!r}")
        for number in (signal.SIGUSR1, signal.SIGABRT):  # what its tasks do, and its threads
            if process.returncode is None:
                process.send_signal(number)
            done, _ = await asyncio.wait({talk}, timeout=5)
        told.append(talk.result()[1].decode() if done else "it is over; who has its pipes is not")
        return "\n".join(told)

    async def run(self, *words: object) -> Ran:
        """A verb, undisturbed."""
        return await self.ended(await self.start(*words), [str(word) for word in words])

    def hearing(self) -> contextlib.AbstractContextManager[Heartbeat]:
        return Heartbeat.open(self.guest.heartbeat)


@contextlib.contextmanager
def _tmpfs(path: Path) -> Iterator[None]:
    path.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_LOCAL_SIZE},mode=700", "soak", path], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@contextlib.asynccontextmanager
async def plot(qemu: Path, home: Path) -> AsyncIterator[Plot]:
    """A booted guest on *qemu*, everything of it in *home*, which goes with it. Needs root."""
    await asyncio.to_thread(home.mkdir)
    try:
        with _tmpfs(home / "local"), badfs(home / "store", home / "aside", images=False) as bad:
            one = Plot(home, qemu, bad, home / "aside/content")
            one.config()
            try:
                await one.boot()
                yield one
            finally:
                await one.power_off()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def records(ran: Ran) -> list[dict[str, object]]:
    """The JSON lines on stdout."""
    return [json.loads(line) for line in ran.out.splitlines()]
