"""A history as one picture: the only place that decides what is where; and the same as SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from qmpsnap.cli import units

if TYPE_CHECKING:
    from qmpsnap.engine.row import Row

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _GAP = 760, 90, 90, 20, 50, 44
_COLOURS = ("#0b6bcb", "#c2570c", "#4b8b3b")
INK, RULE, PAPER = "#333333", "#cccccc", "#ffffff"
_STYLE = f"text{{font:12px sans-serif;fill:{INK}}}.title{{font-weight:bold}}line{{stroke:{RULE}}}"


@dataclass(frozen=True, slots=True)
class Words:
    """*y* is the base line of the text."""

    x: float
    y: float
    text: str
    bold: bool = False


@dataclass(frozen=True, slots=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A thin line from *left* to *right*."""

    left: float
    right: float
    y: float


@dataclass(frozen=True, slots=True)
class Dot:
    at: tuple[float, float]
    colour: str


@dataclass(frozen=True, slots=True)
class Trace:
    points: tuple[tuple[float, float], ...]
    colour: str


Mark = Words | Box | Rule | Dot | Trace


@dataclass(frozen=True, slots=True)
class Picture:
    """*marks* in the order in which they are drawn, in units from the top left."""

    width: int
    height: int
    marks: list[Mark]


@dataclass(frozen=True, slots=True)
class _Panel:
    """Some figures that share a scale: fields of `Row` with their names."""

    title: str
    series: dict[str, str]
    written: Callable[[float | None], str]


_PANELS = (
    _Panel("CPUs in use", {"cpu_share": "QEMU", "vcpu_share": "vCPUs"}, units.cpus),
    _Panel("Memory", {"rss_bytes": "RSS", "cgroup_memory_bytes": "group"}, units.size),
    _Panel(
        "Disks",
        {"disk_read_bytes_per_second": "read", "disk_write_bytes_per_second": "written"},
        units.per_second,
    ),
    _Panel(
        "Network",
        {"sent_bytes_per_second": "sent", "received_bytes_per_second": "received"},
        units.per_second,
    ),
    _Panel(
        "Pressure on the host",
        {
            "host_pressure_cpu_share": "CPU",
            "host_pressure_memory_share": "memory",
            "host_pressure_io_share": "I/O",
        },
        units.percent,
    ),
)


def drawn(vm: str, rows: Sequence[Row]) -> Picture:
    """The figures of *rows* over time. A figure that is not known leaves a gap in its line."""
    timed = [(datetime.fromisoformat(one.taken_at), one) for one in rows if one.taken_at]
    moments = [moment.timestamp() for moment, _ in timed]
    first, last = min(moments, default=0.0), max(moments, default=0.0)
    span = (last - first) or 1.0
    across = [_LEFT + (at - first) / span * (_WIDTH - _LEFT - _RIGHT) for at in moments]
    known = [one for _, one in timed]
    ends = f"{timed[0][1].taken_at} to {timed[-1][1].taken_at}" if timed else "no snapshots"
    marks: list[Mark] = [Words(_LEFT, 24, f"{vm}: {ends}", bold=True)]
    for number, panel in enumerate(_PANELS):
        marks += _panel(panel, known, across, _TOP + number * (_HEIGHT + _GAP))
    return Picture(_WIDTH, _TOP + len(_PANELS) * (_HEIGHT + _GAP), marks)


def _panel(
    panel: _Panel, rows: Sequence[Row], across: Sequence[float], top: float
) -> Iterator[Mark]:
    lines = {field: [getattr(one, field) for one in rows] for field in panel.series}
    values = [value for line in lines.values() for value in line if value is not None]
    largest, bottom = max(values, default=0) or 1, top + _HEIGHT
    yield Words(_LEFT, top + 8, panel.title, bold=True)
    yield Rule(_LEFT, _WIDTH - _RIGHT, bottom)
    yield Words(4, bottom, panel.written(0))
    yield Words(4, top + 22, panel.written(largest) if values else units.ABSENT)
    for number, (field, name) in enumerate(panel.series.items()):
        colour = _COLOURS[number]
        at = _LEFT + 180 + number * 100
        yield Box(at, top, 10, 10, colour)
        yield Words(at + 14, top + 9, name)
        points = [
            None if value is None else (x, bottom - value / largest * (_HEIGHT - 22))
            for x, value in zip(across, lines[field], strict=True)
        ]
        yield from _line(points, colour)


def _line(points: Sequence[tuple[float, float] | None], colour: str) -> Iterator[Mark]:
    """A dot for each of *points*, and a line through those that follow one another."""
    run: list[tuple[float, float]] = []
    for point in [*points, None]:
        if point is not None:
            run.append(point)
            yield Dot(point, colour)
            continue
        if len(run) > 1:
            yield Trace(tuple(run), colour)
        run = []


def svg(picture: Picture) -> str:
    """*picture* as text that every browser shows."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{picture.width}" '
        f'height="{picture.height}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="100%" height="100%" fill="{PAPER}"/>',
        *map(_element, picture.marks),
    ]
    return "\n".join([*parts, "</svg>"])


def _element(mark: Mark) -> str:
    match mark:
        case Words(x, y, text, bold):
            kind = "title" if bold else ""
            return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>'
        case Box(x, y, width, height, colour):
            size = f'width="{width:g}" height="{height:g}"'
            return f'<rect x="{x:g}" y="{y:g}" {size} fill="{colour}"/>'
        case Rule(left, right, y):
            return f'<line x1="{left:g}" y1="{y:g}" x2="{right:g}" y2="{y:g}"/>'
        case Dot((x, y), colour):
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>'
        case Trace(points, colour):
            told = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            return f'<polyline fill="none" stroke="{colour}" points="{told}"/>'
