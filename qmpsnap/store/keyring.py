"""The keys of this host: the only place that makes, reads, and replaces them.

In their folder `signing.json` has the one secret key that signs now; `retired-ID.json` the public
half of one that did, `imported-ID.json` that of another host. What is in the folder is trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from msgspec import Struct

from qmpsnap.errors import KeyRefused, LocalFailed, ManifestError
from qmpsnap.store import ed25519, signature
from qmpsnap.store.files import publish, replace, sync_folder, told
from qmpsnap.store.keyfile import (
    Public,
    Signing,
    decode,
    encode,
    read,
    usable,
)
from qmpsnap.store.keyfolder import KeyFolder
from qmpsnap.store.signature import KeyId, Reason, Trust

SIGNING = "signing.json"
Role = Literal["signs", "retired", "imported", "encrypts", "decrypts"]
Trusting = Callable[[], Trust]
"""Tells what is trusted now: a key may have been imported since."""


class Key(Struct, frozen=True, kw_only=True):
    """A key as `keys` shows it. *fingerprint*: the whole BLAKE3 that *key* is the beginning of."""

    key: KeyId
    role: Role
    host: str
    created_at: str
    fingerprint: str
    path: str


@dataclass(frozen=True, slots=True)
class Keyring:
    """The keys in *folder*, of the *host* that is named in those that are made here.

    Any verb raises KeyRefused for a file or a folder that somebody else may write, or a secret key
    that somebody else may read; ManifestError for one that is no key; LocalFailed.
    """

    folder: Path
    host: str

    def trust(self, accepted: Collection[Reason] = ()) -> Trust:
        """The public keys of all that is in the folder. Makes none."""
        keys = dict.fromkeys(one.public_key for _, one in self._all())
        return Trust(keys=list(keys), accepted=list(accepted))

    def ready(self) -> str:
        """Make the key that signs, if there is none yet; its ID. Raises as the class says."""
        return self._signing().key

    def sign(self, manifest: bytes) -> bytes:
        """The content of `manifest.sig` for the bytes of a *manifest*."""
        key = self._signing()
        with usable(self.folder / SIGNING):
            return signature.made(manifest, bytes.fromhex(key.secret_key))

    def known(self) -> list[Key]:
        """All keys: the one that signs first, then those that are retired, then the imported."""
        found: dict[str, Key] = {}
        for role, one in self._all():
            found.setdefault(one.key, self._shown(role, one))
        return list(found.values())

    def public(self) -> Public:
        """The public half of the key that signs, made if there is none yet."""
        return self._signing().public

    def imported(self, content: bytes, path: Path, *, dry_run: bool = False) -> Key:
        """Trust the public key that *content* is, from the file *path*; done twice is as good.

        Raises KeyRefused for what is no public key; nothing is changed then.
        """
        try:
            key = decode(content, Public, path)
        except ManifestError as odd:
            raise KeyRefused(
                f"not a public key: {odd}", hint="`qmpsnap keys export` writes one"
            ) from odd
        known = next((one for one in self.known() if one.key == key.key), None)
        if known is not None or dry_run:
            return known or self._shown("imported", key)
        with self._at.locked():
            publish(self._place("imported", key.key), encode(key), side=LocalFailed)
        return self._shown("imported", key)

    def rotate(self) -> tuple[Key, Key]:
        """Sign with a new key from now on; it, and the old one, which stays trusted."""
        self.ready()
        with self._at.locked():
            old = self._read_signing()
            # what the old one has signed is trusted whenever this is broken off
            publish(self._place("retired", old.key), encode(old.public), side=LocalFailed)
            new = self._made()
            replace(self.folder / SIGNING, encode(new), side=LocalFailed)
        return self._shown("signs", new.public), self._shown("retired", old.public)

    def forget(self, word: str, *, dry_run: bool = False) -> Key:
        """Trust a key no more: its ID, or a unique beginning of it.

        Raises KeyRefused for the one that signs, and when *word* means no single key.
        """
        found = [one for one in self.known() if word and one.key.startswith(word)]
        if len(found) != 1:
            many = ", ".join(one.key for one in found) or "none"
            raise KeyRefused(
                f"{word!r} means no single key: {many}", hint="see `qmpsnap keys show`"
            )
        (key,) = found
        if key.role == "signs":
            raise KeyRefused(
                f"{key.key} is the key that signs", hint="`qmpsnap keys rotate` retires it first"
            )
        if not dry_run:
            with self._at.locked(), told(self.folder, LocalFailed):
                for role in ("retired", "imported"):
                    self._place(role, key.key).unlink(missing_ok=True)
                sync_folder(self.folder)
        return key

    def _signing(self) -> Signing:
        if self._at.there(SIGNING):
            return self._read_signing()
        self._at.make()
        with self._at.locked():
            # another engine may have been faster: then its key is ours
            if not self._at.there(SIGNING):
                publish(self.folder / SIGNING, encode(self._made()), side=LocalFailed)
            return self._read_signing()

    def _made(self) -> Signing:
        secret = ed25519.generated()
        public = ed25519.public_of(secret)
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return Signing(
            key=signature.key_id(public),
            public_key=public.hex(),
            host=self.host,
            created_at=now,
            secret_key=secret.hex(),
        )

    def _all(self) -> Iterator[tuple[Role, Public]]:
        """Each key with its role; one that is retired while it still signs comes twice."""
        if not self._at.there():
            return
        self._at.check()
        # before the names: what a rotation retires meanwhile is either this, or among them
        if self._at.there(SIGNING):
            yield "signs", self._read_signing().public
        names = self._at.names()
        roles: tuple[Role, ...] = ("retired", "imported")
        for role in roles:
            for name in names:
                if name.startswith(f"{role}-") and name.endswith(".json"):
                    key = read(self.folder / name, Public, side=LocalFailed)
                    if name != self._place(role, key.key).name:
                        raise ManifestError(f"{self.folder / name}: has the key {key.key}")
                    yield role, key

    def _read_signing(self) -> Signing:
        self._at.check()
        return read(self.folder / SIGNING, Signing, side=LocalFailed)

    @property
    def _at(self) -> KeyFolder:
        return KeyFolder(self.folder)

    def _place(self, role: str, key: str) -> Path:
        return self.folder / f"{role}-{key}.json"

    def _shown(self, role: Role, key: Public) -> Key:
        path = self.folder / SIGNING if role == "signs" else self._place(role, key.key)
        return Key(
            key=key.key,
            role=role,
            host=key.host,
            created_at=key.created_at,
            fingerprint=signature.fingerprint(bytes.fromhex(key.public_key)),
            path=str(path),
        )
