"""Packs that were found damaged: the only place that remembers them, so that nobody relies on them.

`LOCAL/VM/hurt.json` is what `verify` has seen of the packs on the store. It is told whatever it is
that a new snapshot would leave out of what it knows, and no more: a note that is lost costs nothing
but the damage that one look has to find again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

from qmpsnap.dialect import schema
from qmpsnap.errors import UNREADABLE, LocalFailed
from qmpsnap.spelling import encode
from qmpsnap.store.files import make_folders, read_small, replace, told
from qmpsnap.store.layout import LocalRoot


class Hurt(msgspec.Struct, frozen=True, kw_only=True):
    """`hurt.json`: the BLAKE3 of packs that were not what they should be when they were read."""

    format: Literal["qmpsnap-hurt"] = "qmpsnap-hurt"
    version: Literal[1] = 1
    packs: list[str]


def packs(root: LocalRoot, vm: str) -> set[str]:
    """Those that were damaged when they were last read, as far as anybody remembers."""
    try:
        content = read_small(root.hurt(vm), side=LocalFailed)
        return set(msgspec.json.decode(content, type=Hurt).packs)
    except (LocalFailed, *UNREADABLE):
        return set()


def seen(root: LocalRoot, vm: str, hurt: Collection[str], whole: Collection[str]) -> None:
    """These were read just now. Raises LocalFailed."""
    before = packs(root, vm)
    now = (before | set(hurt)) - set(whole)
    if now != before:
        make_folders(root.vm(vm), root.path, side=LocalFailed)
        replace(root.hurt(vm), encode(Hurt(packs=sorted(now))), side=LocalFailed)


def forget(root: LocalRoot, vm: str) -> None:
    """No snapshot of *vm* is left. Raises LocalFailed."""
    with told(root.hurt(vm), LocalFailed):
        root.hurt(vm).unlink(missing_ok=True)


def schemas() -> dict[str, dict[str, object]]:
    """The JSON Schema of `hurt.json`, by the word that it says of itself."""
    return {"qmpsnap-hurt": schema(Hurt)}
