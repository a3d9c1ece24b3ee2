"""What the caller of `create` may ask for, before anything is known of the VM."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qmpsnap.hypervisor.guest.quiesce import MAX_FREEZE


class Level(StrEnum):
    AUTO = "auto"
    OVERLAY = "overlay"
    FULL = "full"
    INC = "inc"
    DIFF = "diff"


class RamChoice(StrEnum):
    AUTO = "auto"
    BACKGROUND = "background"
    LIVE = "live"
    PAUSED = "paused"
    NONE = "none"


class Quiesce(StrEnum):
    AUTO = "auto"
    AGENT = "agent"
    NONE = "none"


class Encrypt(StrEnum):
    """What of a snapshot is encrypted: nothing, the store half, or copies of disks, too."""

    NONE = "none"
    STORE = "store"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Copying:
    """How disks are copied: *compress* the images; *limit* in bytes a second, None for none."""

    compress: bool = False
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Wishes:
    """One snapshot's options, as on the command line.

    *max_pause* in seconds: None is 0.2 for every RAM choice but `paused`, which has no bound
    then; *max_freeze*, too: for so long the agent may keep the guest frozen. *pause* is what `live`
    aims at, *budget* the seconds that its passes after the first get. *include* empty is every
    disk; disks go by device id, drive id or node name. *ram_from* are other VMs of the store: what
    their newest snapshots have of its RAM is not stored again. *encrypt*: what is encrypted, with
    the key of this host that is made if there is none.
    """

    level: Level = Level.AUTO
    ram: RamChoice = RamChoice.AUTO
    quiesce: Quiesce = Quiesce.AUTO
    max_pause: float | None = None
    max_freeze: float = MAX_FREEZE
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    note: str = ""
    rebind: bool = False
    pause: float = 0.02
    budget: float = 10.0
    copying: Copying = Copying()
    ram_from: tuple[str, ...] = ()
    encrypt: Encrypt = Encrypt.NONE
