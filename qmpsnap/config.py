"""The configuration file, and the words for sizes and durations: the only place that reads them."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from qmpsnap.errors import UNREADABLE, ConfigError, UsageError
from qmpsnap.ids import is_vm_name

STORE_TIMEOUT = 30.0
LEASE = 600.0
SHIP_RETRY = 60.0
_LEASES = (10.0, 86400.0)
RAM_IMAGES = 1
_SYSTEM = Path("/etc/qmpsnap.toml")
_USER = Path("~/.config/qmpsnap.toml")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_LONGEST = 64  # characters of a figure: no more than a float can hold
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d|w)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
T = TypeVar("T", bound=msgspec.Struct)
Encrypt = Literal["none", "store", "all"]
"""What of snapshots is encrypted: nothing, all files of the store half, or copies of disks, too."""


class Vm(msgspec.Struct, frozen=True, kw_only=True):
    """The sockets of one VM; *ram_from*: other VMs whose RAM is not stored again for it.

    *encrypt*: what of its snapshots is encrypted; None: as for all VMs.
    """

    socket: Path
    agent_socket: Path | None = None
    ram_from: tuple[str, ...] = ()
    encrypt: Encrypt | None = None


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says. *store_timeout* in seconds; *path* is None when there is no file.

    *ram_images*: of how many snapshots of a VM the RAM is kept on the local root, too, its pages
    in *ram_images_in* if that is given. *lease* in seconds: how long a VM is this host's on the
    store; *ship_retry*: for how long a delivery that gets no further is tried again. *keys*: the
    folder of this host's keys. *encrypt*: what of snapshots is encrypted.
    """

    path: Path | None = None
    local: Path | None = None
    store: Path | None = None
    allow_local_store: bool = False
    store_timeout: float = STORE_TIMEOUT
    lease: float = LEASE
    ship_retry: float = SHIP_RETRY
    ram_images: int = RAM_IMAGES
    ram_images_in: Path | None = None
    keys: Path | None = None
    encrypt: Encrypt = "none"
    vms: Mapping[str, Vm] = {}


class _VmTable(msgspec.Struct, frozen=True):
    socket: str
    agent_socket: str | None = None
    ram_from: list[str] = []
    encrypt: Encrypt | None = None


class _File(msgspec.Struct, frozen=True):
    local: str | None = None
    store: str | None = None
    allow_local_store: bool = False
    store_timeout: str | None = None
    lease: str | None = None
    ship_retry: str | None = None
    ram_images: int = RAM_IMAGES
    ram_images_in: str | None = None
    keys: str | None = None
    encrypt: Encrypt = "none"
    vm: dict[str, dict[str, object]] = {}


def find(given: Path | None = None) -> Path | None:
    """The file to read: *given*, $QMPSNAP_CONFIG, or the first there is of the system's and ours.

    The first two have to be there, which `load` sees to.
    """
    if given is not None:
        return given
    if named := os.environ.get("QMPSNAP_CONFIG"):
        return Path(named)
    try:
        there = [path for path in (_SYSTEM, _USER.expanduser()) if path.is_file()]
    except (OSError, RuntimeError):  # a home that we may not look into, or none at all
        return None
    return there[0] if there else None


def load(given: Path | None = None) -> Config:
    """The configuration; an empty one without a file. Relative paths are relative to the file.

    Raises ConfigError, one line that names the file and the key.
    """
    path = find(given)
    if path is None:
        return Config()
    table = _read(path)
    file = _convert(path, table, _File, "")
    timeout = _seconds(path, "store_timeout", file.store_timeout, STORE_TIMEOUT)
    if timeout <= 0:
        raise ConfigError(f"{path}: store_timeout: has to be more than 0")
    lease = _seconds(path, "lease", file.lease, LEASE)
    if not _LEASES[0] <= lease <= _LEASES[1]:
        raise ConfigError(f"{path}: lease: has to be from 10s to 1d")
    if file.ram_images < 0:
        raise ConfigError(f"{path}: ram_images: has to be 0 or more")
    return Config(
        path=path,
        local=_path(path, file.local),
        store=_path(path, file.store),
        allow_local_store=file.allow_local_store,
        store_timeout=timeout,
        lease=lease,
        ship_retry=_seconds(path, "ship_retry", file.ship_retry, SHIP_RETRY),
        ram_images=file.ram_images,
        ram_images_in=_path(path, file.ram_images_in),
        keys=_path(path, file.keys),
        encrypt=file.encrypt,
        vms={name: _vm(path, name, words) for name, words in file.vm.items()},
    )


