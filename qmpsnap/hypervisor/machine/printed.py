"""The only place that tells which properties, as the monitor prints them, are not the defaults."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from qmpsnap.hypervisor.machine.asking import Asking, Property
from qmpsnap.hypervisor.machine.keyval import Json
from qmpsnap.hypervisor.machine.tree import UNSET, Found

_NUMBER = re.compile(r"(-?\d+)(?: \((?:0x([0-9a-f]+)|.*)\))?")
_BACKENDS = ("drive", "netdev", "chardev", "romfile")
_OF_VIRTIO = "virtio-"  # the bus between a virtio card and the device proper, a device of its own
_NOT_SET = frozenset({"busnr"})  # what comes of where it is


async def changed(
    asking: Asking, devices: Iterable[Found], kinds: frozenset[str]
) -> list[dict[str, Json] | None]:
    """Of each device the properties that it does not have by default; None where nobody looked.

    Those that matter are looked at: what has an id, is of one of *kinds*, stands between the guest
    and something of the host, or is the virtio device of such a card. One question a type, some
    1 ms each. To ask for each property would be 80 of them for a network card.
    """
    types: dict[str, list[Property] | None] = {}
    found: list[dict[str, Json] | None] = []
    cards: set[str] = set()
    for one in devices:
        inner = (one.bus_type or "").startswith(_OF_VIRTIO) and one.parent in cards
        if not (one.id or one.type in kinds or inner or _has_backend(one)):
            found.append(None)
            continue
        cards.add(one.id or one.type)
        if one.type not in types:
            raw = await asking.quietly("device-list-properties", typename=one.type)
            types[one.type] = None if raw is None else msgspec.convert(raw, list[Property])
        known = types[one.type]
        if known is None:
            asking.missing.append(f"device-list-properties {one.type}")
        found.append(None if known is None else _changed(one, known))
    return found


def _has_backend(one: Found) -> bool:
    return any(one.properties.get(key, "").strip('"') not in UNSET for key in _BACKENDS)


def _changed(one: Found, known: list[Property]) -> dict[str, Json]:
    out: dict[str, Json] = {}
    for prop in known:
        text = one.properties.get(prop.name)
        if text is None or prop.name in _NOT_SET:
            continue
        value = _typed(text, prop.type)
        default = prop.default_value
        if value != (None if default in (msgspec.UNSET, []) else default):
            out[prop.name] = value
    return dict(sorted(out.items()))


def _typed(text: str, kind: str) -> Json:
    """What was printed, as JSON; None for what is not set."""
    if text.strip('"') in UNSET:
        return None
    if text in ("true", "false"):
        return text == "true"
    number = _NUMBER.fullmatch(text)
    if number is None:
        return text[1:-1] if text[0] == text[-1] == '"' else text
    # the monitor prints all numbers as signed ones
    unsigned = number[2] is not None and kind.startswith("uint")
    return int(number[2], 16) if unsigned else int(number[1])
