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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from qmpsnap.errors import UNREADABLE, LeaseLost, LocalFailed, SnapError, StoreError, StoreRefused
from qmpsnap.host.filesystem import Filesystem, examine
from qmpsnap.store import half, lease, naming, removal, secretring, shipping, wire
from qmpsnap.store.files import Progress, told
from qmpsnap.store.layout import StoreRoot
from qmpsnap.store.packcheck import Checked
from qmpsnap.store.secret import Keys, none
from qmpsnap.store.sources import Sources

_TELL_EVERY = 0.1  # seconds
_sources, _checked = Sources(), Checked()
_leases: dict[tuple[Path, str], lease.Held] = {}
_apart: set[tuple[Path, str]] = set()  # VMs whose folder was seen to be their own


def main() -> int:
    """Answer the requests on stdin, one after the other, until it ends."""
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_read, args=(requests, busy), daemon=True).start()
    while True:
        busy.clear()
        asked = requests.get()
        busy.set()
        try:
            request = understood(asked)
            with told(Path(request.root), StoreError):
                answer = answer_to(request)
            line = wire.Line(result=msgspec.Raw(msgspec.json.encode(answer)))
        except SnapError as failed:
            line = wire.Line(error=wire.trouble(failed))
        _say(line)


def understood(line: bytes) -> wire.AnyRequest:
    """The request in *line*. Raises StoreError."""
    try:
        request: wire.AnyRequest = msgspec.json.decode(line, type=wire.AnyRequest)
    except UNREADABLE as odd:
        raise StoreError(f"the store's worker does not understand what it is asked: {odd}") from odd
    return request


def answer_to(request: wire.AnyRequest) -> Any:
    """Do what *request* says; the answer is the Struct or the plain value of its verb."""
    root, keys = StoreRoot(Path(request.root)), _keys(request)
    if isinstance(request, wire.Ship | wire.Verify):
        os.nice(10)  # nobody waits for these: the guests come first
    if not isinstance(request, wire.Examine | wire.Catalogue):
        _refuse_alias(root, request.vm)
    match request:
        case wire.Examine():
            return examine_root(root)
        case wire.Catalogue(vm=vm):
            return half.catalogue(root, vm, _progress, request.trust)
        case wire.Ship():
            _same_device(root, request.device)
            with _owned(root, request.vm, request.lease) as (progress, guard):
                return shipping.ship(root, request, progress, guard, keys)
        case wire.Verify():
            return half.verify(root, request, _progress, _checked, keys)
        case wire.Glance():
            return half.glance(root, request, _progress, keys)
        case wire.Read():
            return half.read(root, request, keys)
        case wire.Load():
            return half.load(root, request, _progress, keys)
        case wire.Fetch():
            return half.fetch(root, request, _progress, keys)
        case wire.Remove():
            with _owned(root, request.vm, request.lease) as (progress, guard):
                return removal.remove(root, request, progress, guard, keys)
        case wire.Sign():
            with _owned(root, request.vm, request.lease) as (_, guard):
                return shipping.sign(root, request, guard)
        case wire.Sweep():
            with _owned(root, request.vm, request.lease) as (progress, guard):
                return removal.sweep(root, request.vm, progress, request.waiting, guard, keys)
        case wire.Fill():
            return half.fill(root, request, _progress, _sources, keys)
        case wire.Packs():
            return half.packs(root, request, _progress, _checked, keys)
        case wire.Lost(vm=vm, packs=packs):
            return half.lost(root, vm, packs, _progress)
        case wire.Own(vm=vm, lease=who, act=act):
            if act == "leave":
                _taken(root, vm, who).give_up()
                del _leases[root.path, vm]
            elif act not in {"look", "rival"}:
                _taken(root, vm, who, by_force=act == "seize")
            return lease.look(root, vm, who, rivals=act == "rival")


def _refuse_alias(root: StoreRoot, vm: str) -> None:
    if (root.path, vm) not in _apart:
        naming.refuse_alias(root, vm)
        if os.path.lexists(root.vm(vm)):
            _apart.add((root.path, vm))


def _keys(request: wire.AnyRequest) -> Keys:
    """The keys that files are encrypted with; none is read before it is needed."""
    return none if request.keys is None else secretring.ring(Path(request.keys))


def _taken(root: StoreRoot, vm: str, who: lease.Claimant, *, by_force: bool = False) -> lease.Held:
    """The lease that this process has, or takes now. Raises LeaseHeld, StoreError."""
    held = _leases.pop((root.path, vm), None)
    try:
        if held is not None:
            held.check()
    except LeaseLost:
        held = None
    _leases[root.path, vm] = held or lease.take(root, vm, who, by_force=by_force)
    return _leases[root.path, vm]


@contextmanager
def _owned(
    root: StoreRoot, vm: str, who: lease.Claimant | None
) -> Iterator[tuple[Progress, Callable[[], None]]]:
    """Tells of progress as long as the VM is ours; and what makes sure of that.

    Nobody is kept out where nobody said who we are. Raises LeaseHeld, StoreError.
    """
    if who is None:
        yield _progress, lambda: None
        return
    held = _taken(root, vm, who)

    def progress(done: int, total: int, what: str) -> None:
        held.beat()
        _progress(done, total, what)

    yield progress, held.check


def examine_root(root: StoreRoot) -> Filesystem:
    """The facts of the store root, which must be a folder that takes a file of any name of ours.

    Raises StoreRefused when it is no folder, or knows no such names, StoreError when it takes none.
    """
    if not root.path.is_dir():
        raise StoreRefused(f"the store {root.path} is not there, or no folder: is it mounted?")
    try:
        facts = examine(root.path)
    except LocalFailed as failed:
        raise StoreError(str(failed)) from failed
    naming.probe(root.path)
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
