"""The host's ends of a VM's network: the only place that finds taps and reads their counters."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qmpsnap.host import kernelfile
from qmpsnap.host.tasks import PROC

_SYS = Path("/sys/class/net")
_TUN = "/dev/net/tun"


class InterfaceUsage(msgspec.Struct, frozen=True, kw_only=True):
    """A tap of the VM, counted since it was made; *bridge* is what it is a port of.

    Seen from the guest: what it sent is what the tap received. *queue_count*: how many descriptors
    the process holds on it.
    """

    name: str
    bridge: str | None
    queue_count: int
    sent_bytes: int
    sent_packet_count: int
    sent_dropped_count: int
    received_bytes: int
    received_packet_count: int
    received_dropped_count: int


def usage(pid: int, *, proc: Path = PROC, sys: Path = _SYS) -> list[InterfaceUsage] | None:
    """The taps that *pid* holds open, by name; None where its descriptors are not for us to see.

    One that is in none of the two network namespaces, the process' and ours, is left out.
    """
    home = proc / str(pid)
    try:
        held = _taps(home)
    except OSError:
        return None
    if not held:
        return []
    ours = proc / "self"
    # the process may be in a namespace of its own and still have a tap of ours
    counters = _counters(ours) | _counters(home)
    return [
        _interface(name, queues, counters[name], sys)
        for name, queues in sorted(held.items())
        if name in counters
    ]


def _taps(home: Path) -> dict[str, int]:
    """How many descriptors there are of each tap. Raises OSError."""
    held: dict[str, int] = {}
    for link in (home / "fd").iterdir():
        try:
            if str(link.readlink()) != _TUN:
                continue
        except OSError:
            continue  # closed meanwhile
        name = kernelfile.table(home / "fdinfo" / link.name, ":").get("iff", "")
        if name:
            held[name] = held.get(name, 0) + 1
    return held


def _counters(home: Path) -> dict[str, list[int]]:
    rows = kernelfile.table(home / "net" / "dev", ":")
    return {
        name: numbers
        for name, row in rows.items()
        if len(numbers := [n for word in row.split() if (n := kernelfile.whole(word)) is not None])
        >= 16
    }


def _interface(name: str, queues: int, row: list[int], sys: Path) -> InterfaceUsage:
    # proc_pid_net(5): bytes packets errs drop fifo frame compressed multicast, received, then sent
    try:
        bridge = (sys / name / "master").readlink().name
    except OSError:
        bridge = None
    return InterfaceUsage(
        name=name,
        bridge=bridge,
        queue_count=queues,
        sent_bytes=row[0],
        sent_packet_count=row[1],
        sent_dropped_count=row[3],
        received_bytes=row[8],
        received_packet_count=row[9],
        received_dropped_count=row[11],
    )
