"""Control groups: the only place that finds a process' groups and those above them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from qmpsnap.errors import LocalFailed
from qmpsnap.host import counters, limits
from qmpsnap.host.counters import GroupFigures
from qmpsnap.host.limits import GroupLimits

_PROC = Path("/proc")
_ROW = re.compile(r"\S+ \S+ \S+ (\S+) (\S+) .*? - (\S+) \S* (.*)")
"""Of a mount table: root, point, type and options of the file system (proc(5))."""


class Ancestor(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one group above; *hierarchy* names the v1 controllers, and is "" for v2."""

    hierarchy: str
    path: str
    limits: GroupLimits


class CgroupUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The groups of a process. *version*: what the host has mounted of the two kinds.

    *groups* maps a v1 controller (or "" for v2) to the group's path in its hierarchy. *ancestors*
    go from the nearest upwards, as far as they can be seen from here.
    """

    version: Literal["v1", "v2", "hybrid"] | None
    groups: dict[str, str]
    limits: GroupLimits
    figures: GroupFigures
    ancestors: list[Ancestor]


@dataclass(frozen=True, slots=True)
class _Hierarchy:
    """A mounted hierarchy: *path* and *folder* of the process' group, *depth* below the top."""

    controllers: tuple[str, ...]
    path: str
    folder: Path
    depth: int


def usage(pid: int, *, proc: Path = _PROC) -> CgroupUsage:
    """The groups of process *pid*, v1, v2 or both. Raises LocalFailed when it is gone."""
    groups, table = groups_of(pid, proc=proc), _table(proc)
    mounted = set(_mounts(table))
    found = _hierarchies(table, groups)
    folders = {name: one.folder for one in found for name in one.controllers}
    return CgroupUsage(
        version=_version({names for _, _, names in mounted}),
        groups=groups,
        limits=limits.limits(folders),
        figures=counters.figures(folders),
        ancestors=[above for one in found for above in _above(one)],
    )


def groups_of(pid: int, *, proc: Path = _PROC) -> dict[str, str]:
    """The group of process *pid* for each v1 controller, and for "" (v2). Raises LocalFailed."""
    try:
        text = (proc / str(pid) / "cgroup").read_text(errors="surrogateescape")
    except OSError as failed:
        raise LocalFailed(f"process {pid}: {failed.strerror}") from failed
    # `4:memory:/machine` and `0::/machine`; v1 controllers mounted together share a line
    fields = [line.split(":", 2) for line in text.splitlines() if line.count(":") > 1]
    return {name: path for _, names, path in fields for name in names.split(",")}


def folders_of(pid: int, *, proc: Path = _PROC) -> dict[str, Path]:
    """Where the groups of process *pid* lie, by controller ("" for v2). Raises LocalFailed."""
    found = _hierarchies(_table(proc), groups_of(pid, proc=proc))
    return {name: one.folder for one in found for name in one.controllers}


def folders_at(group: str, *, proc: Path = _PROC) -> dict[str, Path]:
    """Where *group* lies in each hierarchy that has it, as `folders_of`. Raises LocalFailed."""
    table = _table(proc)
    found = _hierarchies(table, dict.fromkeys(controllers(proc=proc), group))
    return {name: one.folder for one in found if one.folder.is_dir() for name in one.controllers}


def controllers(*, proc: Path = _PROC) -> set[str]:
    """What is mounted of v1, by controller, and "" for v2. Raises LocalFailed."""
    return {name for _, _, words in _mounts(_table(proc)) for name in words}


def _table(proc: Path) -> str:
    try:
        return (proc / "self" / "mountinfo").read_text(errors="surrogateescape")
    except OSError as failed:
        raise LocalFailed(f"the mount table cannot be read: {failed.strerror}") from failed


def _mounts(table: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Root, point and controllers of each mounted hierarchy."""
    for line in table.splitlines():
        row = _ROW.fullmatch(line)
        if row is None:
            continue
        root, point, fstype, options = map(_plain, row.groups())
        if fstype == "cgroup2":
            yield root, point, ("",)
        elif fstype == "cgroup":
            words = tuple(word for word in options.split(",") if word not in {"rw", "ro"})
            yield root, point, words


def _plain(field: str) -> str:
    # the table writes a blank in a path as \040
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _version(kinds: set[tuple[str, ...]]) -> Literal["v1", "v2", "hybrid"] | None:
    two = ("",) in kinds
    one = any(names != ("",) for names in kinds)
    return "hybrid" if one and two else "v2" if two else "v1" if one else None


def _hierarchies(table: str, groups: dict[str, str]) -> list[_Hierarchy]:
    found: dict[tuple[str, ...], _Hierarchy] = {}
    for root, point, words in _mounts(table):
        names = tuple(word for word in words if word in groups)
        path = groups[names[0]] if names else ".."
        group = Path(path)
        # a group above the mounted part (of another namespace) cannot be looked at
        if ".." not in group.parts and group.is_relative_to(root):
            below = group.relative_to(root)
            found[names] = _Hierarchy(names, path, Path(point) / below, len(below.parts))
    return list(found.values())


def _above(one: _Hierarchy) -> Iterator[Ancestor]:
    path, folder = Path(one.path), one.folder
    for _ in range(one.depth):
        path, folder = path.parent, folder.parent
        yield Ancestor(
            hierarchy=",".join(one.controllers),
            path=str(path),
            limits=limits.limits(dict.fromkeys(one.controllers, folder)),
        )
