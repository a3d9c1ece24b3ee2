"""Where a new group would be made, and what keeps us from it: the only place that decides this."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.errors import Blocked
from qmpsnap.host import bounds, cgroup, kernelfile
from qmpsnap.host.bounds import Bound
from qmpsnap.host.limits import GroupLimits
from qmpsnap.host.settings import Setting, settings

_PROC = Path("/proc")
# Where each field of the limits is set, v1 and v2: what a refusal names
_FILES = {
    "cpu_max_count": ("cpu", "cpu.cfs_quota_us", "cpu.max"),
    "memory_high_bytes": ("memory", "memory.high", "memory.high"),
    "memory_max_bytes": ("memory", "memory.limit_in_bytes", "memory.max"),
    "swap_max_bytes": ("memory", "memory.swap.max", "memory.swap.max"),
    "memory_and_swap_max_bytes": ("memory", "memory.memsw.limit_in_bytes", "memory.swap.max"),
    "pids_max_count": ("pids", "pids.max", "pids.max"),
    "cpus": ("cpuset", "cpuset.cpus", "cpuset.cpus"),
    "memory_nodes": ("cpuset", "cpuset.mems", "cpuset.mems"),
    "io_max": ("io", "blkio.throttle", "io.max"),
    "hugetlb_max_bytes": ("hugetlb", "hugetlb", "hugetlb"),
}


@dataclass(frozen=True, slots=True)
class Site:
    """A group that is not made yet.

    *parents*: the folder in which it would lie, for each v1 controller that it needs and "" for
    v2; *folders*: the same for all hierarchies, also those in which it needs nothing. *enable*: the
    v2 controllers that the parent does not hand down yet. *above*: the groups that it would lie
    in, all hierarchies, the nearest first. *troubles*: why it cannot be made,
    each naming controller and file; empty if it can.
    """

    parents: Mapping[str, Path]
    folders: Mapping[str, Path]
    settings: tuple[Setting, ...]
    enable: tuple[str, ...]
    above: tuple[Bound, ...]
    troubles: tuple[str, ...]

    @property
    def told(self) -> str:
        """The parents, as people look for them."""
        return ", ".join(sorted({str(one) for one in self.parents.values()}))


def site(
    limits: GroupLimits, parent: str | None = None, *, pid: int | None = None, proc: Path = _PROC
) -> Site:
    """A group with *limits* below the group *parent*, spelled as in /proc/PID/cgroup.

    Without *parent*, below our own (that of process *pid*): v1 has it there, v2 in the nearest
    group that has no processes and already hands the controllers down; nothing but a group of
    our own is changed then. With *parent* its `cgroup.subtree_control` may get more controllers.

    Raises Blocked when *parent* is no group, LocalFailed.
    """
    own = cgroup.folders_of(pid or os.getpid(), proc=proc)
    folders = own if parent is None else _named(parent, proc)
    first = {name for name in cgroup.controllers(proc=proc) if name and "=" not in name}
    wanted = settings(limits, first)
    troubles = [f"{one.controller}: {one.file}: {one.trouble}" for one in wanted if one.trouble]
    wanted = [one for one in wanted if not one.trouble]
    needed = {one.hierarchy for one in wanted}
    controllers = sorted({one.controller for one in wanted if not one.hierarchy})
    parents = {name: folders[name] for name in sorted(needed) if name in folders}
    for name in sorted(needed - set(folders)):
        told = parent or "our own group"
        kind = f"the v1 controller {name}" if name else f"v2, for {', '.join(controllers)}"
        troubles.append(f"{kind}: no folder of {told} is mounted here")
    enable: tuple[str, ...] = ()
    if "" in parents:
        second = parents[""] if parent is not None else _nearest(parents[""], controllers)
        parents[""] = second
        enable = tuple(
            name for name in controllers if name not in _words(second, "subtree_control")
        )
        troubles += _second(second, own.get(""), controllers, enable, named=parent is not None)
    wanted += _filled(parents, wanted)
    everywhere = own | parents
    above = tuple(bounds.bounds(everywhere))
    troubles += _permitted(parents)
    troubles += _above(limits, parents, first, above)
    if shutil.which("flock") is None:
        troubles.append("flock is missing: install the package util-linux")
    unique = tuple(dict.fromkeys(troubles))
    return Site(parents, everywhere, tuple(wanted), enable, above, unique)


def _named(parent: str, proc: Path) -> dict[str, Path]:
    if not parent.startswith("/") or ".." in Path(parent).parts:
        raise Blocked(f"not the path of a group: {parent!r}", hint="such as /vms: see cgroups(7)")
    found = cgroup.folders_at(parent, proc=proc)
    if not found:
        raise Blocked(
            f"there is no control group {parent} on this host",
            hint="its path is that of /proc/PID/cgroup, without /sys/fs/cgroup",
        )
    return found


def _nearest(own: Path, controllers: Collection[str]) -> Path:
    """The nearest group from *own* upwards that can have ours in it as it is, or *own*."""
    for folder in (own, *own.parents):
        if not (folder / "cgroup.procs").exists():
            break
        down = _words(folder, "subtree_control")
        if set(controllers) <= down and (_top(folder) or not _peopled(folder)):
            return folder
    return own


def _second(
    folder: Path,
    own: Path | None,
    controllers: Collection[str],
    enable: Collection[str],
    *,
    named: bool,
) -> Iterator[str]:
    there, file = _words(folder, "controllers"), folder / "cgroup.subtree_control"
    absent = [name for name in controllers if name not in there]
    for name in absent:
        yield f"{name}: not in {folder / 'cgroup.controllers'}"
    missing = [name for name in enable if name not in absent]
    if not missing:
        pass
    elif _peopled(folder) and not _top(folder):
        why = "the group has processes of its own, and v2 limits nothing below such a one"
        yield f"{', '.join(missing)}: {file}: {why}"
    elif not named:
        why = "does not hand it down; name the group with --limits-parent to have that changed"
        yield f"{', '.join(missing)}: {file} {why}"
    elif not os.access(file, os.W_OK, effective_ids=True):
        yield f"{', '.join(missing)}: {file}: not permitted"
    # a process moves only below a group whose cgroup.procs we may write: cgroups(7), delegation
    if own is not None:
        common = Path(os.path.commonpath([own, folder])) / "cgroup.procs"
        if not os.access(common, os.W_OK, effective_ids=True):
            yield f"{', '.join(controllers)}: {common}: not permitted"


def _permitted(parents: Mapping[str, Path]) -> Iterator[str]:
    for name, folder in parents.items():
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            yield f"{name or 'v2'}: {folder}: no group may be made here"


def _above(
    limits: GroupLimits,
    parents: Mapping[str, Path],
    first: Collection[str],
    above: Collection[Bound],
) -> Iterator[str]:
    for field, why in bounds.exceeded(limits, [*above]):
        controller, one, two = _FILES[field.split(".")[0]]
        old = "blkio" if controller == "io" else controller
        file = one if old in first else two
        yield f"{old if old in first else controller}: {file}: {why}"


def _filled(parents: Mapping[str, Path], wanted: Collection[Setting]) -> list[Setting]:
    """A new cpuset of v1 is empty, and takes no process before both of its lists are filled."""
    if "cpuset" not in parents:
        return []
    there = {one.file for one in wanted}
    found = []
    for file in ("cpuset.cpus", "cpuset.mems"):
        text = kernelfile.text(parents["cpuset"] / file)
        if file not in there and text:
            found.append(Setting("cpuset", "cpuset", file, text))
    return found


def _top(folder: Path) -> bool:
    return not (folder / "cgroup.type").exists()  # only the root of v2 has none


def _peopled(folder: Path) -> bool:
    return bool(kernelfile.text(folder / "cgroup.procs"))


def _words(folder: Path, file: str) -> frozenset[str]:
    return frozenset((kernelfile.text(folder / f"cgroup.{file}") or "").split())
