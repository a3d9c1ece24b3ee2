"""The floor of restores: each of QEMU's own ways to come back, as a bare blocking QMP script.

All of them start from one whole stream and the disk of its instant: the other forms are made of
these, by a QEMU that loads them and saves itself again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.bare import UNLIMITED, Qmp, at, synced
from tests.rig.guest import blockdev, machine_options

TAG = "bench"
_RAM = "pc.ram"
_MULTIFD = {"mapped-ram", "multifd"}


@dataclass(frozen=True, slots=True)
class Form:
    """What a machine comes back from.

    *disk*: a qcow2, which is written to where it holds the state itself (*stream* is None), else
    beneath a new overlay. *ram*: the file of its pages, written to where they are *shared*.
    """

    disk: Path
    stream: Path | None
    ram: Path | None = None
    shared: bool = False
    capabilities: frozenset[str] = frozenset()

    def warm(self) -> None:
        """Have all that is read in the page cache, which owes the disk nothing of it."""
        for path in filter(None, (self.ram, self.stream or self.disk)):
            warm(path)


@dataclass(frozen=True, slots=True)
class Started:
    """A machine that is loaded, and paused. *begun*: when its process was started, as time()."""

    qmp: Qmp
    console: Path
    pid: int
    begun: float

    def resumed(self) -> float:
        """Let it run: milliseconds from the start of its process to RESUME."""
        self.qmp("cont")
        return (at(self.qmp.event("RESUME")) - self.begun) * 1000


@dataclass(frozen=True, slots=True)
class Whole:
    """A captured guest of *mib* MiB: its disk and its *stream*, and the QEMU that loads it."""

    qemu: Path
    mib: int
    disk: Path
    stream: Path

    @property
    def form(self) -> Form:
        return Form(self.disk, self.stream)

    @contextlib.contextmanager
    def started(self, form: Form) -> Iterator[Started]:
        """The machine of *form*. Raises ConnectionError with QEMU's last words."""
        with tempfile.TemporaryDirectory(prefix="r", dir=self.disk.parent) as name:
            folder = Path(name)
            with _process(self._argv(form, folder), folder) as (pid, begun):
                log = folder / "stderr"
                try:
                    qmp = Qmp(folder / "qmp")
                    if form.stream is not None:
                        _load(qmp, form.stream, form.capabilities)
                except ConnectionError as gone:
                    raise ConnectionError(log.read_text() or "QEMU said nothing") from gone
                try:
                    yield Started(qmp, folder / "console.sock", pid, begun)
                finally:
                    qmp.close()

    def _argv(self, form: Form, folder: Path) -> list[str]:
        image, machine, more = form.disk, "pc", ["-S", "-loadvm", TAG]
        if form.stream is not None:
            more = ["-S", "-incoming", "defer"]
            image = folder / "d0.qcow2"
            create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]
            subprocess.run([*create, str(form.disk), str(image)], check=True)
        if form.ram is not None:
            machine += f",memory-backend={_RAM}"
            share = "on" if form.shared else "off"
            backend = f"memory-backend-file,id={_RAM},size={self.mib}M,share={share}"
            more += ["-object", f"{backend},mem-path={form.ram}"]
        return [
            *(str(self.qemu), "-display", "none"),
            *machine_options(folder, memory=self.mib, machine=machine),
            *blockdev(image, "d0", "qcow2", device="vd0"),
            *more,
        ]

    def mapped_ram(self, folder: Path) -> Form:
        """QEMU's own pages at their places in a file, which two threads load."""
        with self.started(self.form) as one:
            saved(one.qmp, f"file:{folder / 'stream'}", _MULTIFD)
        return Form(self.disk, folder / "stream", capabilities=frozenset(_MULTIFD))

    def template(self, folder: Path) -> Form:
        """The RAM as a file that was mapped shared while it was saved, and is private later."""
        ram, skipping = folder / "ram", frozenset({"x-ignore-shared"})
        with self.started(Form(self.disk, self.stream, ram, shared=True)) as one:
            piped(one.qmp, ["cat"], folder / "stream", skipping)
        return Form(self.disk, folder / "stream", ram, capabilities=skipping)

    def internal(self, folder: Path) -> Form:
        """A snapshot inside of the qcow2."""
        disk = folder / "d0.qcow2"
        shutil.copyfile(self.disk, disk)
        with self.started(self.form) as one:
            # the image that it runs on is gone with it
            child = {"driver": "file", "filename": str(disk)}
            one.qmp("blockdev-add", driver="qcow2", node_name="kept", file=child)
            one.qmp("snapshot-save", job_id="s", tag=TAG, vmstate="kept", devices=["kept"])
            one.qmp.event("JOB_STATUS_CHANGE", status="concluded", id="s")
            _refuse_failed(one.qmp)
        return Form(disk, None)


