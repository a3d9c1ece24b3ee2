"""Who else stands on a snapshot's frozen files: overlays of restored machines, and exports."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from qmpsnap.errors import UNREADABLE, LocalFailed
from qmpsnap.listening import listens
from qmpsnap.store import files
from qmpsnap.store.layout import LocalRoot

_FOLDER = "dependents"


class Dependent(msgspec.Struct, frozen=True, kw_only=True):
    """Whoever has the snapshot's files beneath the *images*: a machine restored into *folder*, or
    an export, whose socket both of them name."""

    format: str = "qmpsnap-dependent"
    version: int = 1
    folder: str
    images: list[str]
    kind: Literal["restored machines", "exports"] = "restored machines"


def note(root: LocalRoot, vm: str, id: str, dependent: Dependent) -> None:
    """Write it down before the first image is made. Raises LocalFailed."""
    path = _path(root, vm, id, dependent.folder)
    try:
        path.parent.mkdir(0o700, exist_ok=True)
    except OSError as failed:
        raise LocalFailed(f"{path.parent}: {failed.strerror}") from failed
    files.replace(path, msgspec.json.encode(dependent) + b"\n", side=LocalFailed)


def forget(root: LocalRoot, vm: str, id: str, folder: Path) -> None:
    """The restore into *folder* failed, and its images are gone again."""
    _path(root, vm, id, str(folder)).unlink(missing_ok=True)


def _path(root: LocalRoot, vm: str, id: str, folder: str) -> Path:
    name = hashlib.sha256(folder.encode()).hexdigest()[:16]
    return root.snapshot(vm, id) / _FOLDER / f"{name}.json"


def in_words(those: Iterable[Dependent]) -> str:
    """Who stands there, for people; empty if nobody does."""
    folders: dict[str, list[str]] = {}
    for one in those:
        folders.setdefault(one.kind, []).append(one.folder)
    return "; ".join(f"{kind} stand on it: {', '.join(these)}" for kind, these in folders.items())


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
            made = [image for image in map(Path, one.images) if _there(image)]
            # an empty folder: its images are being made
            if made or (Path(one.folder).is_dir() and not any(Path(one.folder).iterdir())):
                found.append(one)
        except (OSError, *UNREADABLE):
            found.append(Dependent(folder=f"what {path} tells", images=[]))
    return found


def _there(image: Path) -> bool:
    # an export that was killed leaves its socket
    return listens(image) if image.is_socket() else image.exists()
