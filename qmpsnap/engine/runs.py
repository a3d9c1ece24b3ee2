"""Which images can go up into which: a pure function from points and what stands on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from qmpsnap.store.points import Points


@dataclass(frozen=True, slots=True)
class Run:
    """On disk *label*, *top* takes in the images of *expired*, nearest first, and stands on
    *beneath* then, or on nothing."""

    label: str
    top: str
    expired: tuple[str, ...]
    beneath: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """*stuck*: the expired points whose images have to stay, and why."""

    runs: list[Run]
    stuck: dict[str, str]

    def into(self, name: str) -> list[str]:
        """The points that take in the images of the expired point *name*."""
        return sorted({run.top for run in self.runs if name in run.expired})


def plan(points: Points, expired: Collection[str], standing: Mapping[str, str]) -> Plan:
    """What to merge so that as many as possible of the *expired* points are needed no more.

    An expired point goes only if one other point stands on it, on each disk that it is needed for.
    *standing*: the points that have to stay as they are, since restored machines stand on them or
    nobody here can read them, and what to say of it. While a point
    cannot be read, none goes: it may stand on any of them.
    """
    if points.damaged:
        told = "; ".join(f"what {name} stands on cannot be read" for name in points.damaged)
        return Plan([], dict.fromkeys(expired, told))
    needed = points.needed({point.name for point in points} - set(expired))
    going = [name for name in points.by_name if name in needed and name in expired]
    successors = _successors(points, needed)
    stuck = {name: why for name in going if (why := _hindrance(points, name, successors, standing))}
    while True:
        goes = {name for name in going if name not in stuck}
        runs = _runs(points, goes, successors)
        blocked = {
            run.expired[0]: f"{run.top} stands on it, and {standing[run.top]}"
            for run in runs
            if run.top in standing
        }
        if not blocked:
            return Plan(runs, stuck)
        stuck |= blocked


_Successors = Mapping[tuple[str, str], list[str]]


def _successors(points: Points, needed: Collection[str]) -> _Successors:
    """The needed points that stand on a point, by its name and the disk's label."""
    found: dict[tuple[str, str], list[str]] = {}
    for point in points:
        for disk in point.storage.disks if point.name in needed else []:
            if disk.parent is not None:
                found.setdefault((disk.parent, disk.label), []).append(point.name)
    return found


def _hindrance(
    points: Points, name: str, successors: _Successors, standing: Mapping[str, str]
) -> str:
    """Why the images of the expired point *name* cannot go up; empty if they can."""
    if name in standing:
        return standing[name]
    for disk in points.by_name[name].storage.disks:
        above = successors.get((name, disk.label), [])
        if not above:
            continue
        told = f"disk {disk.device} of {', '.join(above)} stands on it"
        if disk.level == "overlay":
            return f"{told}, and its files are the VM's own, frozen"
        if len(above) > 1:
            return told.replace("stands", "stand")
        upper = points.by_name[above[0]].disk(disk.label)
        if upper is None or len(upper.chain) != 1 or len(disk.chain) != 1:
            return f"{told}, and is of several files"
        if upper.virtual_size_bytes != disk.virtual_size_bytes:
            return f"{told}, and is of another size"
    return ""


def _runs(points: Points, goes: Collection[str], successors: _Successors) -> list[Run]:
    runs = []
    for (parent, label), above in successors.items():
        # the run's top is the point that stays; a run is told from there
        if parent not in goes or above[0] in goes:
            continue
        expired: list[str] = []
        beneath: str | None = parent
        while beneath is not None and beneath in goes:
            expired.append(beneath)
            disk = points.by_name[beneath].disk(label)
            beneath = disk.parent if disk is not None else None
        runs.append(Run(label, above[0], tuple(expired), beneath))
    return runs
