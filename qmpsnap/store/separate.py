"""Two stores are two: the only place that judges whether a store is another one than the local."""

from __future__ import annotations

from pathlib import PurePosixPath

from qmpsnap.errors import StoreRefused
from qmpsnap.host.filesystem import Filesystem

_TRIAL = "give another --store, or --allow-local-store for a trial"
_THIS_HOST = {"localhost", "127.0.0.1", "[::1]", "::1", "ip6-localhost"}


def refuse_same(local: Filesystem, store: Filesystem, *, allow_local: bool) -> bool:
    """Whether this store only serves for a trial: one that fails as soon as the host does.

    Raises StoreRefused when the roots are on one file system, or the store is not on the network,
    unless *allow_local*; and in any case when one root lies inside the other.
    """
    if _inside(local.path, store.path) or _inside(store.path, local.path):
        raise StoreRefused(
            f"the local root {local.path} and the store {store.path} lie inside each other",
            hint="give each a folder of its own",
        )
    reason = _why_one(local, store)
    if reason is None:
        return False
    if not allow_local:
        raise StoreRefused(reason, hint=_TRIAL)
    return True


def _why_one(local: Filesystem, store: Filesystem) -> str | None:
    both = f"the local root {local.path} and the store {store.path}"
    if local.device == store.device:
        return f"{both} are on the same file system, mounted at {store.mount.point}"
    if _one_source(local.mount.source, store.mount.source):
        return f"{both} are on the same file system, {store.mount.source}"
    if not store.network:
        return (
            f"the store {store.path} is not on a network file system"
            f" (it is on {store.mount.fstype}, mounted at {store.mount.point})"
        )
    if _server(store.mount.source) in _THIS_HOST:
        return f"the store {store.path} is served by this host itself ({store.mount.source})"
    return None


def _one_source(one: str, other: str) -> bool:
    # `tmpfs` and `none` are no sources; one export mounted by its subfolder is the same
    if "/" not in one or "/" not in other:
        return False
    same_server = _server(one) == _server(other)
    one, other = one.rpartition(":")[2], other.rpartition(":")[2]
    return same_server and (_inside(one, other) or _inside(other, one))


def _server(source: str) -> str | None:
    """`host` of `host:/export`, `user@host:/folder` or `//host/share`."""
    if source.startswith("//"):
        return source[2:].partition("/")[0].lower()
    host, colon, _ = source.rpartition(":")
    return host.rpartition("@")[2].lower() if colon else None


def _inside(path: str, folder: str) -> bool:
    return PurePosixPath(path).is_relative_to(folder)
