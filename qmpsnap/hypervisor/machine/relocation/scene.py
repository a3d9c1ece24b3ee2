"""The only place that decides where a file of a relocated machine goes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qmpsnap.errors import Blocked
from qmpsnap.hypervisor.machine.cmdline import CommandLine

SOCKET_PATH = 107  # sockaddr_un.sun_path, without its last zero
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(slots=True)
class Scene:
    """One relocation at work: where from, where to, and what was decided on the way.

    *isolated*: no packet leaves the machine. *incoming*: a captured state will be loaded into it.
    *reads*: files and folders of this host that the machine opens where they are. *roms*: firmware
    that QEMU finds in a folder of its own. *secrets*: the file for each -object secret, by its id.
    *fetched*: files that are read, and will be under *into*.
    """

    line: CommandLine
    cwd: Path
    into: Path
    disks: Mapping[str, Path]
    agent: Path | None
    taken: set[str]
    notices: list[str] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    isolated: bool = False
    incoming: bool = False
    reads: list[str] = field(default_factory=list)
    roms: list[str] = field(default_factory=list)
    secrets: Mapping[str, Path] = field(default_factory=dict)
    fetched: frozenset[str] = frozenset()

    def note(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)

    def absolute(self, path: str) -> str:
        """*path*, which is read, as the original meant it, whatever directory we start in."""
        if not path:
            return path
        self.reads.append(self.spelled(path))
        return self.spelled(path)

    def made(self, path: str) -> str:
        """As `absolute`, for what QEMU makes when it is not there."""
        self.reads.append(str(Path(self.spelled(path)).parent))
        return self.spelled(path)

    def spelled(self, path: str) -> str:
        """As `absolute`, for what need not be there."""
        return str(self.cwd / path)  # `link/..` is not where the link is

    def image(self, name: str) -> str:
        """A block file name, absolute; one with a protocol (nbd:...) stays as it is."""
        if name.startswith("file:"):
            return self.absolute(name.removeprefix("file:"))
        if name.startswith("fat:"):
            options, _, folder = name.rpartition(":")
            return f"{options}:{self.absolute(folder)}"
        return name if _PROTOCOL.match(name) else self.absolute(name)

    def rom(self, name: str) -> str:
        """A firmware file: QEMU looks in its working directory first, then in its own folders."""
        if "/" in name or (self.cwd / name).exists():
            return self.absolute(name)
        self.roms.append(name)
        return name

    def move(self, path: str, *, to: Path | None = None) -> str:
        """The new place of a file that the machine writes: under `into`, or *to*."""
        old = self.spelled(path)
        if old not in self.moved:
            self.moved[old] = str(to) if to else self.fresh(Path(old).name)
        return self.moved[old]

    def move_socket(self, path: str, *, to: Path | None = None) -> str:
        """As `move`, for a unix socket. Raises Blocked when its new path is too long."""
        new = self.move(path, to=to)
        if len(os.fsencode(new)) > SOCKET_PATH:
            raise Blocked(
                f"{new}: a socket's path has at most {SOCKET_PATH} bytes",
                hint="restore to a directory with a shorter path",
            )
        return new

    def fresh(self, name: str) -> str:
        """A path under `into` that nothing else of this machine uses."""
        tried, number = self.into / name, 0
        while str(tried) in self.taken:
            number += 1
            tried = self.into / f"{name}.{number}"
        self.taken.add(str(tried))
        return str(tried)
