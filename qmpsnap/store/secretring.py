"""The secret keys that snapshots are encrypted with: the only place that makes and reads them.

In the folder of the keys `encryption.json` has the one that new snapshots are encrypted with;
`encryption-ID.json` is one that was used before, or that came from another host.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from qmpsnap.errors import KeyMissing, KeyRefused, LocalFailed, ManifestError
from qmpsnap.store import secret
from qmpsnap.store.files import publish, replace
from qmpsnap.store.keyfile import Encryption, encode, read
from qmpsnap.store.keyfolder import KeyFolder
from qmpsnap.store.keyring import Key, Role
from qmpsnap.store.secret import Secret, secret_of

CURRENT = "encryption.json"


class SecretRing:
    """The encryption keys in *folder*, of the *host* that is named in those that are made here.

    Any verb raises KeyRefused for a file that somebody else may read, or a folder that somebody
    else may write; ManifestError for what is no key; LocalFailed. A key that was read is kept in
    memory.
    """

    def __init__(self, folder: Path, host: str = "") -> None:
        self.folder, self.host = folder, host
        self._known: dict[str, Secret] = {}

    def current(self) -> Secret:
        """The key that new snapshots are encrypted with, made if there is none yet."""
        return self._kept(self._current()).secret

    def __call__(self, key: str) -> Secret:
        """The key called *key*. Raises KeyMissing besides."""
        if key not in self._known:
            for name in (f"encryption-{key}.json", CURRENT):
                if self._at.there(name) and (found := self._read(name)).key == key:
                    self._kept(found)
                    break
            else:
                raise secret.missing(key)
        return self._known[key]

    def has(self, key: str) -> bool:
        """Whether the key called *key* is here."""
        try:
            self(key)
        except KeyMissing:
            return False
        return True

    def known(self) -> list[Key]:
        """All keys, the one that encrypts first. Makes none."""
        if not self._at.there():
            return []
        found: dict[str, Key] = {}
        names = [one for one in self._at.names() if one.startswith("encryption-")]
        for name in [CURRENT, *names]:
            if name.endswith(".json") and self._at.there(name):
                one = self._read(name)
                if name not in {CURRENT, self._place(one.key).name}:
                    raise ManifestError(f"{self.folder / name}: has the key {one.key}")
                role: Role = "encrypts" if name == CURRENT else "decrypts"
                found.setdefault(one.key, self._shown(one, role))
        return list(found.values())

    def exported(self, to: Path, key: str | None = None) -> Key:
        """Write the key called *key*, or the one that encrypts, to the new file *to*, mode 0600.

        Raises KeyRefused when *to* is there, KeyMissing.
        """
        ours = self._current()
        if key is not None and key != ours.key:
            self(key)
            ours = self._read(f"encryption-{key}.json")
        if os.path.lexists(to):
            raise KeyRefused(f"{to}: is there already", hint="name a new file")
        publish(to, encode(ours), side=LocalFailed)
        return self._shown(ours, "encrypts", to)

    def imported(self, path: Path, *, dry_run: bool = False) -> Key:
        """Read with the key in the file *path*, too, which nobody else may read.

        Done twice is as good. Raises KeyRefused for what is no such key; nothing is changed then.
        """
        try:
            key = read(path, Encryption, side=LocalFailed)
        except (LocalFailed, ManifestError) as odd:
            raise KeyRefused(
                f"not an encryption key: {odd}", hint="`qmpsnap keys export --encryption` makes one"
            ) from odd
        known = next((one for one in self.known() if one.key == key.key), None)
        if known is None and not dry_run:
            with self._at.locked():
                publish(self._place(key.key), encode(key), side=LocalFailed)
        return known or self._shown(key, "decrypts")

    def rotate(self) -> tuple[Key, Key]:
        """Encrypt with a new key from now on; it, and the old one, which still decrypts."""
        self._current()
        with self._at.locked():
            old = self._read(CURRENT)
            # what the old one has encrypted can be read whenever this is broken off
            publish(self._place(old.key), encode(old), side=LocalFailed)
            new = self._made()
            replace(self.folder / CURRENT, encode(new), side=LocalFailed)
        return self._shown(new, "encrypts"), self._shown(old, "decrypts")

    @property
    def _at(self) -> KeyFolder:
        return KeyFolder(self.folder)

    def _current(self) -> Encryption:
        if not self._at.there(CURRENT):
            with self._at.locked():
                # another engine may have been faster: then its key is ours
                if not self._at.there(CURRENT):
                    publish(self.folder / CURRENT, encode(self._made()), side=LocalFailed)
        return self._read(CURRENT)

    def _made(self) -> Encryption:
        made = secret_of(os.urandom(32))
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return Encryption(
            key=made.key, host=self.host, created_at=now, secret_key=made.content.hex()
        )

    def _read(self, name: str) -> Encryption:
        self._at.check()
        return read(self.folder / name, Encryption, side=LocalFailed)

    def _kept(self, key: Encryption) -> Encryption:
        self._known[key.key] = key.secret
        return key

    def _place(self, key: str) -> Path:
        return self.folder / f"encryption-{key}.json"

    def _shown(self, key: Encryption, role: Role, path: Path | None = None) -> Key:
        place = self.folder / CURRENT if role == "encrypts" else self._place(key.key)
        return Key(
            key=key.key,
            role=role,
            host=key.host,
            created_at=key.created_at,
            fingerprint=secret.fingerprint(key.secret.content),
            path=str(path or place),
        )


@lru_cache(maxsize=16)
def ring(folder: Path, host: str = "") -> SecretRing:
    """The keys in *folder*: the same ones for all who ask in this process."""
    return SecretRing(folder, host)
