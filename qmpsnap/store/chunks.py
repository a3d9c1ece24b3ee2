"""What a chunk of RAM is called, and stored as: the only place that knows, encrypted or not.

In the clear a chunk is called by its BLAKE3, and stored as a frame of zstd. With a key it is called
by its keyed BLAKE3, and the frame is encrypted (AES-256-SIV), bound to that name: the same chunk
has one name and the same bytes wherever the same key is used, and others than those in the clear.
"""

from __future__ import annotations

from typing import Protocol

from blake3 import blake3

from qmpsnap.errors import DigestMismatch
from qmpsnap.store import aead
from qmpsnap.store.aead import NotOpened
from qmpsnap.store.pack import Content, content_of, frame_of
from qmpsnap.store.secret import Keys, Secret

_NAMES = b"qmpsnap chunks, names, version 1"
_FRAMES = b"qmpsnap chunks, frames, version 1"


class Chunks(Protocol):
    """Any number of threads at once."""

    @property
    def key(self) -> str | None:
        """The ID of the key that it takes; None in the clear."""

    def digest(self, content: Content) -> bytes:
        """What the chunk *content* is called, 32 bytes."""

    def frame(self, content: Content, digest: bytes) -> bytes:
        """What the chunk, which is called *digest*, is stored as."""

    def content(self, frame: Content, digest: bytes, raw: int) -> bytes:
        """The chunk *digest*, of *raw* bytes, out of its *frame*. Raises DigestMismatch."""


class Plain:
    """Chunks in the clear."""

    key: str | None = None

    def digest(self, content: Content) -> bytes:
        return blake3(content).digest()

    def frame(self, content: Content, digest: bytes) -> bytes:
        return frame_of(content)

    def content(self, frame: Content, digest: bytes, raw: int) -> bytes:
        chunk = content_of(frame, raw)
        if self.digest(chunk) != digest:
            raise DigestMismatch("is another chunk (BLAKE3)")
        return chunk


class Encrypted:
    """Chunks that are encrypted with *secret*."""

    def __init__(self, secret: Secret) -> None:
        self.key: str | None = secret.key
        self._name = aead.derived(secret.content, _NAMES, size=aead.KEY_BYTES)
        keys = aead.derived(secret.content, _FRAMES, size=aead.SIV_KEY_BYTES)
        self._cipher = aead.same(keys)

    def digest(self, content: Content) -> bytes:
        return blake3(content, key=self._name).digest()

    def frame(self, content: Content, digest: bytes) -> bytes:
        return self._cipher.encrypt(frame_of(content), [_FRAMES + digest])

    def content(self, frame: Content, digest: bytes, raw: int) -> bytes:
        try:
            packed = aead.opened_same(self._cipher, bytes(frame), _FRAMES + digest)
        except NotOpened as odd:
            raise DigestMismatch(f"cannot be decrypted: {odd}") from odd
        chunk = content_of(packed, raw)
        if self.digest(chunk) != digest:
            raise DigestMismatch("is another chunk (BLAKE3)")
        return chunk


PLAIN = Plain()


def chunks_of(key: str | None, keys: Keys) -> Chunks:
    """Those of the key called *key*; None: in the clear. Raises KeyMissing."""
    return PLAIN if key is None else Encrypted(keys(key))
