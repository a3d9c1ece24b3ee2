"""The process that touches the store, so that a mount that hangs can be left behind with it.

It reads requests from stdin and answers each in lines on stdout (see `wire`); when its stdin ends,
so does it, as then nobody waits for an answer.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from qmpsnap.errors import LocalFailed, SnapError, StoreError, StoreRefused
from qmpsnap.host.filesystem import Filesystem, examine
from qmpsnap.store import half, wire
from qmpsnap.store.files import told
from qmpsnap.store.layout import StoreRoot
from qmpsnap.store.packcheck import Checked
from qmpsnap.store.sources import Sources

_TELL_EVERY = 0.1  # seconds
_PROBE = ".qmpsnap-probe"
_sources, _checked = Sources(), Checked()


def main() -> int:
    """Answer the requests on stdin, one after the other, until it ends."""
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_read, args=(requests, busy), daemon=True).start()
    while True:
        busy.clear()
        request = msgspec.json.decode(requests.get(), type=wire.AnyRequest)
        busy.set()
        try:
            with told(Path(request.root), StoreError):
                answer = answer_to(request)
            line = wire.Line(result=msgspec.Raw(msgspec.json.encode(answer)))
        except SnapError as failed:
            line = wire.Line(error=wire.trouble(failed))
        _say(line)


def answer_to(request: wire.AnyRequest) -> Any:
    """Do what *request* says; the answer is the Struct or the plain value of its verb."""
    root = StoreRoot(Path(request.root))
    if isinstance(request, wire.Ship | wire.Verify):
        os.nice(10)  # nobody waits for these: the guests come first
    match request:
        case wire.Examine():
            return examine_root(root)
        case wire.Catalogue(vm=vm):
            return half.catalogue(root, vm, _progress)
        case wire.Ship():
            _same_device(root, request.device)
            return half.ship(root, request, _progress)
        case wire.Verify():
            return half.verify(root, request, _progress, _checked)
        case wire.Glance():
            return half.glance(root, request, _progress)
        case wire.Read():
            return half.read(root, request)
        case wire.Load():
            return half.load(root, request, _progress)
        case wire.Fetch():
            return half.fetch(root, request, _progress)
        case wire.Remove():
            return half.remove(root, request, _progress)
        case wire.Sweep():
            return half.sweep(root, request.vm, _progress, request.waiting)
        case wire.Fill():
            return half.fill(root, request, _progress, _sources)
        case wire.Packs():
            return half.packs(root, request, _progress, _checked)
        case wire.Lost(vm=vm, packs=packs):
            return half.lost(root, vm, packs, _progress)


def examine_root(root: StoreRoot) -> Filesystem:
    """The facts of the store root, which must be a folder that takes a file.

    Raises StoreRefused when it is no folder, StoreError when it takes none.
    """
    if not root.path.is_dir():
        raise StoreRefused(f"the store {root.path} is not there, or no folder: is it mounted?")
    try:
        facts = examine(root.path)
    except LocalFailed as failed:
        raise StoreError(str(failed)) from failed
    probe = root.path / f"{_PROBE}.{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    finally:
        probe.unlink(missing_ok=True)
    return facts


def _same_device(root: StoreRoot, device: int | None) -> None:
    if device is not None and root.path.stat().st_dev != device:
        raise StoreRefused(f"the store {root.path} is no longer the one that was mounted there")


class _Teller:
    """Tells of progress, but not of every step where there are thousands a second."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if done >= total > 0 or now - self._last >= _TELL_EVERY:
            self._last = now
            _say(wire.Line(progress=wire.Done(done=done, total=total, what=what)))


_progress = _Teller()


def _say(line: wire.Line) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


def _read(requests: queue.SimpleQueue[bytes], busy: threading.Event) -> None:
    while request := sys.stdin.buffer.readline():
        requests.put(request)
    os._exit(1 if busy.is_set() else 0)  # whoever asked has gone, from the midst of a verb too


if __name__ == "__main__":
    sys.exit(main())
