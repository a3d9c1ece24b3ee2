"""A secret key that encrypts, in memory: the only place that says what it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from blake3 import blake3

from qmpsnap.errors import KeyMissing
from qmpsnap.store.aead import KEY_BYTES

_CONTEXT = "qmpsnap encryption key, fingerprint, version 1"


@dataclass(frozen=True, slots=True)
class Secret:
    """The key called *key*; its *content* is in no message, log or record."""

    key: str
    content: bytes = field(repr=False)


Keys = Callable[[str], Secret]
"""The key of this ID. Raises KeyMissing, and what is wrong with the file of one that is here."""


def fingerprint(content: bytes) -> str:
    """What people compare two keys by; nothing of the key can be learnt from it."""
    return blake3(content, derive_key_context=_CONTEXT).hexdigest()


def secret_of(content: bytes) -> Secret:
    """The key *content*, of 32 bytes, called by the first 16 digits of its fingerprint."""
    if len(content) != KEY_BYTES:
        raise ValueError(f"a key of {len(content)} bytes")
    return Secret(fingerprint(content)[:16], content)


def none(key: str) -> Secret:
    """Where no keys are at hand. Raises KeyMissing."""
    raise missing(key)


def missing(key: str) -> KeyMissing:
    """That the key called *key* is needed, and not here."""
    return KeyMissing(
        f"it is encrypted with the key {key}, which is not here",
        hint=f"`qmpsnap keys export --encryption FILE` on the host that has the key {key}, and "
        "`qmpsnap keys import FILE` here",
    )
