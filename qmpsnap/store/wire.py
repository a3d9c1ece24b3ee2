"""What the engine and the store's worker say to each other: the only place for its words."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from qmpsnap.errors import (
    DamagedData,
    DigestMismatch,
    Foreign,
    HalfMissing,
    KeyMissing,
    KeyRefused,
    LeaseHeld,
    LeaseLost,
    LocalFailed,
    ManifestError,
    NotAuthentic,
    PacksMissing,
    SignatureWrong,
    SnapError,
    StoreAway,
    StoreError,
    StoreRefused,
    Unsigned,
    UsageError,
)
from qmpsnap.store.lease import Claimant
from qmpsnap.store.ramindex import Named
from qmpsnap.store.signature import Signed, Trust


class Request(Struct, frozen=True, kw_only=True, tag_field="verb", tag=str.lower):
    """One request; *root* is the store root, and all of the store that is touched is below it.

    *trust*: the keys that a manifest has to be signed with; None: it is not asked for. *keys*: the
    folder of the keys that files are encrypted with, which are read when one is needed.
    """

    root: str
    trust: Trust | None = None
    keys: str | None = None


class Examine(Request, frozen=True, kw_only=True):
    pass


class Catalogue(Request, frozen=True, kw_only=True):
    vm: str | None


class Half(Request, frozen=True, kw_only=True):
    """A request on one store half."""

    vm: str
    id: str


class Ship(Half, frozen=True, kw_only=True):
    """*device*: the store root must still be on this one (it was judged to be a store).

    *shared*: the folder that has the files which are shared with other snapshots. *instead*: by
    the digests of lost packs, those in that folder that have what is needed of them. *anew*: the
    digests of those in it whose copies on the store are damaged. *lease*: who has to have the VM.
    """

    spool: str
    device: int | None
    shared: str | None = None
    instead: dict[str, Named] = {}
    anew: list[str] = []
    lease: Claimant | None = None


class Sealed(Half, frozen=True, kw_only=True):
    """A request on a sealed half; *seal* is the BLAKE3 its manifest must have, when known."""

    seal: str | None


class Verify(Sealed, frozen=True, kw_only=True):
    pass


class Glance(Sealed, frozen=True, kw_only=True):
    """*texts*: the names of small files that are wanted. Those in *whole* are read and compared;
    of the others the size is enough."""

    texts: list[str]
    whole: list[str] = []


class Read(Sealed, frozen=True, kw_only=True):
    name: str


class Load(Sealed, frozen=True, kw_only=True):
    name: str
    fd: int


class Fetch(Sealed, frozen=True, kw_only=True):
    name: str
    to: str
    unpack: bool


class Remove(Half, frozen=True, kw_only=True):
    """*sweep*: what it shared with others is looked at too, but for what is *waiting*.

    *lease*: who has to have the VM.
    """

    sweep: bool = True
    waiting: list[str] = []
    lease: Claimant | None = None


class Sign(Sealed, frozen=True, kw_only=True):
    """*signature* is to be put beside the manifest. *lease*: as for Remove."""

    signature: str
    lease: Claimant | None = None


class Sweep(Request, frozen=True, kw_only=True):
    """What snapshots of *vm* shared, and none needs any more, is to go.

    *waiting*: the digests of what spools need that are still to be shipped. *lease*: as for Remove.
    """

    vm: str
    waiting: list[str] = []
    lease: Claimant | None = None


class Own(Request, frozen=True, kw_only=True):
    """Whose *vm* is: a look, or its lease is to be taken, seized from whoever has it, or left.

    `rival` is a look that tells of others only.
    """

    vm: str
    lease: Claimant
    act: Literal["look", "rival", "take", "seize", "leave"]


class Lost(Request, frozen=True, kw_only=True):
    """Which *packs* of *vm* are not on the store, nor moved, or are not of their size."""

    vm: str
    packs: list[Named]


class Fill(Sealed, frozen=True, kw_only=True):
    """RAM is to be made again, in the folder *to*; *near* are folders that may have parts of it.

    *spans*: of which parts only, in images that are there (block, start, length).

    *spool*, *shared*: the half is there yet, and packs of it in the other folder.
    """

    to: str
    near: list[str]
    spans: list[tuple[int, int, int]] | None = None
    spool: str | None = None
    shared: str | None = None


class Packs(Half, frozen=True, kw_only=True):
    """Whether the RAM of a half that is in *spool* yet is whole: *shared* has packs, and the store.

    *whole*: each byte is read.
    """

    spool: str
    shared: str
    whole: bool


AnyRequest = (
    Examine
    | Catalogue
    | Ship
    | Verify
    | Glance
    | Read
    | Load
    | Fetch
    | Remove
    | Sign
    | Sweep
    | Fill
    | Packs
    | Lost
    | Own
)


class Done(Struct, frozen=True, kw_only=True):
    """Bytes done, bytes in all, and what is being done."""

    done: int
    total: int
    what: str


class Trouble(Struct, frozen=True, kw_only=True):
    """A SnapError on its way: its code, message and hint."""

    code: str
    message: str
    hint: str
    packs: list[str] = []


class Line(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the worker: progress any number of times, then a result or an error.

    A *result* without a byte in it is none; the result `null` has four.
    """

    progress: Done | None = None
    result: msgspec.Raw = msgspec.Raw()
    error: Trouble | None = None


class Shipped(Struct, frozen=True, kw_only=True):
    """A store half that is sealed; *bytes* is what its files and its manifest take."""

    manifest_blake3: str
    bytes: int


class Found(Struct, frozen=True, kw_only=True):
    """A snapshot's folder on the store, its manifest unread; *problem*: it could not be had.

    *signed* is None where it was not asked for, or there is no manifest.
    """

    vm: str
    id: str
    manifest: str | None
    manifest_blake3: str | None
    problem: str | None
    signed: Signed | None = None


class Listing(Struct, frozen=True, kw_only=True):
    """What is on a store; *foreign* are the names (VM/name) that are not ours."""

    found: list[Found]
    foreign: list[str]


EXTRA = "not in the manifest"
"""What is wrong with a file that nobody has asked for."""


class Problem(Struct, frozen=True, kw_only=True):
    """What is wrong with one *file* of a store half."""

    file: str
    what: str


class Glanced(Struct, frozen=True, kw_only=True):
    """What was found at a glance, by the files' names: the texts, and what is wrong with which."""

    texts: dict[str, str]
    troubles: dict[str, Trouble]


class Told(Exception):
    """The worker's answer is an *error*: it has done what it could, and is ready for more."""

    def __init__(self, error: SnapError) -> None:
        super().__init__(str(error))
        self.error = error


_KINDS = {
    kind("").code: kind
    for kind in (
        DamagedData, DigestMismatch, Foreign, HalfMissing, KeyMissing, KeyRefused, LeaseHeld,
        LeaseLost, LocalFailed, ManifestError, NotAuthentic, SignatureWrong, StoreAway, StoreError,
        StoreRefused, Unsigned, UsageError,
    )
}  # fmt: skip


def trouble(failed: SnapError) -> Trouble:
    """*failed*, to be sent."""
    packs = list(failed.packs) if isinstance(failed, PacksMissing) else []
    return Trouble(code=failed.code, message=str(failed), hint=failed.hint, packs=packs)


def error(sent: Trouble) -> SnapError:
    """The error that was sent; one of an unknown kind is a StoreError."""
    if sent.code == PacksMissing("").code:
        return PacksMissing(sent.message, hint=sent.hint, packs=tuple(sent.packs))
    return _KINDS.get(sent.code, StoreError)(sent.message, hint=sent.hint)
