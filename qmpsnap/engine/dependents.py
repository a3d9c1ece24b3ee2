"""Who else stands on a snapshot's frozen files: overlays of restored machines."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from qmpsnap.errors import LocalFailed
from qmpsnap.store import files
from qmpsnap.store.layout import LocalRoot

_FOLDER = "dependents"


class Dependent(msgspec.Struct, frozen=True, kw_only=True):
    """A restored machine in *folder*, whose *images* have the snapshot's files beneath them."""

    format: str = "qmpsnap-dependent"
    version: int = 1
    folder: str
    images: list[str]


def note(root: LocalRoot, vm: str, id: str, dependent: Dependent) -> None:
    """Write it down before the first image is made. Raises LocalFailed."""
    name = hashlib.sha256(dependent.folder.encode()).hexdigest()[:16]
    path = root.snapshot(vm, id) / _FOLDER / f"{name}.json"
    try:
        path.parent.mkdir(0o700, exist_ok=True)
    except OSError as failed:
        raise LocalFailed(f"{path.parent}: {failed.strerror}") from failed
    files.replace(path, msgspec.json.encode(dependent) + b"\n", side=LocalFailed)


def standing(root: LocalRoot, vm: str, id: str) -> list[Dependent]:
    """Those whose images are still there. What cannot be read counts as standing.

    Raises LocalFailed.
    """
    folder = root.snapshot(vm, id) / _FOLDER
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            one = msgspec.json.decode(path.read_bytes(), type=Dependent)
        except (msgspec.DecodeError, OSError):
            found.append(Dependent(folder=f"what {path} tells", images=[]))
            continue
        if any(Path(image).exists() for image in one.images):
            found.append(one)
    return found
