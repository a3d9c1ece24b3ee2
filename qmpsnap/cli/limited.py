"""A table of limits as people read them: captured, measured, suggested, set, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpsnap.cli import units

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpsnap.cli.render import Output
    from qmpsnap.engine.captured import Value
    from qmpsnap.engine.limiting import Limit

_NAMES = {
    "cpu_max_count": "CPUs",
    "cpu_weight": "CPU weight",
    "cpu_shares": "CPU shares",
    "cpus": "on CPUs",
    "memory_nodes": "on memory nodes",
    "memory_max_bytes": "memory",
    "memory_high_bytes": "memory, slowed above",
    "memory_soft_max_bytes": "memory, soft",
    "swap_max_bytes": "swap",
    "memory_and_swap_max_bytes": "memory and swap",
    "pids_max_count": "tasks",
}
_RATES = {
    "read_bytes_per_second": "read",
    "write_bytes_per_second": "written",
    "read_count_per_second": "reads",
    "write_count_per_second": "writes",
}


def show(out: Output, limits: Sequence[Limit]) -> None:
    """Print *limits*, if there are any."""
    if not limits:
        return
    out.line()
    out.table(
        ("LIMIT", "CAPTURED", "MEASURED", "SUGGESTED", "SET", "WHY"),
        [
            [
                name(one.limit),
                *(
                    value(one.limit, each)
                    for each in (one.captured, one.measured, one.suggested, one.chosen)
                ),
                one.why,
            ]
            for one in limits
        ],
    )
    out.flush()


def name(limit: str) -> str:
    """`memory_max_bytes` is `memory`, `io_max.8:0.read_bytes_per_second` is `8:0 read`."""
    head, _, rest = limit.partition(".")
    if head == "io_max":
        device, _, rate = rest.rpartition(".")
        return f"{device} {_RATES[rate]}"
    return f"huge pages of {rest}" if rest else _NAMES[head]


def value(limit: str, given: Value) -> str:
    """*given* with the unit that is in the name of *limit*."""
    if given is None:
        return units.ABSENT
    if isinstance(given, list):
        return units.numbers(given)
    kind = limit.partition(".")[0]
    if limit.endswith("bytes_per_second"):
        return units.per_second(given)
    if limit.endswith("count_per_second"):
        return units.operations(given)
    return units.size(given) if kind.endswith("_bytes") else units.count(given)
