"""Bars in the terminal: the only place that draws a figure of a history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpsnap.cli import units
from qmpsnap.errors import UsageError

if TYPE_CHECKING:
    from qmpsnap.cli.render import Output
    from qmpsnap.engine.row import Row

_EIGHTHS = " ▏▎▍▌▋▊▉"
_WIDTH = 40


@dataclass(frozen=True, slots=True)
class Figure:
    """A field of `Row`, what it is called, and how it is written."""

    field: str
    title: str
    written: Callable[[float | None], str]


def figure(word: str) -> Figure:
    """The figure that *word* means. Raises UsageError."""
    known = _figures()
    if word not in known:
        raise UsageError(f"--chart: not one of {', '.join(known)}: {word!r}")
    return known[word]


def _figures() -> dict[str, Figure]:
    return {
        "cpu": Figure("cpu_share", "CPUs in use since the snapshot before", units.cpus),
        "memory": Figure("rss_bytes", "RSS", units.size),
        "read": Figure("disk_read_bytes_per_second", "read from disks", units.per_second),
        "write": Figure("disk_write_bytes_per_second", "written to disks", units.per_second),
        "sent": Figure("sent_bytes_per_second", "sent by the guest", units.per_second),
        "received": Figure("received_bytes_per_second", "received", units.per_second),
    }


def draw(out: Output, one: Figure, rows: list[Row]) -> None:
    """A bar for each of *rows*; the longest is the largest figure, and none is no figure."""
    values: list[float | None] = [getattr(row, one.field) for row in rows]
    largest = max((value for value in values if value is not None), default=0)
    out.line(one.title)
    width = max(len(one.written(value)) for value in values)
    for row, value in zip(rows, values, strict=True):
        out.line(f"{row.id}  {one.written(value):>{width}}  {bar(value, largest)}".rstrip())


def bar(value: float | None, largest: float, *, width: int = _WIDTH) -> str:
    """*value* in eighths of a column, *largest* being *width* columns long."""
    if not value or largest <= 0:
        return ""
    whole, rest = divmod(round(value / largest * width * 8), 8)
    return ("█" * whole + _EIGHTHS[rest]).rstrip() or _EIGHTHS[1]
