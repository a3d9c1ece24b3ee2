"""Ed25519 (RFC 8032): the only place that speaks it; `cryptography` is loaded when it is needed."""

from __future__ import annotations

ALGORITHM = "ed25519"
SECRET_BYTES, PUBLIC_BYTES, SIGNATURE_BYTES = 32, 32, 64


def generated() -> bytes:
    """A new secret key, 32 bytes from the system's source of randomness."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.Raw,
        serialization.PrivateFormat.Raw,
        serialization.NoEncryption(),
    )


def public_of(secret: bytes) -> bytes:
    """The public key, 32 bytes, that belongs to *secret*. Raises ValueError for no such key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(secret).public_key()
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def sign(secret: bytes, message: bytes) -> bytes:
    """The signature of *message*, 64 bytes, always the same. Raises ValueError for no such key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(secret).sign(message)


def holds(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether *signature* is that of *message* by the key *public*, which may be any 32 bytes."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
