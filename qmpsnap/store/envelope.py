"""What an encrypted file begins with: the only place that knows whose key it needs, and which place
it is for.

    0     8   the magic of its kind
    8     8   version 1, algorithm 1: AES-256-GCM, its key by HKDF-SHA-256
    16    8   ID of the key that it is encrypted with
    24    32  salt, at random
    56    8   bytes of the role (2), zeros (2), bytes of a frame (4)
    64        role: VM, ID and name of the file, with zeros between

Each file has a key of its own, derived from secret, salt and all of this.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from qmpsnap.errors import ManifestError, NotAuthentic
from qmpsnap.store import aead
from qmpsnap.store.secret import Keys, Secret

_HEAD = struct.Struct("<8sII8s32sHHI")
_VERSION, _AES_256_GCM = 1, 1
_SALT = slice(24, 56)
_ROLE_MAX = 1024
FRAME = 256 << 10
"""Bytes that are encrypted at a time."""


class Kind(NamedTuple):
    """A kind of encrypted file: its *magic*, and the *purpose* of its keys."""

    magic: bytes
    purpose: bytes


class Role(NamedTuple):
    """What a file is for: in another place it is not accepted. *id* is empty for a shared one."""

    vm: str
    id: str
    name: str

    @property
    def spelled(self) -> bytes:
        return "\0".join(self).encode()


@dataclass(frozen=True, slots=True)
class Envelope:
    """The first bytes of an encrypted file, which needs the key called *key*."""

    kind: Kind
    key: str
    content: bytes
    """All of them; what follows begins behind."""

    @classmethod
    def made(cls, kind: Kind, secret: Secret, role: Role) -> Self:
        """A new one, with a salt of its own."""
        spelled = role.spelled
        head = _HEAD.pack(
            kind.magic, _VERSION, _AES_256_GCM, bytes.fromhex(secret.key), os.urandom(32),
            len(spelled), 0, FRAME,
        )  # fmt: skip
        return cls(kind, secret.key, head + spelled)

    @classmethod
    def read(cls, kind: Kind, exactly: Callable[[int], bytes], path: Path) -> Self:
        """What *exactly* gives, called with how many bytes are wanted next; fewer at the end.

        Raises ManifestError, naming *path*, for what is no file of that kind that we know.
        """
        head = exactly(_HEAD.size)
        if len(head) < _HEAD.size or not head.startswith(kind.magic):
            raise ManifestError(f"{path}: is not encrypted, and should be")
        _, version, algorithm, named, _, length, zeros, frame = _HEAD.unpack(head)
        if (version, algorithm) != (_VERSION, _AES_256_GCM):
            raise ManifestError(
                f"{path}: is encrypted in version {version}, algorithm {algorithm}; this qmpsnap "
                f"knows {_VERSION} and {_AES_256_GCM}",
                hint="use the qmpsnap that wrote it, or a newer one",
            )
        if zeros or frame != FRAME or length > _ROLE_MAX:
            raise ManifestError(f"{path}: is not as an encrypted file of ours is written")
        return cls(kind, named.hex(), head + exactly(length))

    def expect(self, path: Path, role: Role | None, key: str | None) -> None:
        """Raises NotAuthentic for another *role* or *key* than those; None: whichever."""
        if key is not None and self.key != key:
            raise NotAuthentic(f"{path}: is encrypted with the key {self.key}, not with {key}")
        if role is not None and self.content[_HEAD.size :] != role.spelled:
            raise NotAuthentic(f"{path}: is the encrypted file of another place")

    def cipher(self, keys: Keys) -> aead.Once:
        """What encrypts and decrypts this file alone. Raises KeyMissing."""
        secret = keys(self.key)
        purpose = self.kind.purpose + self.content
        salt = self.content[_SALT]
        return aead.once(aead.derived(secret.content, purpose, salt=salt, size=aead.KEY_BYTES))
