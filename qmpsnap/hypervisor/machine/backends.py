"""The only place that asks QEMU for a back end that no option made, and says it as an option."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qmpsnap.errors import Blocked, CommandRefused
from qmpsnap.hypervisor.machine import network
from qmpsnap.hypervisor.machine.asking import Asking, Property
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.inventory import Inventory
from qmpsnap.hypervisor.machine.keyval import Fields, Json, Pair, from_json
from qmpsnap.hypervisor.machine.network import Client
from qmpsnap.hypervisor.machine.options import fields_of, option_of
from qmpsnap.hypervisor.monitor import Monitor

# What a device calls the objects that it needs.
_LINKS = ("memdev", "iothread", "rng", "cryptodev", "hostmem")
_MEMORY = ("size", "share", "merge", "dump", "prealloc", "reserve", "host-nodes", "policy")
_OF_OBJECT = {
    "memory-backend-ram": _MEMORY,
    "memory-backend-memfd": (*_MEMORY, "hugetlb", "hugetlbsize", "seal"),
    "memory-backend-file": (
        *_MEMORY, "mem-path", "align", "offset", "readonly", "rom", "pmem", "discard-data",
    ),
    "iothread": (
        "poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch", "thread-pool-min",
        "thread-pool-max",
    ),
    "rng-random": ("filename",),
    "rng-builtin": (),
    "rng-egd": ("chardev",),
    "cryptodev-backend-builtin": ("queues",),
}  # fmt: skip
_SECRET = "what it holds is not read, and not kept"
_FAMILIAR = frozenset(
    {"null", "pty", "ringbuf", "vc", "file", "pipe", "stdio", "udp", "msmouse", "wctablet"}
    | {"serial", "parallel", "braille", "testdev"}
)
# Their peers do not come along: a restored card is connected to nothing, whatever it was.
_PEERS = frozenset({"socket", "stream", "dgram", "l2tpv3", "vde"})
_UNNAMED = re.compile(r"#|user\.\d+$")  # what -nic and -net make
_USER_NET = "10.0.2.0"


@dataclass(slots=True)
class BackEnds:
    """The back ends of one QEMU. *notes*: what is not as it was, of those that were told."""

    monitor: Monitor
    inventory: Inventory
    notes: list[str] = field(default_factory=list)
    _networks: dict[str, Client] | None = None
    _objects: dict[str, str] | None = None

    async def networks(self) -> Mapping[str, Client]:
        """The netdevs, by id; no QMP query tells of them. A card may have the id of its own."""
        if self._networks is None:
            said = await Asking(self.monitor).human("info network") or []
            clients = network.parsed(said)
            self._networks = {one.name: one for one in clients if one.type != network.CARD}
        return self._networks

    async def user_networks(self, line: CommandLine) -> list[str]:
        """The ids of the user networks that came at run time: no option of *line* made them."""
        known = {fields_of(one).get("id") for one in line.all("netdev", "nic", "net")}
        return [
            ident
            for ident, told in (await self.networks()).items()
            if told.type == "user" and ident not in known and not _UNNAMED.match(ident)
        ]

    async def objects(self) -> Mapping[str, str]:
        """The types of the user's objects, by id."""
        if self._objects is None:
            told = await self.monitor.query("qom-list", list[Property], {"path": "/objects"})
            self._objects = {
                one.name: one.type[len("child<") : -1]
                for one in told
                if one.type.startswith("child<")
            }
        return self._objects

    async def drives(self) -> set[str]:
        """The names of the drives; those of -blockdev have none."""
        told = await self.monitor.query("query-block", list[dict[str, Any]])
        return {str(one.get("device")) for one in told} - {""}

    async def netdev(self, ident: str) -> Option:
        """Raises Blocked for one that QEMU does not tell, or that is tied to something outside."""
        told = (await self.networks()).get(ident)
        if told is None:
            raise Blocked(f"netdev {ident} is of a kind that QEMU does not tell")
        kind, said = told.type, told.facts
        pairs: list[Pair] = [("type", kind), ("id", ident)]
        match kind:
            case "user":
                pairs += (
                    [("net", f"{said['net']}/24")]
                    if said.get("net", _USER_NET) != _USER_NET
                    else []
                )
                pairs += [("restrict", "on")] if said.get("restrict") == "on" else []
                self.notes.append(f"netdev {ident}: user networking, with its addresses by default")
            case "tap" if said.get("br") and said.get("helper"):
                pairs = [("type", "bridge"), ("id", ident), ("br", said["br"])]
            case "tap":
                pairs += [("queues", str(told.queues))] if told.queues > 1 else []
                pairs += [("ifname", said["ifname"])] if said.get("ifname") else []
                pairs += [("script", "no"), ("downscript", "no")]
                self.notes.append(f"netdev {ident}: a tap without vhost")
            case _ if kind not in _PEERS:
                raise Blocked(f"netdev {ident} is of type {kind}, which is outside of the machine")
        return option_of("netdev", Fields(tuple(pairs)))

    async def chardev(self, ident: str) -> Option:
        """Raises Blocked for one that QEMU does not tell."""
        whole = await self._property(f"/chardevs/{ident}", "type")
        backend = str(whole or "").removeprefix("chardev-")
        pairs: list[Pair] = [("backend", backend), ("id", ident)]
        if backend == "socket":
            pairs += await self._socket(ident)
        elif backend not in _FAMILIAR:
            raise Blocked(f"chardev {ident} is a {backend or 'back end'} that QEMU does not tell")
        elif backend in ("file", "pipe"):
            pairs.append(("path", f"{ident}.out"))
            self.notes.append(f"chardev {ident}: QEMU does not tell its {backend}'s name")
        return option_of("chardev", Fields(tuple(pairs)))

    async def object_(self, ident: str) -> Option:
        """Raises Blocked for one of a kind that cannot be asked for all that it is."""
        kind = (await self.objects()).get(ident, "")
        if kind.startswith(("secret", "tls-creds", "tls-cipher")):
            raise Blocked(f"object {ident} is a {kind}: {_SECRET}")
        if kind not in _OF_OBJECT:
            raise Blocked(f"object {ident} is a {kind or 'thing'} that QEMU does not tell")
        tree: dict[str, Json] = {"qom-type": kind, "id": ident}
        for name in _OF_OBJECT[kind]:
            value = await self._property(f"/objects/{ident}", name)
            if value not in (None, "", []) and (value != 0 or kind == "iothread" or value is False):
                tree[name] = value
        return option_of("object", from_json(tree))

    async def _socket(self, ident: str) -> list[Pair]:
        address = await self._property(f"/chardevs/{ident}", "addr")
        match address:
            case {"type": "unix", "path": path}:
                pairs: list[Pair] = [("path", str(path))]
            case {"type": "inet", "host": host, "port": port}:
                pairs = [("host", str(host)), ("port", str(port))]
            case _:
                raise Blocked(f"chardev {ident} is a socket whose address QEMU does not tell")
        facts = next((c for c in self.inventory.chardevs or [] if c.label == ident), None)
        if facts is None:
            raise Blocked(f"chardev {ident} is a socket that QEMU does not tell")
        listens = ",server" in facts.filename
        return [*pairs, ("server", "on"), ("wait", "off")] if listens else pairs

    async def _property(self, path: str, name: str) -> Any:
        try:
            return await self.monitor.execute("qom-get", {"path": path, "property": name})
        except CommandRefused:
            return None


def referred(properties: Fields) -> Iterator[tuple[str, str]]:
    """The back ends that a device with *properties* needs: option's name and id of each."""
    for key, value in properties:
        if not isinstance(value, str) or not value:
            continue
        if key in ("netdev", "chardev"):
            yield key, value
        elif key in _LINKS or (key.startswith("iothread-vq-mapping.") and key.endswith("iothread")):
            yield "object", value
