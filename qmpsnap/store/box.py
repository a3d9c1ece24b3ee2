"""An encrypted file: the only place that knows its bytes.

    0     8   QSNPBOX1
    8     8   version 1, algorithm 1: AES-256-GCM, its key by HKDF-SHA-256
    16    8   ID of the key that it is encrypted with
    24    32  salt, at random
    56    8   bytes of the role (2), zeros (2), bytes of a frame (4)
    64        role: VM, ID and name of the file, with zeros between
    ...       frames: 256 KiB encrypted, the last one less, and 16 bytes that authenticate each

Each file has a key of its own, derived from secret, salt and all of the header. A frame's nonce is
its number and whether it is the last: frames that were altered, left out, swapped, taken from
another file or cut off are refused, and nothing is given that was not authenticated before.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple, Protocol

from blake3 import blake3

from qmpsnap.errors import ManifestError, NotAuthentic
from qmpsnap.store import aead
from qmpsnap.store.aead import NotOpened
from qmpsnap.store.files import Progress, Side, opened, partial, sync_folder, told, write_all
from qmpsnap.store.secret import Keys, Secret

_HEAD = struct.Struct("<8sII8s32sHHI")
_NONCE = struct.Struct(">QI")
_MAGIC, _VERSION, _AES_256_GCM = b"QSNPBOX1", 1, 1
_PURPOSE = b"qmpsnap file, version 1\0"
_ROLE_MAX = 1024
FRAME = 256 << 10
"""Bytes that are encrypted at a time."""


class Source(Protocol):
    """What a box is read from: a file, or bytes."""

    def read(self, size: int, /) -> bytes | None: ...


class Role(NamedTuple):
    """What a file is for: in another place it is not accepted. *id* is empty for a shared one."""

    vm: str
    id: str
    name: str

    @property
    def spelled(self) -> bytes:
        return "\0".join(self).encode()


def is_box(content: bytes | memoryview) -> bool:
    """Whether *content* begins as an encrypted file does."""
    return bytes(content[: len(_MAGIC)]) == _MAGIC


def sealed(pieces: Iterable[bytes], secret: Secret, role: Role) -> Iterator[bytes]:
    """*pieces*, all but the last of `FRAME` bytes, encrypted: the header, then frames."""
    spelled = role.spelled
    head = _HEAD.pack(
        _MAGIC, _VERSION, _AES_256_GCM, bytes.fromhex(secret.key), os.urandom(32),
        len(spelled), 0, FRAME,
    ) + spelled  # fmt: skip
    yield head
    cipher, number, waiting = _cipher(secret, head), 0, None
    for piece in pieces:
        if waiting is not None:
            yield cipher.encrypt(_NONCE.pack(number, 0), waiting, _PURPOSE)
            number += 1
        waiting = piece
    yield cipher.encrypt(_NONCE.pack(number, 1), waiting or b"", _PURPOSE)


def sealed_bytes(content: bytes, secret: Secret, role: Role) -> bytes:
    """*content* as an encrypted file's."""
    return b"".join(sealed(_pieces(content), secret, role))


def seal(
    src: Path,
    dst: Path,
    secret: Secret,
    role: Role,
    *,
    side: Side,
    progress: Progress | None = None,
) -> tuple[int, str]:
    """Publish *src* at *dst*, encrypted: its size there, and its BLAKE3. Raises *side*."""
    hasher, size = blake3(), 0
    with opened(src, side) as reading, partial(dst, side) as writing:
        total = os.fstat(reading).st_size
        for piece in sealed(_frames(reading), secret, role):
            hasher.update(piece)
            write_all(writing, piece)
            size += len(piece)
            if progress is not None:
                progress(min(size, total), total, f"encrypting {src.name}")
    return size, hasher.hexdigest()


def seal_over(
    path: Path, secret: Secret, role: Role, *, side: Side, progress: Progress | None = None
) -> tuple[int, str]:
    """As `seal`, with the encrypted file in the place of *path*. Raises *side*."""
    fresh = path.with_name(f"{path.name}.{token_hex(8)}")
    try:
        done = seal(path, fresh, secret, role, side=side, progress=progress)
        with told(path, side):
            fresh.replace(path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
    return done


class Reader:
    """What is in the box that *source* gives, called *path* in messages; to be read once, in order.

    *role*, where it is known, is what it has to be for; *key* the one that it has to be encrypted
    with. Raises ManifestError for what is no such file, KeyMissing, NotAuthentic.
    """

    def __init__(
        self, source: Source, keys: Keys, path: Path, *, role: Role | None, key: str | None = None
    ) -> None:
        self._source, self._path, self._number = source, path, 0
        head = self._exactly(_HEAD.size)
        if len(head) < _HEAD.size or not is_box(head):
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
        spelled = self._exactly(length)
        self.key: str = named.hex()
        if key is not None and self.key != key:
            raise NotAuthentic(f"{path}: is encrypted with the key {self.key}, not with {key}")
        if role is not None and spelled != role.spelled:
            raise NotAuthentic(f"{path}: is the encrypted file of another place")
        self._cipher = _cipher(keys(self.key), head + spelled)
        self._next = self._exactly(FRAME + aead.TAG_BYTES)
        self._ready = memoryview(b"")
        self._over = False

    def read(self, size: int = -1) -> bytes:
        """Up to *size* bytes, all that is left if it is negative; none at the end only."""
        if size < 0:
            return b"".join(iter(lambda: self.read(FRAME), b""))
        while not self._ready and not self._over:
            self._ready = memoryview(self._frame())
        given, self._ready = self._ready[:size], self._ready[size:]
        return bytes(given)

    def _frame(self) -> bytes:
        content, self._next = self._next, self._exactly(FRAME + aead.TAG_BYTES)
        self._over = not self._next
        nonce = _NONCE.pack(self._number, int(self._over))
        self._number += 1
        try:
            return aead.opened_once(self._cipher, nonce, content, _PURPOSE)
        except NotOpened as odd:
            at = (self._number - 1) * FRAME
            raise NotAuthentic(f"{self._path}: cannot be decrypted from {at} on: {odd}") from odd

    def _exactly(self, size: int) -> bytes:
        parts, left = [], size
        while left and (part := self._source.read(left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


def _cipher(secret: Secret, head: bytes) -> aead.Once:
    salt = head[24:56]
    return aead.once(aead.derived(secret.content, _PURPOSE + head, salt=salt, size=aead.KEY_BYTES))


def _pieces(content: bytes) -> Iterator[bytes]:
    for at in range(0, len(content), FRAME):
        yield content[at : at + FRAME]


def _frames(descriptor: int) -> Iterator[bytes]:
    """The file in pieces of `FRAME` bytes. Raises OSError."""
    waiting = bytearray()
    while got := os.read(descriptor, FRAME - len(waiting)):
        waiting += got
        if len(waiting) == FRAME:
            yield bytes(waiting)
            waiting.clear()
    if waiting:
        yield bytes(waiting)
