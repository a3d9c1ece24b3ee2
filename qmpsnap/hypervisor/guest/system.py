"""The only place that asks the guest's agent what system it is in; its words are not trusted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from qmpsnap.errors import AgentError
from qmpsnap.hypervisor import agent as door

T = TypeVar("T")
_WITHIN = 1.5  # seconds for all answers
_LONGEST = 64 << 10  # bytes of one answer as JSON: a record is no place for a guest to fill


class GuestOs(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    id: str | None = None
    name: str | None = None
    pretty_name: str | None = None
    version: str | None = None
    version_id: str | None = None
    kernel_release: str | None = None
    kernel_version: str | None = None
    machine: str | None = None


class GuestFilesystem(msgspec.Struct, frozen=True, kw_only=True):
    """A mounted file system; None is what the agent does not tell."""

    name: str
    mountpoint: str
    type: str
    used_bytes: int | None
    total_bytes: int | None


class GuestInterface(msgspec.Struct, frozen=True, kw_only=True):
    """*addresses* with the length of their prefix: `10.0.2.15/24`."""

    name: str
    mac: str | None
    addresses: list[str]


class GuestZone(msgspec.Struct, frozen=True, kw_only=True):
    """*offset_seconds* is how far the guest's time zone is ahead of UTC."""

    name: str | None
    offset_seconds: int


class GuestSystem(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest's agent says of it; None is what it did not say, or not in time."""

    os: GuestOs | None
    host_name: str | None
    filesystems: list[GuestFilesystem] | None
    interfaces: list[GuestInterface] | None
    time_zone: GuestZone | None


class _HostName(msgspec.Struct, rename="kebab"):
    host_name: str


class _Zone(msgspec.Struct):
    offset: int
    zone: str | None = None


class _Filesystem(msgspec.Struct, rename="kebab"):
    name: str
    mountpoint: str
    type: str
    used_bytes: int | None = None
    total_bytes: int | None = None


class _Address(msgspec.Struct, rename="kebab"):
    ip_address: str
    prefix: int


class _Interface(msgspec.Struct, rename="kebab"):
    name: str
    hardware_address: str | None = None
    ip_addresses: list[_Address] = []


async def ask(path: Path, missing: list[str], *, within: float = _WITHIN) -> GuestSystem | None:
    """What the agent behind *path* tells within *within* seconds in all; None if nothing.

    What it does not tell is added to *missing*, by the name of the command. Nothing of the guest
    is changed, and a late answer is thrown away by whoever asks next.
    """
    asking = _Asking(missing)
    try:
        async with asyncio.timeout(within), door.connect(path, within=within) as session:
            await asking.all(session, within)
    except (AgentError, TimeoutError):
        missing += [name for name in _KINDS if name not in asking.asked]
    return asking.told()


_KINDS: dict[str, Any] = {
    "guest-get-osinfo": GuestOs,
    "guest-get-host-name": _HostName,
    "guest-get-timezone": _Zone,
    "guest-network-get-interfaces": list[_Interface],
    "guest-get-fsinfo": list[_Filesystem],
}


class _Asking:
    def __init__(self, missing: list[str]) -> None:
        self.asked: dict[str, Any] = {}
        self._missing = missing

    async def all(self, session: door.Agent, within: float) -> None:
        for name, kind in _KINDS.items():
            try:
                raw = await session.execute(name, within=within)
                short = len(msgspec.json.encode(raw)) <= _LONGEST
                self.asked[name] = msgspec.convert(raw if short else None, kind)
            except (AgentError, ValueError):
                # one that it has not got, or that an administrator has switched off; and the
                # guest says what it likes: half a character is none that can be written down
                self.asked[name] = None
                self._missing.append(name)

    def told(self) -> GuestSystem | None:
        os, host, zone, interfaces, filesystems = (self.asked.get(name) for name in _KINDS)
        if os is host is zone is interfaces is filesystems is None:
            return None
        return GuestSystem(
            os=os,
            host_name=host.host_name if host else None,
            filesystems=_each(filesystems, _filesystem),
            interfaces=_each(interfaces, _interface),
            time_zone=GuestZone(name=zone.zone, offset_seconds=zone.offset) if zone else None,
        )


def _each(found: list[Any] | None, kind: Any) -> list[Any] | None:
    return None if found is None else [kind(one) for one in found]


def _filesystem(one: _Filesystem) -> GuestFilesystem:
    return msgspec.convert(one, GuestFilesystem, from_attributes=True)


def _interface(one: _Interface) -> GuestInterface:
    addresses = [f"{address.ip_address}/{address.prefix}" for address in one.ip_addresses]
    return GuestInterface(name=one.name, mac=one.hardware_address, addresses=addresses)
