"""The only place that finds the swtpm behind a socket, and reads what it keeps on disk."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qmpsnap.errors import LocalFailed
from qmpsnap.host import process

_STATE = re.compile(r"tpm2?-00\.(permall|savestate|volatilestate)")
_LINEAR = "state"  # what we call the one file of the back end `file`
_LIMIT = 16 << 20  # bytes: a state is some KiB
_TRIES = 5
_KEYS = ("key", "migration-key")

Stamp = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class Swtpm:
    """A swtpm at work. *place* is its folder, or the one file of the back end `file`.

    *keys*: the option and its value of each key that it was given, paths absolute.
    """

    pid: int
    tpm2: bool
    backend: Literal["dir", "file"]
    place: Path
    keys: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class State:
    """The files of a state by their names, and by what another look tells whether they are new."""

    content: dict[str, bytes]
    stamps: dict[str, Stamp]


def behind(socket: Path) -> Swtpm:
    """The swtpm that listens at *socket*. Raises LocalFailed, saying why it cannot be told."""
    pid = process.find_owner(socket)
    if pid is None:
        raise LocalFailed(f"no process that we may see listens at {socket}")
    facts = process.describe(pid)
    if not facts.name.startswith("swtpm") or not facts.argv or facts.cwd is None:
        raise LocalFailed(f"{socket}: {facts.name} (process {pid}) is no swtpm that we may look at")
    options = list(_options(facts.argv[1:]))
    given = dict(options)
    cwd = Path(facts.cwd)
    backend, place = _place(given.get("tpmstate", ""), _environment(pid).get("TPM_PATH"), cwd)
    keys = tuple((name, _absolute(value, cwd)) for name, value in options if name in _KEYS)
    return Swtpm(pid, "tpm2" in given, backend, place, keys)


def read(swtpm: Swtpm) -> State:
    """What is on disk now: of one moment, as a state is replaced whole. Raises LocalFailed."""
    for _ in range(_TRIES):
        try:
            before = stamps(swtpm)
            content = {name: _content(path) for name, path in _files(swtpm)}
            if stamps(swtpm) == before:
                return State(content, before)
        except FileNotFoundError:
            continue  # replaced just now
        except OSError as failed:
            raise LocalFailed(f"{failed.filename}: {failed.strerror}") from failed
    raise LocalFailed(f"{swtpm.place}: is being written all the time")


def stamps(swtpm: Swtpm) -> dict[str, Stamp]:
    """What tells that a file of the state was written since. Raises OSError."""
    found = {}
    for name, path in _files(swtpm):
        it = path.stat()
        found[name] = (it.st_dev, it.st_ino, it.st_size, it.st_mtime_ns, it.st_ctime_ns)
    return found


def _files(swtpm: Swtpm) -> list[tuple[str, Path]]:
    if swtpm.backend == "file":
        return [(_LINEAR, swtpm.place)]
    names = sorted(path.name for path in swtpm.place.iterdir())
    return [(name, swtpm.place / name) for name in names if _STATE.fullmatch(name)]


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(_LIMIT + 1)
    if len(content) > _LIMIT:
        raise LocalFailed(f"{path}: is larger than the state of a TPM")
    return content


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and value of the long options; of one that is no `--name=value`, the next word."""
    for index, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            following = words[index + 1] if index + 1 < len(words) else ""
            yield name, value if equals else "" if following.startswith("-") else following


def _place(option: str, variable: str | None, cwd: Path) -> tuple[Literal["dir", "file"], Path]:
    fields = _fields(option)
    uri = fields.get("backend-uri", "")
    if uri.startswith("file://"):
        return "file", cwd / uri.removeprefix("file://")
    where = uri.removeprefix("dir://") or fields.get("dir") or variable
    if not where:
        raise LocalFailed("swtpm was not told where its state is")
    return "dir", cwd / where


def _fields(option: str) -> dict[str, str]:
    return {key: value for key, _, value in (word.partition("=") for word in option.split(","))}


def _absolute(option: str, cwd: Path) -> str:
    fields = _fields(option)
    for name in ("file", "pwdfile"):
        if name in fields:
            fields[name] = os.path.normpath(cwd / fields[name])
    fields.pop("remove", None)
    return ",".join(f"{key}={value}" for key, value in fields.items())


def _environment(pid: int) -> dict[str, str]:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return {os.fsdecode(k): os.fsdecode(v) for k, _, v in (word.partition(b"=") for word in words)}
