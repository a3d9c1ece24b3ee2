"""The files that limit a group: the only place that knows what to write, for v1 and for v2."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from qmpsnap.host.limits import GroupLimits, IoLimits

_PERIOD = 100_000  # microseconds: the kernel's own default
_QUOTA = 1_000  # the least that it takes
_WEIGHT, _SHARES = 100, 1024  # what a group has when nobody says a word
_RATES = {
    "read_bytes_per_second": ("rbps", "read_bps_device"),
    "write_bytes_per_second": ("wbps", "write_bps_device"),
    "read_count_per_second": ("riops", "read_iops_device"),
    "write_count_per_second": ("wiops", "write_iops_device"),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What to write into a *file* of the group. *trouble*: why there is no such limit here.

    *hierarchy* is the v1 controller, "" for v2; *controller* is its name in either.
    """

    hierarchy: str
    controller: str
    file: str
    text: str
    trouble: str = ""


def settings(limits: GroupLimits, first: Collection[str]) -> list[Setting]:
    """Everything to write for *limits*, in this order; *first* are the controllers of v1."""
    parts = (_cpu, _memory, _pids, _cpuset, _io, _hugetlb)
    return [one for part in parts for one in part(limits, first)]


def _cpu(limits: GroupLimits, first: Collection[str]) -> Iterator[Setting]:
    weight, shares = limits.cpu_weight, limits.cpu_shares
    quota = None
    if limits.cpu_max_count is not None:
        quota = max(_QUOTA, round(limits.cpu_max_count * _PERIOD))
    if "cpu" in first:
        if shares is None and weight is not None:
            shares = min(max(2, round(weight * _SHARES / _WEIGHT)), 262144)
        if quota is not None:
            yield Setting("cpu", "cpu", "cpu.cfs_period_us", str(_PERIOD))
            yield Setting("cpu", "cpu", "cpu.cfs_quota_us", str(quota))
        if shares is not None:
            yield Setting("cpu", "cpu", "cpu.shares", str(shares))
        return
    if weight is None and shares is not None:
        weight = min(max(1, round(shares * _WEIGHT / _SHARES)), 10000)
    if quota is not None:
        yield Setting("", "cpu", "cpu.max", f"{quota} {_PERIOD}")
    if weight is not None:
        yield Setting("", "cpu", "cpu.weight", str(weight))


def _memory(limits: GroupLimits, first: Collection[str]) -> Iterator[Setting]:
    most, both, swap = (
        limits.memory_max_bytes, limits.memory_and_swap_max_bytes, limits.swap_max_bytes,
    )  # fmt: skip
    # v1 limits memory and swap together, v2 each: with the limit of memory one follows
    if "memory" in first:
        if both is None and swap is not None and most is not None:
            both, swap = most + swap, None
        if both is not None:  # v1 takes no limit of memory above that of both, nor none
            most = both if most is None else min(most, both)
        if most is not None:
            yield Setting("memory", "memory", "memory.limit_in_bytes", str(most))
        if both is not None:
            yield Setting("memory", "memory", "memory.memsw.limit_in_bytes", str(both))
        elif swap is not None:
            yield _not("memory", "memory.swap.max", "v1 limits swap only together with memory")
        if limits.memory_soft_max_bytes is not None:
            soft = str(limits.memory_soft_max_bytes)
            yield Setting("memory", "memory", "memory.soft_limit_in_bytes", soft)
        if limits.memory_high_bytes is not None:
            yield _not("memory", "memory.high", "v1, which has this controller, has no such limit")
        return
    if swap is None and both is not None and most is not None:
        swap, both = max(0, both - most), None
    if limits.memory_high_bytes is not None:
        yield Setting("", "memory", "memory.high", str(limits.memory_high_bytes))
    if most is not None:
        yield Setting("", "memory", "memory.max", str(most))
    if swap is not None:
        yield Setting("", "memory", "memory.swap.max", str(swap))
    elif both is not None:
        yield _not("memory", "memory.memsw.limit_in_bytes", "v2 has no limit of both together")
    if limits.memory_soft_max_bytes is not None:
        yield _not("memory", "memory.soft_limit_in_bytes", "v2 has no such limit")


def _pids(limits: GroupLimits, first: Collection[str]) -> Iterator[Setting]:
    if limits.pids_max_count is not None:
        where = "pids" if "pids" in first else ""
        yield Setting(where, "pids", "pids.max", str(limits.pids_max_count))


def _cpuset(limits: GroupLimits, first: Collection[str]) -> Iterator[Setting]:
    where = "cpuset" if "cpuset" in first else ""
    for kind, several in (("cpus", limits.cpus), ("mems", limits.memory_nodes)):
        if several is not None:
            yield Setting(where, "cpuset", f"cpuset.{kind}", ",".join(map(str, several)))


def _io(limits: GroupLimits, first: Collection[str]) -> Iterator[Setting]:
    for device, one in (limits.io_max or {}).items():
        rates = _rates(one)
        if "blkio" in first:
            for name, rate in rates.items():
                file = f"blkio.throttle.{_RATES[name][1]}"
                yield Setting("blkio", "blkio", file, f"{device} {rate}")
        elif rates:
            words = " ".join(f"{_RATES[name][0]}={rate}" for name, rate in rates.items())
            yield Setting("", "io", "io.max", f"{device} {words}")


def _rates(one: IoLimits) -> dict[str, int]:
    known = {name: getattr(one, name) for name in _RATES}
    return {name: rate for name, rate in known.items() if rate is not None}


def _hugetlb(limits: GroupLimits, first: Collection[str]) -> Iterator[Setting]:
    where, last = ("hugetlb", "limit_in_bytes") if "hugetlb" in first else ("", "max")
    for size, most in (limits.hugetlb_max_bytes or {}).items():
        yield Setting(where, "hugetlb", f"hugetlb.{size}.{last}", str(most))


def _not(controller: str, file: str, why: str) -> Setting:
    return Setting("", controller, file, "", why)
