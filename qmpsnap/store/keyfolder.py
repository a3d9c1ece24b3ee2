"""The folder of the keys: the only place that makes it, locks it, and says whether it is safe."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qmpsnap import private
from qmpsnap.errors import KeyRefused, LocalFailed
from qmpsnap.store.files import sync_folder, told
from qmpsnap.store.keyfile import refuse_shared


@dataclass(frozen=True, slots=True)
class KeyFolder:
    """Raises KeyRefused for a folder that somebody else may write, LocalFailed."""

    path: Path

    def there(self, name: str = "") -> bool:
        """Whether it, or the file *name* in it, is there."""
        with told(self.path, LocalFailed):
            return os.path.lexists(self.path / name)

    def names(self) -> list[str]:
        """The files in it, by name; it is there, and safe."""
        self.check()
        with told(self.path, LocalFailed):
            return sorted(path.name for path in self.path.iterdir())

    def check(self) -> None:
        """It is there, and nobody else may write it."""
        with told(self.path, LocalFailed):
            found = self.path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise KeyRefused(f"{self.path}: is no folder", hint="the keys are to lie in it")
        refuse_shared(self.path, found, secret=False)

    def make(self) -> None:
        """It is there afterwards, for its owner only."""
        with told(self.path, LocalFailed):
            private.folders(self.path.parent)
            with suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
                self.path.chmod(0o700)  # a umask takes away from what is asked for
                sync_folder(self.path.parent)
        self.check()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time changes the keys; the lock ends with it, however that ends."""
        self.make()
        with told(self.path, LocalFailed):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
