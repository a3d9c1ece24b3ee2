"""A migration stream that we write ourselves: the only place that puts its pieces out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from qmpsnap.errors import LocalFailed
from qmpsnap.hypervisor.vmstate import records


class Outlet:
    """The descriptor *fd*, to be known as *name*; *bytes* is what it was given."""

    def __init__(self, fd: int, name: str | Path) -> None:
        self._fd, self._name = fd, name
        self.bytes = 0

    def put(self, data: bytes | memoryview) -> None:
        """Raises LocalFailed when it takes no more."""
        view = memoryview(data)
        self.bytes += len(view)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as failed:
            raise LocalFailed(f"{self._name}: {failed.strerror}") from failed

    @contextlib.contextmanager
    def section(self, kind: int, ram: int) -> Iterator[None]:
        """The block puts the records of a section of the RAM, whose number is *ram*."""
        self.put(b"%c%b" % (kind, records.number(ram, 4)))
        yield
        self.put(records.number(records.EOS, 8) + records.footer(ram))


@contextlib.contextmanager
def told(name: str | Path) -> Iterator[None]:
    """An OSError in the block is LocalFailed, with *name* in front."""
    try:
        yield
    except OSError as failed:
        raise LocalFailed(f"{name}: {failed.strerror}") from failed
