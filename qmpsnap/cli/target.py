"""What the words of a command line mean: the VM with its sockets, the two roots, a snapshot."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qmpsnap.errors import UsageError

if TYPE_CHECKING:
    from qmpsnap.cli.render import Output
    from qmpsnap.config import Config
    from qmpsnap.engine.engine import Engine
    from qmpsnap.engine.machine import Machine
    from qmpsnap.engine.wishes import Copying
    from qmpsnap.hypervisor.machine.registry import Registered
    from qmpsnap.store.keyring import Keyring
    from qmpsnap.store.secretring import SecretRing

_ID = re.compile(r"\d{1,8}|\d{8}T\d{0,9}|\d{8}T\d{9}Z")
C = TypeVar("C", bound=StrEnum)


@dataclass(frozen=True)
class Call:
    """One call of the program: where it prints, and the options that all verbs share.

    *insecure*: the reasons for which a store half need not be trusted. *caught*: the signals that
    it was sent, in their order; the first one has cancelled it.
    """

    out: Output
    config: Path | None = None
    local: Path | None = None
    store: Path | None = None
    allow_local_store: bool = False
    socket: Path | None = None
    agent_socket: Path | None = None
    insecure: Sequence[str] | None = None
    caught: list[signal.Signals] = field(default_factory=list)

    @property
    def interrupted_code(self) -> int:
        """The exit code of a call that was cancelled."""
        return 130 if self.caught[:1] == [signal.SIGINT] else 143

    @cached_property
    def settings(self) -> Config:
        """The configuration. Raises ConfigError."""
        return configuration(self.config)

    def engine(self, *, roots: bool = True) -> Engine:
        """The engine between the two roots; some verbs can do without *roots*.

        Raises UsageError when one is asked for and not given, ConfigError.
        """
        from qmpsnap.engine.engine import Engine

        return Engine(
            self._root("local", self.local or self.settings.local, needed=roots),
            self._root("store", self.store or self.settings.store, needed=roots),
            allow_local_store=self.allow_local_store or self.settings.allow_local_store,
            store_within=self.settings.store_timeout,
            ram_images=self.settings.ram_images,
            ram_images_in=self.settings.ram_images_in,
            lease=self.settings.lease,
            ship_retry=self.settings.ship_retry,
            keys=self.settings.keys,
            insecure=self.insecure or (),
            report=self.out.progress,
        )

    def keyring(self) -> Keyring:
        """The keys of this host; the store is not asked for.

        Raises UsageError where nothing says in which folder they are, ConfigError, StoreRefused.
        """
        local = self.local or self.settings.local
        self._root("local", local, needed=self.settings.keys is None)
        return self.engine(roots=False).keys

    def machine(self, name: str, *, reach: bool = True) -> Machine:
        """The VM *name*: with --socket, from the configuration, or started by `qmpsnap run`.

        Raises VmUnknown when it is to be reached and nothing says where, UsageError, ConfigError.
        """
        from qmpsnap.engine.machine import Machine
        from qmpsnap.errors import VmUnknown

        Machine(name)  # a name that cannot be is told first
        qmp, agent = self.socket, self.agent_socket
        known = self.settings.vms.get(name)
        if qmp is None and known is not None:
            qmp, agent = known.socket, agent or known.agent_socket
        if qmp is None and (running := _registered(name)) is not None:
            qmp = Path(running.qmp)
            agent = agent or (Path(running.agent) if running.agent else None)
        if reach and qmp is None:
            raise VmUnknown(f"no VM {name!r} is known: where is its QMP socket?")
        return Machine(name, qmp.absolute() if qmp else None, agent.absolute() if agent else None)

    def ram_from(self, name: str, given: Sequence[str] | None) -> tuple[str, ...]:
        """The VMs whose RAM is not stored again for *name*: those *given*, or the configuration's.

        Raises UsageError for what is no name, ConfigError.
        """
        if given is None:
            known = self.settings.vms.get(name)
            return known.ram_from if known is not None else ()
        from qmpsnap.ids import is_vm_name

        for other in given:
            if not is_vm_name(other):
                raise UsageError(f"--ram-from: not a name for a VM: {other!r}")
        return tuple(given)

    def encrypt(self, name: str) -> str:
        """What of snapshots of *name* is encrypted, by the configuration. Raises ConfigError."""
        known = self.settings.vms.get(name)
        return (known.encrypt if known is not None else None) or self.settings.encrypt

    def secrets(self) -> SecretRing:
        """The keys of this host that files are encrypted with; raises as `keyring`."""
        local = self.local or self.settings.local
        self._root("local", local, needed=self.settings.keys is None)
        return self.engine(roots=False).secrets

    def _root(self, word: str, path: Path | None, *, needed: bool) -> Path:
        if path is None and needed:
            raise UsageError(
                f"no {word} root is given",
                hint=f'give --{word} DIR, or put `{word} = "DIR"` into the configuration',
            )
        from qmpsnap.engine.roots import NOWHERE

        return path or NOWHERE / word


def _registered(name: str) -> Registered | None:
    """The VM that `qmpsnap run` started under *name*, if it lives."""
    from qmpsnap.hypervisor.machine import registry

    try:
        return registry.find(name)
    except UsageError:
        return None  # no folder for sockets: nothing was ever started from here


def configuration(given: Path | None) -> Config:
    """The configuration file in use. Raises ConfigError."""
    from qmpsnap import config

    return config.load(given)


def snapshot(word: str) -> str:
    """*word*, if it may mean a snapshot. Raises UsageError."""
    if word != "latest" and not _ID.fullmatch(word):
        raise UsageError(
            f"not a snapshot ID: {word!r}",
            hint="an ID looks like 20261122T165057123Z; its beginning, or `latest`, will do",
        )
    return word


def choice(option: str, kind: type[C], word: str) -> C:
    """The member of *kind* that *word* spells. Raises UsageError, naming *option*."""
    try:
        return kind(word)
    except ValueError:
        raise UsageError(f"{option}: not one of {', '.join(kind)}: {word!r}") from None


def duration(option: str, word: str) -> float:
    """Seconds of *word*. Raises UsageError, naming *option*."""
    from qmpsnap import config

    try:
        return config.duration(word)
    except UsageError as odd:
        raise UsageError(f"{option}: {odd}") from odd


def copying(compress: bool, speed_limit: str | None) -> Copying:
    """How disks are copied. Raises UsageError."""
    from qmpsnap import config
    from qmpsnap.engine.wishes import Copying

    if speed_limit is None:
        return Copying(compress)
    try:
        limit = config.size(speed_limit)
    except UsageError as odd:
        raise UsageError(f"--speed-limit: {odd}") from odd
    if limit <= 0:
        raise UsageError("--speed-limit: at least 1 byte a second")
    return Copying(compress, limit)
