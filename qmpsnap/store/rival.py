"""How long this host has seen another one's lease unchanged: the only place that remembers it.

`LOCAL/VM/rival.json`: the clock of a store may be put back, and leases last for hours then.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from qmpsnap.dialect import schema
from qmpsnap.errors import UNREADABLE, LocalFailed
from qmpsnap.spelling import encode
from qmpsnap.store.files import read_small, replace

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Rival(msgspec.Struct, frozen=True, kw_only=True):
    """`rival.json`: what a lease was, and when it was first seen so: *seen_s* after the *boot*."""

    format: Literal["qmpsnap-rival"] = "qmpsnap-rival"
    version: Literal[1] = 1
    lease: str
    boot: str
    seen_s: float


def unchanged_for(path: Path, lease: str) -> float:
    """For how many seconds *lease* is known here to be as it is; from now on, if it was not known.

    0 where the local root takes no note.
    """
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    try:
        boot = _BOOT.read_text().strip()
    except OSError:
        return 0.0
    with suppress(LocalFailed, *UNREADABLE):
        known = msgspec.json.decode(read_small(path, side=LocalFailed), type=Rival)
        if (known.lease, known.boot) == (lease, boot):
            return now - known.seen_s
    with suppress(LocalFailed, OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace(path, encode(Rival(lease=lease, boot=boot, seen_s=now)), side=LocalFailed)
    return 0.0


def forget(path: Path) -> None:
    """There is no rival."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def schemas() -> dict[str, dict[str, object]]:
    """The JSON Schema of `rival.json`, by the word that it says of itself."""
    return {"qmpsnap-rival": schema(Rival)}
