"""Figures as people read them: the only place that rounds them and gives them their units."""

from __future__ import annotations

from qmpsnap.cli.render import in_bytes

ABSENT = "-"


def per_second(rate: float | None) -> str:
    """Bytes a second: `1.5 MiB/s`."""
    return ABSENT if rate is None else f"{in_bytes(round(rate))}/s"


def operations(rate: float | None) -> str:
    """Operations a second: `12.0/s`."""
    return ABSENT if rate is None else f"{rate:.1f}/s"


def cpus(share: float | None) -> str:
    """How many CPUs all the time: `0.25`."""
    return ABSENT if share is None else f"{share:.2f}"


def percent(share: float | None) -> str:
    """A share of the time: `2.5 %`."""
    return ABSENT if share is None else f"{share * 100:.1f} %"


def duration(seconds: float | None) -> str:
    """`0.50 ms`, `41.3 s`, `12.5 min`, `5.2 h`, `3.1 d`."""
    if seconds is None:
        return ABSENT
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 or not seconds else f"{seconds * 1000:.2f} ms"


def numbers(several: list[int] | None) -> str:
    """A list of CPUs or nodes, as cpuset(7) spells it: `0-2,5`."""
    if several is None:
        return ABSENT
    runs: list[list[int]] = []
    for number in sorted(several):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in runs) or "none"


def count(number: float | None) -> str:
    return ABSENT if number is None else f"{number:g}"


def size(number: float | None) -> str:
    """Bytes: `64.0 MiB`."""
    return in_bytes(None if number is None else round(number))
