"""The file that a key is: the only place for its words, and for who may touch such a file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from qmpsnap.dialect import schema
from qmpsnap.errors import KeyRefused, ManifestError
from qmpsnap.store import signature
from qmpsnap.store.files import Side, opened
from qmpsnap.store.head import readable, version_of
from qmpsnap.store.secret import Secret, secret_of
from qmpsnap.store.signature import KeyId, PublicKey

_SIGNING_KEY, _PUBLIC_KEY = "qmpsnap-signing-key", "qmpsnap-public-key"
_ENCRYPTION_KEY = "qmpsnap-encryption-key"
_NEWEST = 1
_LIMIT = 64 << 10
_SHARED = stat.S_IWGRP | stat.S_IWOTH
_READ_BY_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_MOVE = "keep the keys in a folder of your own: `keys` of the configuration"

Words = Annotated[str, Meta(max_length=256)]


class Public(Struct, frozen=True, kw_only=True):
    """The public half of a key, as it is handed to another host. *host*: whose it is."""

    format: Literal["qmpsnap-public-key"] = "qmpsnap-public-key"
    version: Annotated[int, Meta(ge=1, le=1)] = 1
    algorithm: Literal["ed25519"] = "ed25519"
    key: KeyId
    public_key: PublicKey
    host: Words
    created_at: Words

    def __post_init__(self) -> None:
        _check(self)


class Signing(Struct, frozen=True, kw_only=True):
    """`signing.json`: the secret key, which never leaves this file and the process that signs."""

    format: Literal["qmpsnap-signing-key"] = "qmpsnap-signing-key"
    version: Annotated[int, Meta(ge=1, le=1)] = 1
    algorithm: Literal["ed25519"] = "ed25519"
    key: KeyId
    public_key: PublicKey
    host: Words
    created_at: Words
    secret_key: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]

    def __post_init__(self) -> None:
        _check(self)

    def __repr__(self) -> str:
        return f"Signing(key={self.key!r})"  # a traceback or a log shows no secret

    @property
    def public(self) -> Public:
        return Public(
            key=self.key, public_key=self.public_key, host=self.host, created_at=self.created_at
        )


class Encryption(Struct, frozen=True, kw_only=True):
    """`encryption.json`, `encryption-ID.json`: a secret key that snapshots are encrypted with.

    *host*: where it was made.
    """

    format: Literal["qmpsnap-encryption-key"] = "qmpsnap-encryption-key"
    version: Annotated[int, Meta(ge=1, le=1)] = 1
    algorithm: Literal["aes-256"] = "aes-256"
    key: KeyId
    host: Words
    created_at: Words
    secret_key: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]

    def __post_init__(self) -> None:
        _check_called(self.key, self.secret.key)
        _check_printed(self.host, self.created_at)

    def __repr__(self) -> str:
        return f"Encryption(key={self.key!r})"  # a traceback or a log shows no secret

    @property
    def secret(self) -> Secret:
        return secret_of(bytes.fromhex(self.secret_key))


T = TypeVar("T", Public, Signing, Encryption)
_KINDS = {Public: _PUBLIC_KEY, Signing: _SIGNING_KEY, Encryption: _ENCRYPTION_KEY}


def schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema of each file, by the word of its format."""
    return {word: schema(kind) for kind, word in _KINDS.items()}


def encode(key: Public | Signing | Encryption) -> bytes:
    """*key* as a file's content."""
    return msgspec.json.format(msgspec.json.encode(key), indent=2) + b"\n"


def read(path: Path, kind: type[T], *, side: Side) -> T:
    """The key in the file *path*. Raises KeyRefused (`refuse_shared`), ManifestError, *side*."""
    with opened(path, side) as descriptor:
        refuse_shared(path, os.fstat(descriptor), secret=kind is not Public)
        content = os.read(descriptor, _LIMIT)
    return decode(content, kind, path)


def decode(content: bytes, kind: type[T], path: Path) -> T:
    """The key that *content* is. Raises ManifestError, naming *path*; it shows no secret."""
    version_of(content, _KINDS[kind], _NEWEST, path)
    with readable(content, path):
        return msgspec.json.decode(content, type=kind)


def _check(key: Public | Signing) -> None:
    _check_called(key.key, signature.key_id(bytes.fromhex(key.public_key)))
    _check_printed(key.host, key.created_at)


def _check_called(name: str, real: str) -> None:
    if name != real:
        raise ValueError(f"the key is not the one that is called {name}")


def _check_printed(*words: str) -> None:
    # they are shown on a terminal, and may come from elsewhere
    if not all(word.isprintable() for word in words):
        raise ValueError("host and created_at are not words to be printed")


def refuse_shared(path: Path, found: os.stat_result, *, secret: bool) -> None:
    """Raises KeyRefused for what somebody else may write, or read where it is *secret*."""
    if found.st_uid not in {os.geteuid(), 0}:
        raise KeyRefused(
            f"{path}: belongs to the user {found.st_uid}", hint=f"chown it, or {_MOVE}"
        )
    if found.st_mode & _SHARED:
        raise KeyRefused(
            f"{path}: others may write it (mode {stat.S_IMODE(found.st_mode):04o})",
            hint=f"look whether it was altered; then `chmod go= {path}`",
        )
    if secret and found.st_mode & _READ_BY_OTHERS:
        raise KeyRefused(
            f"{path}: others may read the secret key (mode {stat.S_IMODE(found.st_mode):04o})",
            hint=f"`chmod 600 {path}`, then `qmpsnap keys rotate` if somebody may have read it",
        )


def is_secret(content: bytes) -> bool:
    """Whether *content* says that it is a key that encrypts."""
    try:
        version_of(content, _ENCRYPTION_KEY, _NEWEST, "")
    except ManifestError:
        return False
    return True


@contextmanager
def usable(path: Path) -> Iterator[None]:
    """What is wrong with a key that is used in the block becomes a ManifestError."""
    try:
        yield
    except ValueError as odd:
        raise ManifestError(f"{path}: is no key that can sign: {odd}") from odd
