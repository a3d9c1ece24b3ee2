"""`manifest.sig`: the only place that signs a manifest, and that judges a signature.

It lies beside `manifest.json`, which it seals with: written before it, and once. What is signed are
the exact bytes of the manifest; all that this names by its digest is vouched for with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

from qmpsnap.dialect import schema
from qmpsnap.errors import Foreign, ManifestError, SignatureWrong, Unsigned
from qmpsnap.store import ed25519
from qmpsnap.store.head import readable, version_of
from qmpsnap.store.layout import MANIFEST

_FORMAT, _NEWEST = "qmpsnap-signature", 1
# what is signed with our keys for another purpose can never be taken for a manifest
_PURPOSE = b"qmpsnap manifest signature, version 1\0"

KeyId = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
PublicKey = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Reason = Literal["unsigned", "foreign"]
"""Why a manifest is not trusted; the caller may accept it by naming the reason."""
REASONS: tuple[Reason, ...] = ("unsigned", "foreign")


class Trust(Struct, frozen=True, kw_only=True):
    """The public *keys* that are trusted, in hexadecimal, and the reasons that are *accepted*."""

    keys: list[PublicKey] = []
    accepted: list[Reason] = []


class Signed(Struct, frozen=True, kw_only=True):
    """What is known of a manifest's signature. *key*: the ID of the key that made it.

    *accepted*: the manifest may be used, since the key is trusted, or the caller named the reason.
    """

    verdict: Literal["trusted", "unsigned", "foreign"]
    key: KeyId | None
    accepted: bool

    @property
    def words(self) -> str:
        """As a person reads it."""
        if self.verdict == "unsigned":
            return "it is not signed"
        trusted = "trusted" if self.verdict == "trusted" else "which is not trusted here"
        return f"it is signed with the key {self.key}, {trusted}"


class Signature(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`manifest.sig`. *key* is the ID of *public_key*; that it is one of ours is not said here."""

    format: Literal["qmpsnap-signature"] = "qmpsnap-signature"
    version: Annotated[int, Meta(ge=1, le=1)] = 1
    algorithm: Literal["ed25519"] = "ed25519"
    key: KeyId
    public_key: PublicKey
    signature: Annotated[str, Meta(pattern="^[0-9a-f]{128}$")]


def key_id(public: bytes) -> str:
    """What the key *public* is called: the first 16 digits of its BLAKE3."""
    return fingerprint(public)[:16]


def fingerprint(public: bytes) -> str:
    """The BLAKE3 of the key *public*, by which people compare two of them."""
    return blake3(public).hexdigest()


def made(manifest: bytes, secret: bytes) -> bytes:
    """The content of `manifest.sig` for the bytes of a *manifest*; the same ones each time."""
    public = ed25519.public_of(secret)
    signature = ed25519.sign(secret, _PURPOSE + manifest)
    return _encode(
        Signature(key=key_id(public), public_key=public.hex(), signature=signature.hex())
    )


def judged(manifest: bytes, content: bytes | None, trust: Trust, path: Path) -> Signed:
    """What *content*, that of the file *path* or None without one, says of the *manifest*.

    Raises SignatureWrong when they do not belong together, whoever has signed; ManifestError for
    what is no signature of ours, or one of a version that we do not know.
    """
    if content is None:
        return Signed(verdict="unsigned", key=None, accepted="unsigned" in trust.accepted)
    found = _decode(content, path)
    public = bytes.fromhex(found.public_key)
    if not ed25519.holds(public, bytes.fromhex(found.signature), _PURPOSE + manifest):
        raise SignatureWrong(
            f"{path.with_name(MANIFEST)}: is not what {path.name} beside it was made for: one of "
            "them was altered"
        )
    if found.public_key in trust.keys:
        return Signed(verdict="trusted", key=found.key, accepted=True)
    return Signed(verdict="foreign", key=found.key, accepted="foreign" in trust.accepted)


def checked(manifest: bytes, content: bytes | None, trust: Trust, path: Path) -> Signed:
    """As `judged`. Raises Unsigned and Foreign besides, unless the reason is accepted."""
    found = judged(manifest, content, trust, path)
    refuse(found, f"{path.parent}")
    return found


def refuse(signed: Signed | None, what: str) -> None:
    """Raises Unsigned or Foreign, naming *what*, unless it may be used; None was not asked for."""
    if signed is None or signed.accepted:
        return
    kind = Unsigned if signed.verdict == "unsigned" else Foreign
    raise kind(f"{what}: {signed.words}")


def reasons(words: Iterable[str]) -> tuple[Reason, ...]:
    """*words* as reasons, each once. Raises ValueError for one that is none."""
    return tuple(dict.fromkeys(map(_reason, words)))


def schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema of the file, by the word of its format."""
    return {_FORMAT: schema(Signature)}


def _reason(word: str) -> Reason:
    for one in REASONS:
        if word == one:
            return one
    raise ValueError(f"not one of {', '.join(REASONS)}: {word!r}")


def _encode(signature: Signature) -> bytes:
    return msgspec.json.format(msgspec.json.encode(signature), indent=2) + b"\n"


def _decode(content: bytes, path: Path) -> Signature:
    version_of(content, _FORMAT, _NEWEST, path)
    with readable(content, path):
        found = msgspec.json.decode(content, type=Signature)
    # one spelling only: nothing in the file can be altered, and the file be taken nevertheless
    if content != _encode(found) or found.key != key_id(bytes.fromhex(found.public_key)):
        raise ManifestError(f"{path}: is not as a signature of ours is written")
    return found
