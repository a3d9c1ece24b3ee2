"""Whether the host still has the files that a snapshot was booted from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from qmpsnap.engine import bootfiles
from qmpsnap.store.manifest import Shared

KERNEL = b"a kernel"
NOBODY = 65534


@contextmanager
def closed(folder: Path) -> Iterator[None]:
    """Nobody may enter *folder*, and we are no superuser, who always may."""
    folder.chmod(0)
    was = os.geteuid()
    if was == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(was)
        folder.chmod(0o700)


def test_a_file_that_the_host_does_not_give(tmp_path: Path) -> None:
    listed = []
    for place in ("same", "other", "gone", "below/file", "shut/kernel", "x" * 300, "folder"):
        path, digest = tmp_path / place, blake3(KERNEL).hexdigest()
        listed.append(Shared(option="kernel", path=str(path), bytes=len(KERNEL), blake3=digest))
    same, other, gone, below, shut, long, folder = (one.path for one in listed)
    Path(same).write_bytes(KERNEL)
    Path(other).write_bytes(KERNEL.upper())
    Path(below).parent.touch()
    Path(folder).mkdir()
    Path(shut).parent.mkdir()
    Path(shut).write_bytes(KERNEL)
    assert bootfiles._differing(listed) == {
        other: "has another content by now",
        gone: "is missing",
        below: "is missing",
        long: "cannot be read",
        folder: "cannot be read",
    }
    with closed(Path(shut).parent):
        found = bootfiles._differing([one for one in listed if one.path == shut])
    assert found[shut] == "cannot be read"
