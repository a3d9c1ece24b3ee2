"""A history as one SVG picture: the only place that draws it, with nothing but text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from qmpsnap.cli import units

if TYPE_CHECKING:
    from qmpsnap.engine.row import Row

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _GAP = 760, 90, 90, 20, 50, 44
_COLOURS = ("#0b6bcb", "#c2570c", "#4b8b3b")
_STYLE = "text{font:12px sans-serif;fill:#333}.title{font-weight:bold}line{stroke:#ccc}"


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


def svg(vm: str, rows: Sequence[Row]) -> str:
    """The figures of *rows* over time. A figure that is not known leaves a gap in its line."""
    timed = [(datetime.fromisoformat(one.taken_at), one) for one in rows if one.taken_at]
    moments = [moment.timestamp() for moment, _ in timed]
    first, last = min(moments, default=0.0), max(moments, default=0.0)
    span = (last - first) or 1.0
    across = [_LEFT + (at - first) / span * (_WIDTH - _LEFT - _RIGHT) for at in moments]
    known = [one for _, one in timed]
    height = _TOP + len(_PANELS) * (_HEIGHT + _GAP)
    ends = f"{timed[0][1].taken_at} to {timed[-1][1].taken_at}" if timed else "no snapshots"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}">',
        f"<style>{_STYLE}</style>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        _text(_LEFT, 24, f"{vm}: {ends}", "title"),
    ]
    for number, panel in enumerate(_PANELS):
        parts += _drawn(panel, known, across, _TOP + number * (_HEIGHT + _GAP))
    return "\n".join([*parts, "</svg>"])


def _drawn(panel: _Panel, rows: Sequence[Row], across: Sequence[float], top: float) -> list[str]:
    lines = {field: [getattr(one, field) for one in rows] for field in panel.series}
    values = [value for line in lines.values() for value in line if value is not None]
    largest, bottom = max(values, default=0) or 1, top + _HEIGHT
    parts = [
        _text(_LEFT, top + 8, panel.title, "title"),
        f'<line x1="{_LEFT}" y1="{bottom}" x2="{_WIDTH - _RIGHT}" y2="{bottom}"/>',
        _text(4, bottom, panel.written(0)),
        _text(4, top + 22, panel.written(largest) if values else units.ABSENT),
    ]
    for number, (field, name) in enumerate(panel.series.items()):
        colour = _COLOURS[number]
        at = _LEFT + 180 + number * 100
        parts.append(f'<rect x="{at}" y="{top}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(at + 14, top + 9, name))
        points = [
            None if value is None else (x, bottom - value / largest * (_HEIGHT - 22))
            for x, value in zip(across, lines[field], strict=True)
        ]
        parts += _line(points, colour)
    return parts


def _line(points: Sequence[tuple[float, float] | None], colour: str) -> list[str]:
    """A dot for each of *points*, and a line through those that follow one another."""
    parts, run = [], list[str]()
    for point in [*points, None]:
        if point is not None:
            run.append(f"{point[0]:.1f},{point[1]:.1f}")
            parts.append(
                f'<circle cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="2.5" fill="{colour}"/>'
            )
            continue
        if len(run) > 1:
            parts.append(f'<polyline fill="none" stroke="{colour}" points="{" ".join(run)}"/>')
        run = []
    return parts


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(text)}</text>'
