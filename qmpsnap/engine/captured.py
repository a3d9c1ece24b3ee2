"""The limits that held for a captured VM: its own group's, and those above, the tightest each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qmpsnap.host.cgroup import CgroupUsage
from qmpsnap.host.limits import GroupLimits, IoLimits

Value = int | float | list[int] | None
_MAXIMA = (
    "cpu_max_count",
    "memory_max_bytes",
    "memory_high_bytes",
    "memory_soft_max_bytes",
    "swap_max_bytes",
    "memory_and_swap_max_bytes",
    "pids_max_count",
)
_USUAL = {"cpu_weight": 100, "cpu_shares": 1024}  # what each group has: that limits nothing
FIELDS = ("cpu_max_count", *_USUAL, "cpus", "memory_nodes", *_MAXIMA[1:])
"""Those that are one value, in the order in which people would look."""


@dataclass(frozen=True, slots=True)
class Held:
    """One limit, and the group *of* which it was, "" for the VM's own."""

    value: Value
    of: str = ""


def held(groups: CgroupUsage, cpu_count: int) -> dict[str, Held]:
    """By the field of `GroupLimits`, `hugetlb_max_bytes.SIZE` or `io_max.DEVICE.RATE`.

    Of each maximum the smallest, since a group above holds as well. Weights are the own group's.
    CPUs and memory nodes are there where they are not all that there were: *cpu_count* CPUs.
    """
    found: dict[str, Held] = {}
    for limits, of in _all(groups):
        for name, value in _maxima(limits):
            if name not in found or value < found[name].value:  # type: ignore[operator]
                found[name] = Held(value, of)
    for name, usual in _USUAL.items():
        own = getattr(groups.limits, name)
        if own not in (None, usual):
            found[name] = Held(own)
    highest = [limits for limits, _ in _all(groups)]
    cpus, nodes = groups.limits.cpus, groups.limits.memory_nodes
    if cpus and len(cpus) < cpu_count:
        found["cpus"] = Held(cpus)
    # the topmost group that can be seen has every node
    every = max((one.memory_nodes or [] for one in highest), key=len)
    if nodes and len(nodes) < len(every):
        found["memory_nodes"] = Held(nodes)
    return found


def _all(groups: CgroupUsage) -> Iterator[tuple[GroupLimits, str]]:
    yield groups.limits, ""
    for one in groups.ancestors:
        yield one.limits, one.path


def _maxima(limits: GroupLimits) -> Iterator[tuple[str, float]]:
    for name in _MAXIMA:
        if (value := getattr(limits, name)) is not None:
            yield name, value
    for size, most in (limits.hugetlb_max_bytes or {}).items():
        yield f"hugetlb_max_bytes.{size}", most
    for device, one in (limits.io_max or {}).items():
        for rate in IoLimits.__struct_fields__:
            if (value := getattr(one, rate)) is not None:
                yield f"io_max.{device}.{rate}", value


def as_limits(values: dict[str, Value]) -> GroupLimits:
    """The struct of *values*, named as those of `held`."""
    plain: dict[str, object] = {}
    hugetlb: dict[str, int] = {}
    io: dict[str, dict[str, int]] = {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        if head == "io_max":
            device, _, rate = rest.partition(".")
            io.setdefault(device, {})[rate] = _whole(value)
        elif rest:
            hugetlb[rest] = _whole(value)
        else:
            plain[head] = (
                value if head in ("cpu_max_count", "cpus", "memory_nodes") else _whole(value)
            )
    return GroupLimits(
        **plain,  # type: ignore[arg-type]
        hugetlb_max_bytes=hugetlb or None,
        io_max={device: IoLimits(**rates) for device, rates in io.items()} or None,
    )


def _whole(value: Value) -> int:
    assert isinstance(value, int | float)
    return int(value)
