"""Which VM a name stands for: the only place that binds one to the other."""

from __future__ import annotations

from qmpsnap.errors import LocalFailed, Refused
from qmpsnap.store.files import make_folders, publish, read_small, replace, told
from qmpsnap.store.layout import LocalRoot
from qmpsnap.store.manifest import Identity, decode, encode

_REBIND = "use another name, or say --rebind if this is meant"


def read_identity(root: LocalRoot, vm: str) -> Identity | None:
    """The VM that the name is bound to, if it is. Raises ManifestError, LocalFailed."""
    path = root.identity(vm)
    with told(path, LocalFailed):
        if not path.is_symlink() and not path.exists():
            return None
    return decode(read_small(path, side=LocalFailed), Identity, path)


def check(root: LocalRoot, vm: str, identity: Identity) -> None:
    """Raises Refused when the name is bound to another VM; nothing is written.

    Two UUIDs decide; without them one disk in common does, so that a disk may come or go.
    """
    bound = read_identity(root, vm)
    if bound is None or _same(bound, identity):
        return
    raise Refused(
        f"the name {vm} stands for another VM: {_words(bound)}; this one is {_words(identity)}",
        hint=_REBIND,
    )


def bind(root: LocalRoot, vm: str, identity: Identity, *, rebind: bool = False) -> None:
    """Bind the name to this VM unless it is so already; with *rebind*, whatever it was bound to.

    Raises Refused (as `check`), LocalFailed, and ManifestError for a binding that cannot be read.
    """
    path, content = root.identity(vm), encode(identity)
    with told(path, LocalFailed):
        root.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    make_folders(path.parent, root.path, side=LocalFailed)
    if rebind:
        replace(path, content, side=LocalFailed)
        return
    check(root, vm, identity)
    if read_identity(root, vm) is None:
        publish(path, content, side=LocalFailed)


def _same(bound: Identity, now: Identity) -> bool:
    if bound.uuid is not None and now.uuid is not None:
        return bound.uuid.lower() == now.uuid.lower()
    return bool(set(bound.disks) & set(now.disks)) or bound.disks == now.disks


def _words(identity: Identity) -> str:
    disks = ", ".join(identity.disks) or "no disks"
    return f"UUID {identity.uuid}" if identity.uuid else f"no UUID, {disks}"
