"""`usage.json`: what a VM and its host used around a snapshot, and since the one before."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

import msgspec

from qmpsnap.dialect import schema
from qmpsnap.engine import firstusage
from qmpsnap.engine.interval import Interval, between
from qmpsnap.engine.sample import Sample
from qmpsnap.errors import LocalFailed, ManifestError
from qmpsnap.host.filesystem import Filesystem
from qmpsnap.store import files
from qmpsnap.store.head import readable, version_of
from qmpsnap.store.layout import LocalRoot

log = logging.getLogger(__name__)
VERSION = 2
AROUND = "before the instant"


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Two samples, neither of them while the guest was held. Units are in the names.

    *before* the point in time, and *after* the guest ran again, before its disks were copied.
    *around*: between these two. *since_last*: from the last sample of the snapshot before to
    *before*, thus what the VM used by itself, and QEMU for the copies of that snapshot's disks;
    None for the first one, and after QEMU was started again. *store_root* is as it was when the
    snapshot began, None if the store did not answer.
    """

    format: Literal["qmpsnap-usage"] = "qmpsnap-usage"
    version: Annotated[int, msgspec.Meta(ge=1, le=VERSION)] = VERSION
    vm: str | None = None
    id: str | None = None
    before: Sample
    after: Sample | None = None
    store_root: Filesystem | None = None
    since_last: Interval | None = None
    around: Interval | None = None


def of(
    vm: str,
    id: str,
    before: Sample,
    after: Sample | None,
    *,
    store: Filesystem | None,
    earlier: Usage | None,
) -> Usage:
    """The usage of one snapshot; *earlier* is that of the VM's snapshot before."""
    last = earlier and (earlier.after or earlier.before)
    since = earlier.id if earlier and earlier.id else ""
    return Usage(
        vm=vm,
        id=id,
        before=before,
        after=after,
        store_root=store,
        since_last=between(last, before, since) if last else None,
        around=between(before, after, id) if after else None,
    )


def encode(usage: Usage) -> bytes:
    return msgspec.json.format(msgspec.json.encode(usage), indent=2) + b"\n"


def decode(text: str | bytes, path: str) -> Usage:
    """Raises ManifestError, naming *path* and the key; version 1 is read as one sample."""
    version = version_of(text, "qmpsnap-usage", VERSION, path)
    with readable(text, path):
        if version == 1:
            return Usage(version=1, before=firstusage.decode(text))
        return msgspec.json.decode(text, type=Usage)


def last(root: LocalRoot, vm: str) -> Usage | None:
    """The usage of the newest snapshot of *vm*, also of one that is deleted; None if not known."""
    path = root.usage(vm)
    try:
        return (
            decode(files.read_small(path, side=LocalFailed), str(path)) if path.exists() else None
        )
    except (LocalFailed, ManifestError, OSError) as unknown:
        log.warning("no figures since the last snapshot: %s", unknown)
        return None


def keep(root: LocalRoot, usage: Usage) -> None:
    """Note *usage* as that of the newest snapshot of its VM, for the next one."""
    try:
        files.replace(root.usage(str(usage.vm)), encode(usage), side=LocalFailed)
    except LocalFailed as failed:
        log.warning("the next snapshot will have no figures since this one: %s", failed)


def schemas() -> dict[str, dict[str, object]]:
    """The JSON Schema of `usage.json`, by the word that its file is named for."""
    return {"qmpsnap-usage": schema(Usage)}
