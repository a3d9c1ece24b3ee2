"""The only place that knows which properties of a device differ from what its type has."""

from __future__ import annotations

from typing import Any

import msgspec

from qmpsnap.errors import CommandRefused
from qmpsnap.hypervisor.machine.asking import Property
from qmpsnap.hypervisor.machine.keyval import Json
from qmpsnap.hypervisor.monitor import Monitor

# Nobody can, or would, give these to -device.
_NOT_SET = frozenset({
    "parent_bus", "type", "realized", "hotplugged", "hotpluggable",
    "busnr", "attached",  # what comes of where it is, and of the state that is loaded
    "crash-information", "guest-stats", "feature-words", "filtered-features",
    "unavailable-features", "pending_deleted_event", "partially_hotplugged",
})  # fmt: skip
# Can be read and not be set, on the types of that beginning.
_READ_ONLY = {"pc-dimm": {"size"}, "nvdimm": {"size"}, "virtio-mem": {"size"}}
# Unsaid, they are these: QEMU gives no default for what an instance makes by itself.
_UNSAID: dict[str, Json] = {"bootindex": -1, "bootindexA": -1, "bootindexB": -1}
_LISTS = frozenset({"iothread-vq-mapping"})
_FOLDERS = ("/objects/", "/machine/peripheral/", "/chardevs/")


class _Value(msgspec.Struct, frozen=True):
    name: str
    value: Any = None


class _Object(msgspec.Struct, frozen=True):
    properties: list[_Value]


class Properties:
    """The properties of one QEMU's devices; what a type has by default is asked once."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._types: dict[str, list[Property]] = {}
        self._at_once = True  # qom-list-get, since 10.1

    async def changed(self, path: str, kind: str) -> dict[str, Json]:
        """What the device at the QOM *path*, of type *kind*, has other than a new one, by name.

        The values are such as -device takes: a link is the id of what it leads to, a PCI address
        is `slot.function`. A property whose default QEMU does not tell is given if it says
        anything; an empty `romfile` says that there is no ROM. vCPUs have none: theirs come from
        -cpu. Empty for a type that tells nothing of itself.

        Each command is a small one: no more than some ms of QEMU's main loop. Raises MonitorLost.
        """
        if kind.endswith("-cpu"):
            return {}
        known = [one for one in await self._of_type(kind) if _can_be_set(one, kind)]
        values = await self._values(path, [one.name for one in known])
        found: dict[str, Json] = {}
        for one in known:
            value = _spelled(one, values.get(one.name), path)
            if value is not None and not _unsaid(one, value):
                found[one.name] = value
        return dict(sorted(found.items()))

    async def _of_type(self, kind: str) -> list[Property]:
        if kind not in self._types:
            asked = {"typename": kind}
            try:
                told = await self._monitor.query("device-list-properties", list[Property], asked)
            except CommandRefused:
                told = []
            self._types[kind] = told
        return self._types[kind]

    async def _values(self, path: str, names: list[str]) -> dict[str, Any]:
        if self._at_once:
            try:
                asked = {"paths": [path]}
                (told,) = await self._monitor.query("qom-list-get", tuple[_Object], asked)
                return {one.name: one.value for one in told.properties}
            except CommandRefused:
                self._at_once = False
        return {name: await self._value(path, name) for name in names}

    async def _value(self, path: str, name: str) -> Any:
        try:
            return await self._monitor.execute("qom-get", {"path": path, "property": name})
        except CommandRefused:  # some cannot be read, or not now
            return None


def _can_be_set(one: Property, kind: str) -> bool:
    name, type_ = one.name, one.type
    if name in _NOT_SET or name.startswith("legacy-"):
        return False
    if any(kind.startswith(start) and name in names for start, names in _READ_ONLY.items()):
        return False
    return not type_.startswith("child<") and type_ != "link<memory-region>"


def _spelled(one: Property, value: Any, path: str) -> Json:
    """*value* as -device takes it, None for one that it cannot take, such as the device itself."""
    name, type_ = one.name, one.type
    if isinstance(value, list | dict):
        return value if name in _LISTS and value else None
    if type_.startswith("link<"):
        text = str(value or "")
        return text.rpartition("/")[2] if _direct(text) and text != path else None
    # a slot and a function in one number; the address of a DIMM is 64 bits wide
    if name == "addr" and type_ in ("int32", "str") and isinstance(value, int):
        return f"{value >> 3:x}.{value & 7}" if value >= 0 else None
    return value if isinstance(value, bool | int | str) else None


def _direct(path: str) -> bool:
    return any(path.startswith(folder) and "/" not in path[len(folder) :] for folder in _FOLDERS)


def _unsaid(one: Property, value: Json) -> bool:
    name, default = one.name, one.default_value
    if default is not msgspec.UNSET:
        return bool(value == default and type(value) is type(default))
    if name in _UNSAID:
        return value == _UNSAID[name]
    return value == "" and name != "romfile"
