"""RAM that is still on its way into a guest: the only place that writes down where it comes from.

`LOCAL/VM/arrivals/TOKEN.json` is there from before QEMU takes the first byte until it has the last
one, and its lock is held by the process that brings it (`feeder`). With it another one can go on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from qmpsnap.engine.half import Pair
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.roots import Roots, moment
from qmpsnap.errors import UNREADABLE, LocalFailed, VmBusy
from qmpsnap.host import lock
from qmpsnap.host import process as host_process
from qmpsnap.host.process import ProcessFacts
from qmpsnap.store import files, local
from qmpsnap.store.head import readable, version_of
from qmpsnap.store.layout import MANIFEST, LocalRoot
from qmpsnap.store.manifest import Manifest, decode
from qmpsnap.store.signature import Reason
from qmpsnap.units import in_bytes

_FOLDER = "arrivals"
_FORMAT, _NEWEST = "qmpsnap-arrival", 1
STATUS = "arriving.json"
"""In the folder of the machine: how much of its RAM is there."""
STREAM = "stream"


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """The RAM of the snapshot *id* comes into the *process*, whose machine is in *folder*.

    *images*: the folder of the page images that are being filled, of the small stream, and of the
    manifest of the store half that *seal* is the digest of. *spare*: the descriptor in the process
    of our end of its spare monitor. *insecure*: the reasons that were accepted for it not being
    signed with a key that is trusted: they hold for all of its RAM.
    """

    format: Literal["qmpsnap-arrival"] = "qmpsnap-arrival"
    version: Literal[1] = 1
    id: str
    vm: str
    folder: str
    images: str
    qmp: str
    process: ProcessFacts
    spare: int | None
    seal: str
    spooled: bool
    insecure: list[Reason] = []


class Arriving(msgspec.Struct, frozen=True, kw_only=True):
    """`arriving.json`: bytes of RAM that are there, and in all; *trouble*: what it waits for."""

    format: Literal["qmpsnap-arriving"] = "qmpsnap-arriving"
    version: Literal[1] = 1
    id: str
    vm: str
    done_bytes: int
    total_bytes: int
    trouble: str
    at: str


def place(root: LocalRoot, vm: str, folder: Path) -> Path:
    """Where it is written down that RAM comes into the machine in *folder*."""
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return root.vm(vm) / _FOLDER / f"{name}.json"


def taken(path: Path, what: str) -> int:
    """The lock of whoever brings what *path* tells of, as `lock.taken` gives it."""
    return lock.taken(path.with_suffix(".lock"), what)


def note(path: Path, pair: Pair, arrival: Arrival) -> None:
    """Write it down, before QEMU is given anything. Raises LocalFailed."""
    manifest = msgspec.json.encode(pair.manifest)
    files.replace(Path(arrival.images) / MANIFEST, manifest, side=LocalFailed)
    files.replace(path, msgspec.json.encode(arrival) + b"\n", side=LocalFailed)


def read(path: Path) -> Arrival:
    """Raises LocalFailed (it is over), ManifestError."""
    content = files.read_small(path, side=LocalFailed)
    version_of(content, _FORMAT, _NEWEST, path)
    with readable(content, path):
        return msgspec.json.decode(content, type=Arrival)


def pair_of(roots: Roots, arrival: Arrival) -> Pair:
    """The pair whose RAM comes. Raises LocalFailed, ManifestError."""
    path = Path(arrival.images) / MANIFEST
    manifest = decode(files.read_small(path, side=LocalFailed), Manifest, path)
    storage = local.read_storage(roots.local, arrival.vm, arrival.id)
    return Pair(
        roots, arrival.vm, arrival.id, storage, manifest, arrival.seal, spooled=arrival.spooled
    )


def owed(root: LocalRoot, vm: str) -> list[Path]:
    """The notes of RAM that has not come yet, whether somebody brings it or not."""
    return sorted((root.vm(vm) / _FOLDER).glob("*.json"))


def forsaken(root: LocalRoot, vm: str) -> bool:
    """Whether RAM has not come yet, and nobody brings it."""
    return any(not lock.is_taken(path.with_suffix(".lock")) for path in owed(root, vm))


def over(path: Path, arrival: Arrival) -> None:
    """Nothing more comes: all of it is there, or nobody waits for it. The lock's holder calls."""
    shutil.rmtree(arrival.images, ignore_errors=True)
    for gone in (Path(arrival.folder) / STATUS, path):
        with suppress(OSError):
            gone.unlink()
    unlocked(path)


def unlocked(path: Path) -> None:
    """The lock of a note that is no more is not needed either; its holder calls."""
    for gone in (path.with_suffix(".log"), path.with_suffix(".lock")):
        with suppress(OSError):
            gone.unlink()


def tell(arrival: Arrival, done: int, total: int, trouble: str) -> None:
    """Write `arriving.json`; it is for people, and no reason to fail."""
    now = Arriving(
        id=arrival.id, vm=arrival.vm, done_bytes=done, total_bytes=total, trouble=trouble,
        at=moment(),
    )  # fmt: skip
    path = Path(arrival.folder) / STATUS
    part = path.with_name(f".{path.name}.part")
    with suppress(OSError):
        part.write_bytes(msgspec.json.format(msgspec.json.encode(now), indent=2) + b"\n")
        part.replace(path)


def refuse(roots: Roots, machine: Machine) -> None:
    """Raises VmBusy when the RAM of *machine* is still coming."""
    for path in owed(roots.local, machine.name):
        with suppress(LocalFailed):
            one = read(path)
            if host_process.still_runs(one.process) and _same(Path(one.qmp), machine.socket):
                raise VmBusy(
                    f"the RAM of {machine.name} is still coming{_in_words(one)}",
                    hint=f"wait until {Path(one.folder) / STATUS} is gone",
                )


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)  # noqa: PTH121 - Path.samefile raises as well
    except OSError:
        return False


def _in_words(one: Arrival) -> str:
    path = Path(one.folder) / STATUS
    try:
        now = msgspec.json.decode(path.read_bytes(), type=Arriving)
    except (OSError, *UNREADABLE):
        return ""
    trouble = f"; {now.trouble}" if now.trouble else ""
    return f": {in_bytes(now.done_bytes)} of {in_bytes(now.total_bytes)} are there{trouble}"
