"""Packs that were moved: the only place that knows the notes which lead to where they are now.

`shared/BLAKE3.moved` says which pack has what was still needed of the pack BLAKE3. It is written
before that one goes: while both are there, the note says nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from qmpsnap.dialect import schema
from qmpsnap.errors import DamagedData, HalfMissing
from qmpsnap.spelling import encode
from qmpsnap.store.files import Side, publish, read_small
from qmpsnap.store.head import readable, version_of
from qmpsnap.store.layout import aside
from qmpsnap.store.manifest import Digest
from qmpsnap.store.ramindex import Named

_SUFFIX = ".moved"


class Moved(Struct, frozen=True, kw_only=True):
    """`shared/BLAKE3.moved`: the chunks of the pack *old* are in the pack *new* now."""

    format: Literal["qmpsnap-moved"] = "qmpsnap-moved"
    version: Annotated[int, Meta(ge=1, le=1)] = 1
    old: Digest
    new: Named


def note(pack: Path) -> Path:
    """Where the note of the pack *pack* is, if there is one."""
    return pack.with_name(pack.name + _SUFFIX)


def there(path: Path) -> Path | None:
    """The shared file *path*, or what a sweep that died has left of it; None if neither is."""
    return next((one for one in (path, aside(path)) if os.path.lexists(one)), None)


def read(pack: Path, *, side: Side) -> Moved | None:
    """The note of the pack *pack*, if there is one. Raises *side*, ManifestError, DamagedData."""
    path = there(note(pack))
    if path is None:
        return None
    content = read_small(path, side=side)
    version_of(content, "qmpsnap-moved", 1, path)
    with readable(content, path):
        found = msgspec.json.decode(content, type=Moved)
    if found.old != pack.name:
        raise DamagedData(f"{path}: is the note of {found.old}")
    return found


def write(pack: Path, new: Named, *, side: Side) -> None:
    """Note that what is needed of *pack* is in *new* as well. Raises *side*, also for another."""
    publish(note(pack), encode(Moved(old=pack.name, new=new)), side=side)


def trail(pack: Path, *, side: Side) -> list[Named]:
    """The packs that stand for *pack* one after the other, the last of them to be used now.

    Empty when it was not moved. Raises *side*, DamagedData.
    """
    found: list[Named] = []
    at = pack
    while (moved := read(at, side=side)) is not None:
        at = pack.with_name(moved.new.blake3)
        if moved.new in found:
            raise DamagedData(f"{note(pack)}: leads to itself")
        found.append(moved.new)
        if there(at) is not None:
            break
    return found


def lies(pack: Path, *, side: Side) -> tuple[Path, Named | None]:
    """The file that has the chunks of *pack*: itself, or (then named) the one it was moved into.

    Raises HalfMissing when there is none, *side*, DamagedData.
    """
    if (path := there(pack)) is not None:
        return path, None
    follow = trail(pack, side=side)
    if follow and (path := there(pack.with_name(follow[-1].blake3))) is not None:
        return path, follow[-1]
    raise HalfMissing(f"{pack}: is missing")


def schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema of the note, by the word that its file is named for."""
    return {"qmpsnap-moved": schema(Moved)}
