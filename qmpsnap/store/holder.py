"""Who this host is to others that share its store: the only place that makes its name up."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Literal

import msgspec

from qmpsnap.dialect import schema
from qmpsnap.errors import LocalFailed
from qmpsnap.spelling import encode
from qmpsnap.store.files import digest_bytes, partial, read_small, told, write_all
from qmpsnap.store.head import readable, version_of
from qmpsnap.store.layout import LocalRoot


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """`host.json` of a local root: an ID that was made up when it was first asked for."""

    format: Literal["qmpsnap-host"] = "qmpsnap-host"
    version: Literal[1] = 1
    id: str


def holder(root: LocalRoot, machine: str) -> str:
    """This local root, on the host that *machine* stands for: opaque, and another one on each.

    A root that was copied to a second host is not the first one's. Raises LocalFailed,
    ManifestError.
    """
    path = root.host
    with told(path, LocalFailed):
        root.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.path.lexists(path):
            _make(path)
    return _read(path, machine)


def known(root: LocalRoot, machine: str) -> str | None:
    """As `holder`, and nothing is made: None for a root that has never asked for a lease."""
    with told(root.host, LocalFailed):
        there = os.path.lexists(root.host)
    return _read(root.host, machine) if there else None


def _read(path: Path, machine: str) -> str:
    content = read_small(path, side=LocalFailed)
    version_of(content, "qmpsnap-host", 1, path)
    with readable(content, path):
        own = msgspec.json.decode(content, type=Host)
    return digest_bytes(f"{own.id} {machine}".encode())[:32]


def _make(path: Path) -> None:
    fresh = path.with_name(f".{path.name}.{token_hex(8)}")  # two engines may be the first at once
    with suppress(FileExistsError):
        with partial(fresh, LocalFailed) as descriptor:
            write_all(descriptor, encode(Host(id=token_hex(16))))
        try:
            with suppress(OSError):
                os.link(fresh, path)
            if not os.path.lexists(path):
                fresh.rename(path)
        finally:
            fresh.unlink(missing_ok=True)


def schemas() -> dict[str, dict[str, object]]:
    """The JSON Schema of `host.json`, by the word that it says of itself."""
    return {"qmpsnap-host": schema(Host)}
