"""`qmpsnap usage`: what a VM used, snapshot after snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmpsnap.cli import options
from qmpsnap.cli.target import Call
from qmpsnap.cli.verb import verb

if TYPE_CHECKING:
    from qmpsnap.cli.render import Output
    from qmpsnap.engine.row import Row

EPILOG = """\b
CPU, disk, network and pressure are of the interval since the snapshot before,
"-" for the first one and after QEMU was started again. A share of 1.00 is one
CPU all the time. `qmpsnap show VM ID --usage` has all figures of one snapshot.

\b
Examples:
  qmpsnap usage web
  qmpsnap usage web --chart cpu
  qmpsnap usage web --csv >web.csv
  qmpsnap usage web --svg >web.svg
  qmpsnap usage web --png web.png

\b
Exit codes: 0 done; 2 usage; 3 no such VM; 4 a root cannot be read.
"""


@verb()
async def usage(
    call: Call,
    vm: options.Vm,
    csv: Annotated[
        bool,
        typer.Option(
            "--csv",
            help="Comma-separated values, units in the names of the columns. Default: a table.",
            show_default=False,
        ),
    ] = False,
    chart: Annotated[
        str | None,
        typer.Option(
            metavar="FIGURE",
            help="Bars of one figure: cpu, memory, read, write, sent or received. "
            "Default: a table of all.",
            show_default=False,
        ),
    ] = None,
    svg: Annotated[
        bool,
        typer.Option(
            "--svg",
            help="A picture of the figures over time, as SVG on stdout. Default: a table.",
            show_default=False,
        ),
    ] = False,
    png: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The same picture as PNG, into FILE, which is replaced. Default: a table.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what a VM and its host used at each snapshot, oldest first."""
    from qmpsnap.cli import chart as charts
    from qmpsnap.cli import picture, raster
    from qmpsnap.engine.row import row
    from qmpsnap.errors import UsageError, VmUnknown

    out = call.out
    if (csv, svg, png is not None, chart is not None, out.json).count(True) > 1:
        raise UsageError("--csv, --chart, --svg, --png and --json are ways to show the same")
    figure = charts.figure(chart) if chart is not None else None
    machine = call.machine(vm, reach=False)
    records = await call.engine().usages(vm)
    if not records and machine.qmp is None:
        raise VmUnknown(f"nothing is known of a VM {vm!r}")
    if out.json:
        for record in records:
            out.record(record)
        return
    rows = [row(record) for record in records]
    if csv:
        _csv(out, rows)
    elif svg:
        out.line(picture.svg(picture.drawn(vm, rows)))
    elif png is not None:
        png.write_bytes(raster.png(picture.drawn(vm, rows)))
    elif not rows:
        out.notice("no snapshots found")
    elif figure is not None:
        charts.draw(out, figure, rows)
    else:
        _table(out, rows)
    for record in records:
        if record.usage is None:
            out.notice(f"{record.id} is {record.state}: {record.why}")


def _table(out: Output, rows: list[Row]) -> None:
    from qmpsnap.cli.render import in_bytes
    from qmpsnap.cli.units import cpus, duration, per_second, percent

    out.table(
        ("ID", "INTERVAL", "CPUS", "VCPUS", "THROTTLED", "RSS", "READ", "WRITTEN", "SENT",
         "RECEIVED", "HOST LOAD", "AVAILABLE", "I/O PRESSURE"),
        [
            [
                one.id, duration(one.interval_seconds), cpus(one.cpu_share), cpus(one.vcpu_share),
                percent(one.cgroup_throttled_share), in_bytes(one.rss_bytes),
                per_second(one.disk_read_bytes_per_second),
                per_second(one.disk_write_bytes_per_second),
                per_second(one.sent_bytes_per_second), per_second(one.received_bytes_per_second),
                cpus(one.host_load_1_minute), in_bytes(one.host_memory_available_bytes),
                percent(one.host_pressure_io_share),
            ]
            for one in rows
        ],
    )  # fmt: skip


def _csv(out: Output, rows: list[Row]) -> None:
    import csv
    import io

    from qmpsnap.engine.row import Row

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row.__struct_fields__)
    writer.writerows([getattr(one, name) for name in Row.__struct_fields__] for one in rows)
    for line in text.getvalue().splitlines():
        out.line(line)
