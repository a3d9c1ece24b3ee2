"""The only place that takes down what -object makes beside memory: iothreads, limits, secrets."""

from __future__ import annotations

import msgspec

from qmpsnap.hypervisor.machine.asking import Asking, Property
from qmpsnap.hypervisor.machine.limits import Limits, of_group

_FOLDER = "/objects"
_SECRETS = ("secret", "tls-creds-", "tls-cipher-suites")
# what tells where a secret is, never what it is
_REFERENCES = {"secret": ("file", "keyid", "format"), "secret_keyring": ("keyid", "format")}
_OF_TLS = ("dir", "endpoint")


class IothreadSettings(msgspec.Struct, frozen=True, kw_only=True):
    """An iothread's parameters; None is one that this QEMU has not got."""

    id: str
    poll_max_ns: int
    poll_grow: int
    poll_shrink: int
    aio_max_batch: int | None = None
    thread_pool_min: int | None = None
    thread_pool_max: int | None = None


class ThrottleGroup(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    limits: Limits


class Secret(msgspec.Struct, frozen=True, kw_only=True):
    """A secret, or TLS credentials, by reference: where they are, never what they are.

    *file* or *dir* is where QEMU reads them, *keyid* the secret that decrypts it. *inline*: it
    was given on the command line or over QMP, and is nowhere else: a snapshot has not got it.
    """

    id: str
    type: str
    file: str | None = None
    keyid: str | None = None
    format: str | None = None
    dir: str | None = None
    endpoint: str | None = None
    inline: bool = False


class _Iothread(msgspec.Struct, rename="kebab"):
    id: str
    poll_max_ns: int
    poll_grow: int
    poll_shrink: int
    aio_max_batch: int | None = None


async def types(asking: Asking) -> dict[str, str] | None:
    """The type of each object that the user made, by its id."""
    listed = await asking.ask("qom-list", list[Property], path=_FOLDER)
    if listed is None:
        return None
    kinds = {one.name: one.type for one in listed}
    return {name: kind[6:-1] for name, kind in kinds.items() if kind.startswith("child<")}


async def iothreads(asking: Asking) -> list[IothreadSettings] | None:
    listed = await asking.ask("query-iothreads", list[_Iothread])
    if listed is None:
        return None
    return [
        IothreadSettings(
            id=one.id,
            poll_max_ns=one.poll_max_ns,
            poll_grow=one.poll_grow,
            poll_shrink=one.poll_shrink,
            aio_max_batch=one.aio_max_batch,
            thread_pool_min=await _number(asking, one.id, "thread-pool-min"),
            thread_pool_max=await _number(asking, one.id, "thread-pool-max"),
        )
        for one in listed
    ]


async def throttle_groups(asking: Asking, types: dict[str, str]) -> list[ThrottleGroup]:
    found = []
    for name in sorted(name for name, kind in types.items() if kind == "throttle-group"):
        limits = await asking.value(f"{_FOLDER}/{name}", "limits")
        if limits is not None:
            found.append(ThrottleGroup(id=name, limits=of_group(limits)))
    return found


async def secrets(asking: Asking, types: dict[str, str]) -> list[Secret]:
    found = []
    for name, kind in sorted(types.items()):
        if not kind.startswith(_SECRETS):
            continue
        keys = _OF_TLS if kind.startswith("tls") else _REFERENCES.get(kind, ())
        known = {key: await _text(asking, name, key) for key in keys}
        inline = kind == "secret" and not known.get("file")
        found.append(Secret(id=name, type=kind, inline=inline, **known))
    return found


async def _text(asking: Asking, name: str, key: str) -> str | None:
    value = await asking.quietly("qom-get", path=f"{_FOLDER}/{name}", property=key)
    return str(value) if value else None


async def _number(asking: Asking, name: str, key: str) -> int | None:
    value = await asking.quietly("qom-get", path=f"{_FOLDER}/{name}", property=key)
    return value if isinstance(value, int) else None
