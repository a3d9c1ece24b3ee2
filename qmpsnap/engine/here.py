"""This host, as a restore would find it: the only place that gathers what is compared."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qmpsnap.engine import firmware
from qmpsnap.engine.configuration import Configuration
from qmpsnap.engine.firmware import FirmwareFile
from qmpsnap.engine.restoration import Ready
from qmpsnap.engine.roots import host_id
from qmpsnap.errors import Blocked
from qmpsnap.host import filesystem, headroom, hugepages
from qmpsnap.host.headroom import Headroom
from qmpsnap.hypervisor.machine import binary, features
from qmpsnap.hypervisor.machine.binary import Binary
from qmpsnap.hypervisor.machine.options import accelerators
from qmpsnap.store.manifest import Image

NODES = ("/dev/kvm", "/dev/net/tun", "/dev/vhost-net", "/dev/vhost-vsock")


@dataclass(frozen=True, slots=True)
class Here:
    """Facts of this host; sizes in bytes.

    *troubles*: why a device node, or a file that the machine opens, cannot be opened; what is not
    in it, can. *tap_trouble*: why we cannot make a tap. *copied_bytes* is what the images take
    that a standalone restore copies, *decrypted_bytes* what any restore decrypts. *binary* is None
    for a QEMU that does not run: *binary_trouble*. *accelerator* is the one that it would run on,
    *cpu_features* what it can give to a guest then, None if not known. *firmware* is what it would
    load, by the captured names; *huge_free_bytes* what is free of huge pages, by their size.
    """

    id: str
    binary: Binary | None
    binary_trouble: str
    headroom: Headroom
    free_bytes: int
    troubles: Mapping[str, str]
    tap_trouble: str
    interfaces: frozenset[str]
    copied_bytes: int
    decrypted_bytes: int = 0
    accelerator: str = "tcg"
    cpu_features: frozenset[str] | None = None
    firmware: Mapping[str, FirmwareFile] = field(default_factory=dict)
    huge_free_bytes: Mapping[int, int] = field(default_factory=dict)


async def look(
    ready: Ready,
    machine: Configuration,
    chains: Sequence[Sequence[Image]],
    decrypted_bytes: int = 0,
) -> Here:
    """Now, for the *machine* that *ready* starts on the images *chains*; nothing is changed.

    On those, and on disks of *decrypted_bytes* that are made for it.

    Raises LocalFailed when this host does not tell.
    """
    known, trouble, folders, given = None, "", list[Path](), None
    path = Path(ready.relocated.cmdline.binary)
    looking = asyncio.create_task(asyncio.to_thread(_looked, ready, chains))
    try:
        known, folders, given = await asyncio.gather(
            binary.ask(path), _folders(path, ready, machine), _features(path, ready, machine)
        )
    except Blocked as refused:
        trouble = str(refused)
    finally:
        # the thread is short: it ends before whoever waits for us goes on
        seen = await looking
    return Here(
        id=host_id(),
        binary=known,
        binary_trouble=trouble,
        headroom=seen.headroom,
        free_bytes=seen.free_bytes,
        troubles=seen.troubles | _roms(ready, folders),
        tap_trouble=seen.tap_trouble,
        interfaces=seen.interfaces,
        copied_bytes=seen.copied_bytes,
        decrypted_bytes=decrypted_bytes,
        accelerator=_accelerator(ready),
        cpu_features=given,
        firmware=await asyncio.to_thread(_firmware, ready, machine, folders),
        huge_free_bytes=seen.huge_free_bytes,
    )


async def _folders(path: Path, ready: Ready, machine: Configuration) -> list[Path]:
    named = ready.relocated.roms or (machine.details and machine.details.firmware)
    return await binary.folders(path) if named else []


async def _features(path: Path, ready: Ready, machine: Configuration) -> frozenset[str] | None:
    cpu = machine.details.cpu if machine.details else None
    return await features.available(path, _accelerator(ready), cpu.name) if cpu else None


def _accelerator(ready: Ready) -> str:
    """The first of those asked for that can be used."""
    asked = accelerators(ready.relocated.cmdline)
    usable = [one for one in asked if one != "kvm" or not headroom.node_trouble(Path("/dev/kvm"))]
    return next(iter(usable), "tcg")


def _firmware(
    ready: Ready, machine: Configuration, folders: Sequence[Path]
) -> dict[str, FirmwareFile]:
    if machine.details is None or not machine.details.firmware:
        return {}
    cwd = Path(machine.cwd or "/")
    where = firmware.places(ready.relocated.cmdline, cwd, folders)
    found = firmware.examine([one.name for one in machine.details.firmware], where)
    return {one.name: one for one in found}


@dataclass(frozen=True, slots=True)
class _Seen:
    headroom: Headroom
    free_bytes: int
    troubles: dict[str, str]
    tap_trouble: str
    interfaces: frozenset[str]
    copied_bytes: int
    huge_free_bytes: dict[int, int]


def _looked(ready: Ready, chains: Sequence[Sequence[Image]]) -> _Seen:
    nodes = {node: headroom.node_trouble(Path(node)) for node in NODES}
    files = {path: _trouble(Path(path)) for path in ready.relocated.reads}
    return _Seen(
        headroom=headroom.look(),
        free_bytes=filesystem.examine(ready.wish.to).free_bytes,
        troubles={path: why for path, why in (nodes | files).items() if why},
        tap_trouble=headroom.tap_trouble(),
        interfaces=headroom.interfaces(),
        copied_bytes=sum(map(_copied, chains)),
        huge_free_bytes=hugepages.free_bytes(),
    )


def _copied(chain: Sequence[Image]) -> int:
    """The most that a copy of the disk *chain* can take."""
    taken = 0
    for one in chain:
        try:
            taken += Path(one.path).stat().st_blocks * 512
        except OSError:
            taken += one.file_bytes  # that it is missing is told elsewhere
    return min(taken, chain[0].virtual_size_bytes) if chain else 0


def _trouble(path: Path) -> str:
    if not os.path.lexists(path):
        return "is missing"
    if not os.path.exists(path):  # noqa: PTH110  # Path.exists raises where we may not look
        return "is a link to nothing, or to where we may not look"
    wanted = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
    return "" if os.access(path, wanted, effective_ids=True) else "cannot be read"


def _roms(ready: Ready, folders: Iterable[Path]) -> dict[str, str]:
    own = [Path(option.value or "") for option in ready.relocated.cmdline.all("L")]
    places = [*own, *folders]
    names = ready.relocated.roms
    there = {name for name in names for one in places if os.path.exists(one / name)}  # noqa: PTH110
    missing = set(ready.relocated.roms) - there
    return dict.fromkeys(missing, "is in none of QEMU's folders")
