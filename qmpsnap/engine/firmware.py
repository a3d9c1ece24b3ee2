"""Firmware files of this host by digest: the only place that looks for those that a QEMU loads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from qmpsnap.errors import LocalFailed
from qmpsnap.hypervisor.machine.cmdline import CommandLine
from qmpsnap.store import files

_MOST = 32 << 20  # bytes that are read for all digests: EDK2's code is 4 MiB


class FirmwareFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that QEMU has loaded for the machine: BIOS, flash, or the ROM of a card.

    *name* is what QEMU calls it, *path* where it was found, None where it was not. *blake3* is
    None too for more than 32 MiB of firmware, which is not read.
    """

    name: str
    path: str | None
    size_bytes: int | None
    blake3: str | None


def examine(names: Iterable[str], places: Sequence[Path]) -> list[FirmwareFile]:
    """Each of *names* as it is now; *places* are looked through in order. Reads the files."""
    left, found = _MOST, []
    for name in names:
        path = find(name, places)
        size = _size(path) if path else None
        digest = None
        if path is not None and size is not None and size <= left:
            left -= size
            with suppress(LocalFailed):  # one that is not ours to read is known by its size
                # distributions keep the same file under several names, as links
                digest = files.digest_file(path.resolve(), side=LocalFailed)[1]
        where = str(path) if path else None
        found.append(FirmwareFile(name=name, path=where, size_bytes=size, blake3=digest))
    return found


def find(name: str, places: Sequence[Path]) -> Path | None:
    """Where QEMU finds *name*: as it stands from its working directory, then in its folders."""
    return next((path for place in places if _is_file(path := place / name)), None)


def places(line: CommandLine | None, cwd: Path, folders: Sequence[Path]) -> list[Path]:
    """Where a QEMU of *line* looks, in order; *folders* are the binary's own (`-L help`)."""
    own = [cwd / (option.value or "") for option in line.all("L")] if line else []
    return [cwd, *own, *folders]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # QEMU may enter that folder, and we may not
        return False


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
