"""An encrypted file: the only place that knows its bytes.

    0         what it begins with (`store.envelope`), of the kind QSNPBOX1
    ...       frames: 256 KiB encrypted, the last one less, and 16 bytes that authenticate each

Each file has a key of its own. A frame's nonce is its number and whether it is the last: frames
that were altered, left out, swapped, taken from another file or cut off are refused, and nothing is
given that was not authenticated before.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Protocol

from blake3 import blake3

from qmpsnap.errors import NotAuthentic
from qmpsnap.store import aead
from qmpsnap.store.aead import NotOpened
from qmpsnap.store.envelope import FRAME as FRAME
from qmpsnap.store.envelope import Envelope, Kind
from qmpsnap.store.envelope import Role as Role
from qmpsnap.store.files import Progress, Side, opened, partial, sync_folder, told, write_all
from qmpsnap.store.secret import Keys, Secret

_NONCE = struct.Struct(">QI")
_BOX = Kind(b"QSNPBOX1", b"qmpsnap file, version 1\0")


class Source(Protocol):
    """What a box is read from: a file, or bytes."""

    def read(self, size: int, /) -> bytes | None: ...


def is_box(content: bytes | memoryview) -> bool:
    """Whether *content* begins as an encrypted file does."""
    return bytes(content[: len(_BOX.magic)]) == _BOX.magic


def sealed(pieces: Iterable[bytes], secret: Secret, role: Role) -> Iterator[bytes]:
    """*pieces*, all but the last of `FRAME` bytes, encrypted: the header, then frames."""
    head = Envelope.made(_BOX, secret, role)
    yield head.content
    cipher, number, waiting = head.cipher(lambda _: secret), 0, None
    for piece in pieces:
        if waiting is not None:
            yield cipher.encrypt(_NONCE.pack(number, 0), waiting, _BOX.purpose)
            number += 1
        waiting = piece
    yield cipher.encrypt(_NONCE.pack(number, 1), waiting or b"", _BOX.purpose)


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
        head = Envelope.read(_BOX, self._exactly, path)
        head.expect(path, role, key)
        self.key = head.key
        self._cipher = head.cipher(keys)
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
            return aead.opened_once(self._cipher, nonce, content, _BOX.purpose)
        except NotOpened as odd:
            at = (self._number - 1) * FRAME
            raise NotAuthentic(f"{self._path}: cannot be decrypted from {at} on: {odd}") from odd

    def _exactly(self, size: int) -> bytes:
        parts, left = [], size
        while left and (part := self._source.read(left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


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
