"""The only place that takes down the guest's network cards and what is behind them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import msgspec

from qmpsnap.hypervisor.machine.asking import Asking
from qmpsnap.hypervisor.machine.cmdline import CommandLine
from qmpsnap.hypervisor.machine.options import Netdev, fields_of

# " \ n0: index=0,type=user,net=10.0.2.0", also behind the name of a hub's port
_CLIENT = re.compile(
    r"(?P<name>[^\s:][^:]*): index=(?P<index>\d+),type=(?P<type>[^,]+),?(?P<told>.*)"
)
CARD = "nic"


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """A network card. *mac* is the one it has now, *backend* the id of what it is connected to."""

    id: str
    model: str
    mac: str | None
    queue_count: int
    backend: str | None


class NetworkBackend(msgspec.Struct, frozen=True, kw_only=True):
    """A -netdev or its kin. *interface* and *bridge* are those of the host; *options* what the
    command line says of it, None for one that came at run time; *told* is what QEMU says.
    """

    id: str
    type: str
    interface: str | None
    bridge: str | None
    queue_count: int
    options: dict[str, str] | None
    told: str


@dataclass(slots=True)
class Client:
    """A card, or what one is connected to, as the human monitor tells of it."""

    name: str
    type: str
    told: str
    queues: int = 0
    peer: str | None = None
    facts: dict[str, str] = field(default_factory=dict)


async def take(
    asking: Asking, line: CommandLine | None
) -> tuple[list[Card] | None, list[NetworkBackend] | None]:
    """The cards and the backends; only the human monitor knows them (net/net.c)."""
    said = await asking.human("info network")
    if said is None:
        return None, None
    seen = parsed(said)
    given = _given(line) if line else {}
    cards = [_card(one) for one in seen if one.type == CARD]
    return cards, [_backend(one, given.get(one.name)) for one in seen if one.type != CARD]


def parsed(said: list[str]) -> list[Client]:
    """What `info network` says; of a client with several queues there is a line for each."""
    found: dict[tuple[str, bool], Client] = {}  # a card may be called as its backend is
    above: Client | None = None
    for row in said:
        inner = row.startswith(" \\ ")
        port, text = None, row.removeprefix(" \\ ").strip()
        match = _CLIENT.match(text)
        if match is None and inner:  # "n1: nic1: index=0,..." in a hub
            port, _, rest = text.partition(": ")
            match = _CLIENT.match(rest)
        if match is None:
            above = None
            continue
        new = Client(match["name"], match["type"], match["told"])
        one = found.setdefault((new.name, new.type == CARD), new)
        one.queues += 1
        one.facts |= dict(pair.split("=", 1) for pair in new.told.split(",") if "=" in pair)
        if port is not None:
            found[port, False] = Client(port, "hubport", "", 1, peer=one.name)
            one.peer = port
        elif inner and above is not None:
            one.peer, above.peer = above.name, one.name
        else:
            above = one
    return list(found.values())


def _card(one: Client) -> Card:
    return Card(
        id=one.name,
        model=one.facts.get("model", ""),
        mac=one.facts.get("macaddr"),
        queue_count=one.queues,
        backend=one.peer,
    )


def _backend(one: Client, options: dict[str, str] | None) -> NetworkBackend:
    given = options or {}
    return NetworkBackend(
        id=one.name,
        type=one.type,
        interface=one.facts.get("ifname") or given.get("ifname") or given.get("l2tpv3.ifname"),
        bridge=one.facts.get("br") or given.get("br"),
        queue_count=one.queues,
        options=options,
        told=one.told,
    )


def _given(line: CommandLine) -> dict[str, dict[str, str]]:
    views = [Netdev.of(option).fields for option in line.all("netdev")]
    views += [fields_of(option) for option in line.all("nic", "net")]
    named = {view.get("id") or "": view for view in views}
    return {
        name: {key: view.get(key) or "" for key, _ in view} for name, view in named.items() if name
    }
