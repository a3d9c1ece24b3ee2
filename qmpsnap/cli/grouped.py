"""What `show --usage` prints of the VM's control group and of the limits above it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from qmpsnap.cli import units
from qmpsnap.cli.units import duration, per_second

if TYPE_CHECKING:
    from qmpsnap.cli.render import Output
    from qmpsnap.engine.sample import Sample
    from qmpsnap.host.limits import GroupLimits


def facts(now: Sample) -> list[tuple[str, object]]:
    """Names and values of what the group has used."""
    from qmpsnap.cli.render import in_bytes

    if now.cgroup is None:
        return []
    used = now.cgroup.figures
    events = {
        "over memory.high": used.memory_high_event_count,
        "at the memory limit": used.memory_max_event_count,
        "killed for memory": used.oom_kill_count,
    }
    met = ", ".join(f"{number} x {word}" for word, number in events.items() if number)
    return [
        ("cgroup", f"{now.cgroup.version or 'cgroup'}: memory {in_bytes(used.memory_bytes)} (at "
                   f"most {in_bytes(used.memory_peak_bytes)}), CPU {duration(used.cpu_seconds)}, "
                   f"throttled {duration(used.cpu_throttled_seconds)}, "
                   f"{units.count(used.pids_count)} tasks"),
        ("limits met", met or None),
    ]  # fmt: skip


def limits(out: Output, now: Sample) -> None:
    """A table of the limits of the group and of those above it, as far as there are any."""
    if now.cgroup is None:
        return
    above = [(f"{one.hierarchy or 'v2'}:{one.path}", one.limits) for one in now.cgroup.ancestors]
    named = [("its own", now.cgroup.limits), *above]
    rows = [[path, told] for path, own in named if (told := ", ".join(words(own)))]
    if rows:
        out.line()
        out.table(("GROUP", "LIMITS"), rows)


def words(limits: GroupLimits) -> Iterable[str]:
    """Each of *limits* with its unit."""
    from qmpsnap.cli.render import in_bytes

    sizes = {
        "memory high": limits.memory_high_bytes,
        "memory max": limits.memory_max_bytes,
        "memory soft": limits.memory_soft_max_bytes,
        "swap max": limits.swap_max_bytes,
        "memory and swap max": limits.memory_and_swap_max_bytes,
    }
    if limits.cpu_max_count is not None:
        yield f"{limits.cpu_max_count:g} CPUs"
    if limits.cpu_weight is not None:
        yield f"weight {limits.cpu_weight}"
    if limits.cpu_shares is not None:
        yield f"shares {limits.cpu_shares}"
    if limits.cpus is not None:
        yield f"on CPUs {units.numbers(limits.cpus)}"
    for word, size in sizes.items():
        if size is not None:
            yield f"{word} {in_bytes(size)}"
    if limits.pids_max_count is not None:
        yield f"{limits.pids_max_count} tasks"
    for pages, most in (limits.hugetlb_max_bytes or {}).items():
        yield f"huge pages of {pages} {in_bytes(most)}"
    for device, one in (limits.io_max or {}).items():
        rates = f"read {per_second(one.read_bytes_per_second)}, write " + per_second(
            one.write_bytes_per_second
        )
        counts = (one.read_count_per_second, one.write_count_per_second)
        yield f"device {device}: {rates}, {' and '.join(map(units.operations, counts))} operations"
