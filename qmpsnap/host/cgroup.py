"""Control groups: the only place that reads a process' group and what it may and does use."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qmpsnap.errors import LocalFailed

_UNLIMITED = 1 << 62  # v1 writes "no limit" as the largest multiple of a page


class CgroupUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of a process' own groups; None: no such controller, or no limit where a limit is.

    *groups* maps a v1 controller (or "" for v2) to the group's path in its hierarchy.
    """

    groups: dict[str, str]
    memory_bytes: int | None
    memory_max_bytes: int | None
    cpu_seconds: float | None
    cpu_max_count: float | None
    pids_count: int | None


def usage(pid: int, *, proc: Path = Path("/proc")) -> CgroupUsage:
    """The groups of process *pid*, v1, v2 or both. Raises LocalFailed when it is gone."""
    groups = groups_of(pid, proc=proc)
    try:
        table = (proc / "self" / "mountinfo").read_text()
    except OSError as failed:
        raise LocalFailed(f"the mount table cannot be read: {failed.strerror}") from failed
    folders = _folders(table, groups)
    return CgroupUsage(
        groups=groups,
        memory_bytes=_number(folders, "memory", "memory.usage_in_bytes", "memory.current"),
        memory_max_bytes=_number(folders, "memory", "memory.limit_in_bytes", "memory.max"),
        cpu_seconds=_cpu_seconds(folders),
        cpu_max_count=_cpu_max(folders),
        pids_count=_number(folders, "pids", "pids.current", "pids.current"),
    )


def groups_of(pid: int, *, proc: Path = Path("/proc")) -> dict[str, str]:
    """The group of process *pid* for each v1 controller, and for "" (v2). Raises LocalFailed."""
    try:
        text = (proc / str(pid) / "cgroup").read_text()
    except OSError as failed:
        raise LocalFailed(f"process {pid}: {failed.strerror}") from failed
    # `4:memory:/machine` and `0::/machine`; v1 controllers mounted together share a line
    fields = [line.split(":", 2) for line in text.splitlines()]
    return {name: path for _, names, path in fields for name in names.split(",")}


def _folders(table: str, groups: dict[str, str]) -> dict[str, Path]:
    """Where the group of each controller lies in the file system, as far as it is mounted."""
    found = {}
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        root, point = before.split(" ")[3:5]
        fstype, _, options = after.split(" ", 2)
        names = {"cgroup2": [""], "cgroup": options.split(",")}.get(fstype, [])
        for name in names:
            group = Path(groups.get(name, "../"))
            # a group above the mounted part (of another namespace) cannot be looked at
            if ".." not in group.parts and group.is_relative_to(root):
                found[name] = Path(point) / group.relative_to(root)
    return found


def _read(folders: dict[str, Path], controller: str, file: str) -> str | None:
    if controller not in folders:
        return None
    try:
        return (folders[controller] / file).read_text().strip()
    except OSError:
        return None


def _number(folders: dict[str, Path], controller: str, v1: str, v2: str) -> int | None:
    text = _read(folders, controller, v1) or _read(folders, "", v2)
    number = int(text) if text and text != "max" else None
    return number if number is not None and number < _UNLIMITED else None


def _cpu_seconds(folders: dict[str, Path]) -> float | None:
    if (nanoseconds := _number(folders, "cpuacct", "cpuacct.usage", "")) is not None:
        return nanoseconds / 1e9
    figures = dict(line.split() for line in (_read(folders, "", "cpu.stat") or "").splitlines())
    return int(figures["usage_usec"]) / 1e6 if "usage_usec" in figures else None


def _cpu_max(folders: dict[str, Path]) -> float | None:
    """How many CPUs the group may use at a time."""
    quota, period = (
        _read(folders, "cpu", "cpu.cfs_quota_us"),
        _read(folders, "cpu", "cpu.cfs_period_us"),
    )
    if quota is None or period is None:
        quota, _, period = (_read(folders, "", "cpu.max") or "max").partition(" ")
    unlimited = quota in ("max", "-1") or not period
    return None if unlimited else int(quota) / int(period)
