"""Page images in another folder than their index: the only place that makes and ends such folders.

`LOCAL/VM/ram/ID/images` leads to a new folder within one that somebody chose, and `of` leads back
from there. What lies there may be gone at any time, as memory is when the host starts anew.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qmpsnap.errors import LocalFailed
from qmpsnap.store.files import sync_folder, told
from qmpsnap.store.filling import ELSEWHERE, hollow, image
from qmpsnap.store.layout import GOING

_BACK = "of"


def beside(folder: Path, sizes: Sequence[int]) -> list[Path]:
    """New page images of *sizes*, in bytes, in *folder* itself. Raises LocalFailed."""
    paths = [image(folder, number) for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        hollow(path, size)
    return paths


def within(place: Path, folder: Path, sizes: Sequence[int], *, whole: bool) -> list[Path]:
    """New page images of *sizes*, in bytes, in a new folder in *place*, to which *folder* leads.

    *whole*: see `allocated`. *place* is made if need be (0700), not what is above it; one that
    others may write to is refused. Raises LocalFailed; nothing is left then.
    """
    name = f"{folder.parent.parent.name}-{folder.name}-{secrets.token_hex(4)}"
    new = place / name
    with told(place, LocalFailed):
        _refuse_shared(place)
        # the link first: whoever ends *folder* after a crash finds what it led to
        (folder / ELSEWHERE).symlink_to(new)
        try:
            sync_folder(folder)
            new.mkdir(0o700)
            (new / _BACK).symlink_to(folder)
            paths = beside(new, sizes)
            if whole:
                for path in paths:
                    allocated(path)
            sync_folder(new)
            sync_folder(place)
        except BaseException:
            ended(folder)
            raise
    return paths


def allocated(path: Path) -> None:
    """Every page of *path*, on a file system in memory, is there from now on.

    A hole there takes a page when it is read, too; a process that has it mapped, and finds none, is
    killed (SIGBUS). Raises LocalFailed.
    """
    with told(path, LocalFailed):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if size := os.fstat(descriptor).st_size:
                os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)


def lacking(path: Path) -> int:
    """Bytes of *path* that are holes. Raises OSError."""
    status = path.stat()
    return max(0, status.st_size - status.st_blocks * 512)


def ended(folder: Path) -> None:
    """The images that *folder* leads to are no more, nor the link. Raises OSError."""
    link = folder / ELSEWHERE
    try:
        there = link.readlink()
    except FileNotFoundError:
        return
    if (there / _BACK).is_symlink():
        _remove(there)
    elif there.is_dir():
        with suppress(OSError):  # a run that was cut off has just made it
            there.rmdir()
    link.unlink()


def sweep(place: Path) -> None:
    """What nothing leads to any more goes: its local root was removed, or a run was cut off.

    Images of other local roots stay, as long as these are there. Raises OSError.
    """
    for folder in place.iterdir():
        with suppress(OSError):
            back = (folder / _BACK).readlink() / ELSEWHERE
            try:
                wanted = back.readlink() == folder
            except FileNotFoundError:
                wanted = False
            if not wanted:
                _remove(folder)


def _remove(folder: Path) -> None:
    # gone in one step: a QEMU before 8.2 makes an empty file where it finds a folder and no image
    aside = folder
    if folder.suffix != GOING:
        aside = folder.with_name(folder.name + GOING)
        with suppress(FileNotFoundError):  # another engine sweeps, too
            folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _refuse_shared(place: Path) -> None:
    with suppress(FileExistsError):
        place.mkdir(0o700)
    status = place.lstat()
    alone = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not (stat.S_ISDIR(status.st_mode) and alone):
        raise LocalFailed(f"{place}: has to be a folder that nobody else may write to")
