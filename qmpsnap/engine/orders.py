"""What the engine and the process that brings RAM say to each other, a JSON object a line."""

from __future__ import annotations

import msgspec

from qmpsnap.store import wire
from qmpsnap.store.signature import Trust

GO = b"go\n"
"""The guest is let run."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to bring: the *note* of an arrival, the two roots, whom to *trust*, the folder of the
    *keys*, where that is not on the local root, and the descriptor
    of our end of the migration; None: QEMU has lost its source, and is to take us for a new one."""

    note: str
    local: str
    store: str
    within: float
    command: list[str]
    wire: int | None
    trust: Trust | None
    keys: str | None = None


class Said(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the feeder's. *step*: `ready` (QEMU may read), `loaded` (the guest may run),
    `taken` (QEMU takes pages again), or `done`."""

    step: str = ""
    done: int = 0
    total: int = 0
    warning: str = ""
    failed: wire.Trouble | None = None