def duration(text: str) -> float:
    """Seconds of `200ms`, `3s`, `2m`, `1h`, `30d` or `4w`. Raises UsageError."""
    found = _DURATION.fullmatch(text.strip())
    if found is None or len(text) > _LONGEST:
        raise UsageError(f"not a duration: {text!r} (such as 200ms, 3s, 2m, 1h, 30d)")
    return float(found[1]) * _SECONDS[found[2]]


def size(text: str) -> int:
    """Bytes of `4096`, `512K`, `20M`, `1.5G` or `2T`, in powers of 1024. Raises UsageError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or len(text) > _LONGEST:
        raise UsageError(f"not a size: {text!r} (such as 512K, 20M, 1.5G)")
    return int(float(found[1]) * 1024 ** _POWERS[found[2].upper()])


def _seconds(path: Path, key: str, word: str | None, default: float) -> float:
    if word is None:
        return default
    try:
        return duration(word)
    except UsageError as odd:
        raise ConfigError(f"{path}: {key}: {odd}") from odd


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as failed:
        raise ConfigError(f"{path}: {failed.strerror}") from failed
    except UnicodeDecodeError as failed:
        raise ConfigError(f"{path}: is not UTF-8: {failed.reason}") from failed
    except UNREADABLE as failed:  # a number may also be too long
        raise ConfigError(f"{path}: {failed}") from failed


def _vm(path: Path, name: str, words: dict[str, object]) -> Vm:
    if not is_vm_name(name):
        raise ConfigError(f"{path}: vm.{name}: not a name for a VM")
    table = _convert(path, words, _VmTable, f"vm.{name}.")
    socket = _path(path, table.socket)
    assert socket is not None
    for other in table.ram_from:
        if not is_vm_name(other):
            raise ConfigError(f"{path}: vm.{name}.ram_from: not a name for a VM: {other!r}")
    return Vm(
        socket=socket,
        agent_socket=_path(path, table.agent_socket),
        ram_from=tuple(table.ram_from),
        encrypt=table.encrypt,
    )


def _convert(path: Path, table: dict[str, object], kind: type[T], prefix: str) -> T:
    known = kind.__struct_fields__
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            meant = f"did you mean `{close[0]}`?" if close else f"known are: {', '.join(known)}"
            raise ConfigError(f"{path}: unknown key `{prefix}{key}`", hint=meant)
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as odd:
        raise ConfigError(f"{path}: {_in_words(str(odd), table, prefix)}") from odd


def _in_words(told: str, table: dict[str, object], prefix: str) -> str:
    """msgspec's complaint, with the key in front: "Expected `str`, got `int` - at `$.local`"."""
    what, _, where = told.replace(" | null", "").partition(" - at `$")
    key = where.strip("`.")
    if key == "vm[...]":
        vms = table["vm"]
        odd = vms.items() if isinstance(vms, dict) else []
        key = next((f"vm.{name}" for name, one in odd if not isinstance(one, dict)), key)
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
        return f"{prefix}{missing[1]}: is missing"
    return f"{prefix}{key}: {what[:1].lower()}{what[1:]}"


def _path(file: Path, text: str | None) -> Path | None:
    if text is None:
        return None
    if "\0" in text:
        raise ConfigError(f"{file}: {text}: no path has a NUL in it")
    try:
        return file.absolute().parent / Path(text).expanduser()
    except RuntimeError as homeless:
        raise ConfigError(f"{file}: {text}: {homeless}") from homeless
