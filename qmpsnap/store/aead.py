"""Authenticated encryption: the only place that knows its algorithms, and loads them when needed.

AES-256-GCM (NIST SP 800-38D) where each key and nonce serves once; AES-256-SIV (RFC 5297) where the
same bytes have to come out the same each time; HKDF-SHA-256 (RFC 5869) for keys of one purpose.
"""

from __future__ import annotations

from typing import Protocol

KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 12, 16
SIV_KEY_BYTES = 64


class NotOpened(Exception):
    """It is not what was encrypted with this key, for this place."""


class Once(Protocol):
    """AES-256-GCM: a nonce serves for one message."""

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes: ...
    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes: ...


class Same(Protocol):
    """AES-256-SIV: the same message becomes the same bytes."""

    def encrypt(self, data: bytes, associated_data: list[bytes] | None) -> bytes: ...
    def decrypt(self, data: bytes, associated_data: list[bytes] | None) -> bytes: ...


def derived(secret: bytes, purpose: bytes, *, salt: bytes | None = None, size: int) -> bytes:
    """The key of *size* bytes that *secret* gives for one *purpose*."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(hashes.SHA256(), size, salt, purpose).derive(secret)


def once(key: bytes) -> Once:
    """A cipher with *key*, of 32 bytes, for messages of a nonce each."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


def same(key: bytes) -> Same:
    """A cipher with *key*, of 64 bytes, for messages without a nonce. Any number of threads."""
    from cryptography.hazmat.primitives.ciphers.aead import AESSIV

    return AESSIV(key)


def opened_once(cipher: Once, nonce: bytes, data: bytes, bound: bytes) -> bytes:
    """What was encrypted, bound to *bound*. Raises NotOpened."""
    from cryptography.exceptions import InvalidTag

    try:
        return cipher.decrypt(nonce, data, bound)
    except (InvalidTag, ValueError) as odd:
        raise NotOpened("it was altered, or encrypted with another key") from odd


def opened_same(cipher: Same, data: bytes, bound: bytes) -> bytes:
    """What was encrypted, bound to *bound*. Raises NotOpened."""
    from cryptography.exceptions import InvalidTag

    try:
        return cipher.decrypt(data, [bound])
    except (InvalidTag, ValueError) as odd:
        raise NotOpened("it was altered, or encrypted with another key") from odd
