"""A monitor that takes no for an answer: the only place that notes what a QEMU could not tell."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from qmpsnap.errors import CommandRefused
from qmpsnap.hypervisor.monitor import Monitor

T = TypeVar("T")


class Property(msgspec.Struct, frozen=True, rename="kebab"):
    """A row of qom-list or device-list-properties."""

    name: str
    type: str
    default_value: Any = msgspec.UNSET


class Asking:
    """Questions to one machine; *missing* has what was asked for and refused, in order.

    Each raises MonitorLost, and ReplyMalformed where an answer is not what QEMU's schema promises.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self.missing: list[str] = []

    async def ask(self, command: str, kind: type[T], **arguments: object) -> T | None:
        """The answer as *kind*, or None, and *command* is missing."""
        try:
            return await self._monitor.query(command, kind, arguments)
        except CommandRefused:
            self.missing.append(command)
            return None

    async def listed(self, path: str) -> list[Property] | None:
        """The properties of the object at *path*, or None: for what not everything has."""
        try:
            return await self._monitor.query("qom-list", list[Property], {"path": path})
        except CommandRefused:
            return None

    async def quietly(self, command: str, **arguments: object) -> Any:
        """The answer, or None: for what not everything has."""
        try:
            return await self._monitor.execute(command, arguments)
        except CommandRefused:
            return None

    async def value(self, path: str, name: str) -> Any:
        """The property *name* of the object at *path*, or None, and it is missing."""
        value = await self.quietly("qom-get", path=path, property=name)
        if value is None:
            self.missing.append(f"{path} {name}")
        return value

    async def property(self, path: str, name: str) -> str | None:
        """As `value`, as text."""
        value = await self.value(path, name)
        return str(value) if isinstance(value, str | int | float) else None

    async def human(self, line: str) -> list[str] | None:
        """The lines that the human monitor answers, or None, and the command is missing."""
        said = await self.quietly("human-monitor-command", **{"command-line": line})
        if not isinstance(said, str):
            self.missing.append(line)
            return None
        return said.splitlines()