def saved(qmp: Qmp, uri: str, capabilities: set[str] | frozenset[str] = frozenset()) -> None:
    """Save the machine, which is paused, to *uri*; it is as if never saved once it runs again."""
    wanted = {*capabilities, "events"}
    _set(qmp, wanted, state=True)
    qmp("migrate-set-parameters", max_bandwidth=UNLIMITED)
    qmp.events.clear()
    qmp("migrate", uri=uri)
    _completed(qmp)
    _set(qmp, wanted, state=False)
    qmp("migrate-set-parameters", max_bandwidth=128 << 20)


def piped(
    qmp: Qmp,
    command: list[str],
    target: Path,
    capabilities: set[str] | frozenset[str] = frozenset(),
) -> None:
    """Save the machine through *command* into *target*: the one way that all QEMUs have."""
    with target.open("wb") as out:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out)
        assert child.stdin is not None
        qmp("getfd", fd=child.stdin.fileno(), fdname="bare")
        child.stdin.close()
        saved(qmp, "fd:bare", capabilities)
        if child.wait():
            raise RuntimeError(f"{command[0]} ended with {child.returncode}")


def go_on(qmp: Qmp) -> None:
    """Let a machine that was saved run."""
    while qmp("query-status")["status"] != "running":
        # after `completed` there is a moment in which it is refused
        with contextlib.suppress(RuntimeError):
            qmp("cont")


def _load(qmp: Qmp, stream: Path, capabilities: frozenset[str]) -> None:
    _set(qmp, {*capabilities, "events"}, state=True)
    if "mapped-ram" in {one["capability"] for one in qmp("query-migrate-capabilities")}:
        qmp("migrate-incoming", uri=f"file:{stream}")
    else:
        with stream.open("rb") as file:
            qmp("getfd", fd=file.fileno(), fdname="bare")
        qmp("migrate-incoming", uri="fd:bare")
    _completed(qmp)


def _completed(qmp: Qmp) -> None:
    while (status := qmp.event("MIGRATION")["data"]["status"]) != "completed":
        if status == "failed":
            raise RuntimeError(f"migration: {qmp('query-migrate').get('error-desc')}")


def _refuse_failed(qmp: Qmp) -> None:
    for job in qmp("query-jobs"):
        if "error" in job:
            raise RuntimeError(f"{job['type']}: {job['error']}")


def _set(qmp: Qmp, names: set[str], *, state: bool) -> None:
    words = [{"capability": name, "state": state} for name in sorted(names)]
    qmp("migrate-set-capabilities", capabilities=words)


@contextlib.contextmanager
def _process(argv: list[str], folder: Path) -> Iterator[tuple[int, float]]:
    """A QEMU that is connected to before it is there: nobody tries again until it listens."""
    with socket.socket(socket.AF_UNIX) as listener, (folder / "stderr").open("wb") as log:
        listener.bind(str(folder / "qmp"))
        listener.listen(1)
        number = listener.fileno()
        argv += ["-chardev", f"socket,id=bare,fd={number},server=on,wait=off"]
        argv += ["-mon", "chardev=bare,mode=control"]
        begun = time.time()
        # a run that is killed takes its machines along
        argv = ["setpriv", "--pdeathsig=KILL", *argv]
        process = subprocess.Popen(argv, stdout=log, stderr=log, pass_fds=[number])
    try:
        yield process.pid, begun
    finally:
        process.kill()
        process.wait()


def warm(path: Path) -> None:
    """Have *path* on the disk, and its data, none of its holes, in the page cache."""
    synced(path)
    piece = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        fd, end, at = file.fileno(), path.stat().st_size, 0
        while at < end:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                return  # nothing but a hole is left
            until = os.lseek(fd, at, os.SEEK_HOLE)
            while at < until:
                at += os.preadv(fd, [piece], at)
