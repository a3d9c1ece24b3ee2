"""Real control groups for tests, as many limits as this machine lets us set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from qmpsnap.host import cgroup, site
from qmpsnap.host.limits import GroupLimits

MIB = 1 << 20
WISHES = GroupLimits(
    cpu_max_count=0.75,
    memory_max_bytes=700 * MIB,
    pids_max_count=300,
    cpus=[0] if (os.cpu_count() or 1) > 1 else None,
)


def settable() -> GroupLimits:
    """Those of `WISHES` that can be set here.

    Where there are none, the test is skipped; it fails where we can make a group ourselves.
    """
    found = GroupLimits()
    for field in WISHES.__struct_fields__:
        wish = {field: getattr(WISHES, field)}
        if wish[field] is not None and not site.site(GroupLimits(**wish)).troubles:
            found = msgspec.structs.replace(found, **wish)
    if found == GroupLimits():
        told = "no control group can be limited here"
        if any(map(_made, _candidates())):
            pytest.fail(f"{told}, and yet we can make one")
        pytest.skip(told)
    return found


def _candidates() -> Iterator[Path]:
    """Folders in which a group of ours could be limited, if we may make it."""
    folders = cgroup.folders_of(os.getpid())
    yield from (folders[name] for name in ("pids", "cpu", "memory") if name in folders)
    if "" in folders:
        for folder in (folders[""], *folders[""].parents):
            down = folder / "cgroup.subtree_control"
            empty = down.exists() and not (folder / "cgroup.procs").read_text()
            if empty and "pids" in down.read_text().split():
                yield folder


def _made(folder: Path) -> bool:
    probe = folder / f"qs-probe-{os.getpid()}"
    try:
        probe.mkdir()
    except OSError:
        return False
    probe.rmdir()
    return True
