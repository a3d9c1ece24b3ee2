"""The JSON objects that the command line prints, where the engine has no struct for them."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from qmpsnap.dialect import schema
from qmpsnap.engine.created import Created
from qmpsnap.engine.delete import Deleted
from qmpsnap.engine.execution import ExecutionState
from qmpsnap.engine.export import Exported
from qmpsnap.engine.extract import Extracted
from qmpsnap.engine.fates import Fate
from qmpsnap.engine.fitness import Fitness
from qmpsnap.engine.history import Record
from qmpsnap.engine.info import Info
from qmpsnap.engine.limiting import Limit
from qmpsnap.engine.protect import Protection
from qmpsnap.engine.signing import Signing
from qmpsnap.engine.verify import Verified
from qmpsnap.store.catalogue import Entry
from qmpsnap.store.keyfile import Public
from qmpsnap.store.keyring import Key
from qmpsnap.store.lease import Standing
from qmpsnap.store.manifest import Manifest, Storage
from qmpsnap.store.signature import Signed


class PlannedDisk(Struct, frozen=True, kw_only=True):
    disk: str
    label: str
    node: str
    frozen: str
    overlay: str
    level: str
    level_reason: str
    encrypted: bool
    parent: str | None
    bitmap: str | None


class PlannedWithout(Struct, frozen=True, kw_only=True):
    disk: str
    reason: str


class Command(Struct, frozen=True, kw_only=True):
    """A QMP command as it would be sent."""

    execute: str
    arguments: dict[str, Any]


class Planned(Struct, frozen=True, kw_only=True):
    """`create --dry-run`. *ram*: the modes in the order in which they would be tried."""

    id: str
    vm: str
    level: str
    disks: list[PlannedDisk]
    left_out: list[PlannedWithout]
    ram: list[str]
    ram_reason: str
    quiesce: str
    quiesce_reason: str
    max_pause_ms: float | None
    max_freeze_ms: float | None = None
    before: list[Command]
    at_the_instant: Command


class Shown(Struct, frozen=True, kw_only=True):
    """`show`: both halves' manifests, and where the halves lie. *revisions*: the refreshed ones.

    *signature*: who vouches for them. *lease*: the other host that the VM belongs to now, on the
    store; None if there is none, or the store did not tell in time.
    """

    id: str
    vm: str
    state: Literal["paired", "shipping"]
    local: str
    store: str
    storage: Storage
    manifest: Manifest
    revisions: list[Storage] = []
    signature: Signed | None = None
    lease: Standing | None = None


class Shipped(Struct, frozen=True, kw_only=True):
    """`ship`: one store half that arrived."""

    vm: str
    id: str
    bytes: int
    state: Literal["paired"] = "paired"


class Rotated(Struct, frozen=True, kw_only=True):
    """`keys rotate`: the key that *signs* now (None with --dry-run), the one that is *retired*."""

    signs: Key | None
    retired: Key | None


class RotatedEncryption(Struct, frozen=True, kw_only=True):
    """`keys rotate --encryption`: the key that *encrypts* now (None with --dry-run), the old one.

    That one still *decrypts*.
    """

    encrypts: Key | None
    decrypts: Key | None


class Settled(Struct, frozen=True, kw_only=True):
    """`recover`: one debt that is settled, and what was done for it."""

    vm: str
    id: str
    did: list[str]


class Thawed(Struct, frozen=True, kw_only=True):
    """`thaw`: how many file systems were frozen."""

    vm: str
    thawed: int


class Restored(Struct, frozen=True, kw_only=True):
    """`restore`: the machine that runs. *moved*: files and sockets, old path to new path.

    *groups*: the folders of the control groups that were made for it; they go when it ends.
    *ram*: `mapped` from page images, brought on `demand`, or loaded as a `stream`; None after a
    cold boot. *arriving*: the file that tells how much of it is there, with --detach; it goes when
    all is. *clone*: its number, with --clones; *clock* is `set` to the host's time then, or says
    why it was not, and *macs* are the addresses that were changed in the running guest, by
    interface. *signature*: `trusted`, or what was accepted instead.
    """

    id: str
    vm: str
    pid: int
    qmp: str
    agent: str | None
    cold: bool
    to: str
    moved: dict[str, str]
    notices: list[str]
    limits: list[Limit] = []
    groups: list[str] = []
    ram: str | None = None
    arriving: str | None = None
    clone: int | None = None
    clock: str | None = None
    macs: dict[str, str] = {}
    signature: str | None = None


class Prepared(Struct, frozen=True, kw_only=True):
    """`restore --no-start`: images are built, *argv* would start the machine.

    *companions* are to be started before it, and end with it. *clone*: its number, with --clones.
    """

    id: str
    vm: str
    cold: bool
    to: str
    qmp: str
    argv: list[str]
    moved: dict[str, str]
    notices: list[str]
    limits: list[Limit] = []
    companions: list[list[str]] = []
    clone: int | None = None


class Started(Struct, frozen=True, kw_only=True):
    """`run --detach`."""

    vm: str
    pid: int
    qmp: str
    agent: str | None
    log: str


class Trouble(Struct, frozen=True, kw_only=True):
    code: str
    message: str
    hint: str


class Failure(Struct, frozen=True, kw_only=True):
    """The last line of stderr under --json when the exit code is not 0."""

    error: Trouble


KINDS: dict[str, type[Struct]] = {
    "create": Created,
    "create-dry-run": Planned,
    "list": Entry,
    "show": Shown,
    "show-vmstate": ExecutionState,
    "usage": Record,
    "info": Info,
    "verify": Verified,
    "restore": Restored,
    "restore-check": Fitness,
    "restore-no-start": Prepared,
    "export": Exported,
    "export-to": Extracted,
    "ship": Shipped,
    "lease": Standing,
    "delete": Deleted,
    "prune": Fate,
    "protect": Protection,
    "recover": Settled,
    "thaw": Thawed,
    "run": Started,
    "keys-show": Key,
    "keys-export": Public,
    "keys-export-encryption": Key,
    "keys-import": Key,
    "keys-rotate": Rotated,
    "keys-rotate-encryption": RotatedEncryption,
    "keys-forget": Key,
    "keys-sign": Signing,
    "error": Failure,
}


def schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema of each object, by the word that its file is named for."""
    return {f"cli-{word}": schema(kind) for word, kind in KINDS.items()}
