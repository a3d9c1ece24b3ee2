"""Whether a file system keeps our names apart, and as they are: the only place that finds out.

Some take `Web` and `web` for one name, or write down another one than they were given, or none that
is as long as ours.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from qmpsnap.errors import StoreRefused
from qmpsnap.ids import is_vm_name
from qmpsnap.store.layout import GOING, PARTIAL, LocalRoot, StoreRoot

LONGEST = 64 + len(".0123456789abcdef") + len(PARTIAL) + len(GOING)
"""Bytes of the longest name that we give: a shared file's own, the token of a copy of it, not whole
yet, and a sweep has put it aside."""
_PROBE = ".qmpsnap-Probe-"
_NO_SUCH_NAME = {errno.ENAMETOOLONG, errno.EINVAL}  # EINVAL: of a name's letters, on FAT


def probe(folder: Path) -> None:
    """Make a file in *folder* with a name as long as ours get, see it there, and remove it.

    Raises StoreRefused when it cannot have that name; OSError when there can be no file at all.
    """
    name = f"{_PROBE}{token_hex(8)}".ljust(LONGEST, "x")
    try:
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as failed:
        if failed.errno not in _NO_SUCH_NAME:
            raise
        longest = os.statvfs(folder).f_namemax
        raise StoreRefused(
            f"the store {folder} takes no names of {LONGEST} bytes such as ours (its own limit: "
            f"{longest}; {failed.strerror})"
        ) from failed
    os.close(descriptor)
    try:
        if name not in {path.name for path in folder.iterdir()}:
            raise StoreRefused(
                f"the store {folder} writes down other names than it is given: "
                "nothing could be found again there"
            )
    finally:
        (folder / name).unlink(missing_ok=True)


def refuse_alias(root: StoreRoot | LocalRoot, vm: str) -> None:
    """Raises StoreRefused when the folder of *vm* is one that another VM has; OSError."""
    folder = root.vm(vm)
    if not os.path.lexists(folder):
        return
    there = {path.name for path in root.path.iterdir()}
    if vm in there or not os.path.lexists(folder):
        return
    other = next((one for one in there if is_vm_name(one) and _same(root.path / one, folder)), "?")
    raise StoreRefused(
        f"{root.path} takes the names {vm} and {other} for one, and the folder there is that of "
        f"the VM {other}",
        hint="call one of the two VMs by a name that differs in more than upper and lower case",
    )


def _same(one: Path, other: Path) -> bool:
    with suppress(FileNotFoundError):
        return one.samefile(other)
    return False
