"""Copies of disks that are encrypted: the file, and the index that is in it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

from qmpsnap.store import sealed
from qmpsnap.store.clusters import CLUSTER
from qmpsnap.store.envelope import Role
from qmpsnap.store.sealed import opened_sealed
from qmpsnap.store.sealedchain import SealedChain
from qmpsnap.store.sealedindex import Index
from qmpsnap.store.secret import Secret, secret_of
from tests.fuzz.samples import ID, LATER
from tests.fuzz.surface import Surface

_KEY = secret_of(bytes(range(32)))
_ROLE = Role("web", ID, "vda.sealed")


def _keys(key: str) -> Secret:
    """Any ID that a header says leads to the one key there is."""
    return Secret(key, _KEY.content)


def _written(path: Path, on: str, *, compress: bool) -> bytes:
    dice = Random(on)
    disk = b"".join((bytes(CLUSTER), dice.randbytes(CLUSTER), b"x" * CLUSTER) * 2)
    sealed.write(
        path, secret=_KEY, role=_ROLE, virtual_size=len(disk), on=on, extents=[(0, len(disk))],
        read=lambda pieces: [disk[at : at + length] for at, length in pieces],
        compress=compress, reserve=0, limit=None, cancelled=lambda: False, on_progress=None,
    )  # fmt: skip
    return path.read_bytes()


def _images() -> list[bytes]:
    with tempfile.TemporaryDirectory() as name:
        kinds = (("", False), (LATER, True))
        return [
            _written(Path(name, f"{number}"), on, compress=compress)
            for number, (on, compress) in enumerate(kinds)
        ]


def _read(given: bytes, scratch: Path) -> object:
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "vda.sealed"
    path.write_bytes(given)
    with opened_sealed(path, _keys, None) as image:
        chain = SealedChain([image])
        return chain.runs(), chain.read(chain.extents(zeros=True))


def _indexes() -> list[bytes]:
    with tempfile.TemporaryDirectory() as name:
        found = []
        for number, content in enumerate(_images()):
            path = Path(name, str(number))
            path.write_bytes(content)
            with opened_sealed(path, _keys, _ROLE) as image:
                found.append(image.index.encode())
        return found


ALL = [
    Surface("sealed-image", _images, _read, named="vda.sealed"),
    Surface("sealed-image-index", _indexes,
            lambda given, scratch: Index.decode(given, scratch / "vda.sealed"),
            named="vda.sealed"),
]  # fmt: skip
