"""Restores by RAM size, a series of snapshots, and clones: ours beside QEMU's own, in the same run.

`scripts/bench ram --ram 256 1024 4096 8192 --repeat 5`; `scripts/bench ram --quick` to look.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts import ram_clones, ram_restores, ram_scene, ram_series
from tests.rig.qemu import binaries

_MIB = 1 << 20
_LOADS = ["idle", "ram=64 rate=40 disk=1024"]
_QUICK = {"ram": [256], "series_ram": 256, "clones_ram": 256} | {
    "repeat": 2, "snapshots": 3, "interval": 1, "clones": 3, "settle": 1,
}  # fmt: skip
_FORMS = 6  # as many times the guest's RAM may lie on the disk at once

Rows = Sequence[ram_restores.Row | ram_series.Row | ram_clones.Row]
Line = list[str]


def _restores(rows: Sequence[ram_restores.Row], least: dict[str, float]) -> list[Line]:
    """Medians and ratios to the floor; *least* has each way's figure at the smallest RAM."""
    head = ["way", "to RESUME ms", "least-most", "x QEMU", "x least RAM"]
    lines = [[*head, "verb ms", "x QEMU", "all local ms", "x QEMU"]]
    floor = statistics.median(rows[0].running)
    for row in rows:
        running = statistics.median(row.running)
        first = least.setdefault(row.way, running)
        cells = [f"{running:.1f}", f"{min(row.running):.1f}-{max(row.running):.1f}"]
        cells += [f"{running / floor:.3f}", f"{running / first:.2f}"]
        for values in (row.verb, row.local):
            middle = statistics.median(values) if values else None
            cells += ["", ""] if middle is None else [f"{middle:.1f}", f"{middle / floor:.3f}"]
        lines.append([row.way, *cells])
    return lines


def _series(rows: Sequence[ram_series.Row]) -> list[Line]:
    """The first snapshot, the median of those after it, and their sum."""
    head = ["way", "first MiB", "next MiB", "least-most", "x first", "all MiB", "x zstd"]
    lines = [[*head, "first s", "next s", "x zstd"]]
    floor = rows[0]
    for row in rows:
        first, *rest = (size / _MIB for size in row.shipped)
        middle, total = statistics.median(rest), sum(row.shipped)
        cells = [f"{first:.1f}", f"{middle:.2f}", f"{min(rest):.2f}-{max(rest):.2f}"]
        cells += [f"{middle / first:.3f}", f"{total / _MIB:.1f}"]
        cells += [f"{total / sum(floor.shipped):.3f}"]
        next_s, base_s = (statistics.median(one.seconds[1:]) for one in (row, floor))
        cells += [f"{row.seconds[0]:.2f}", f"{next_s:.2f}", f"{next_s / base_s:.2f}"]
        lines.append([row.way, *cells])
    return lines


def _clones(rows: Sequence[ram_clones.Row]) -> list[Line]:
    lines = [["way", "PSS MiB each", "least-most", "own MiB", "of files MiB", "all MiB", "x QEMU"]]
    floor = sum(rows[0].pss)
    for row in rows:
        cells = [f"{statistics.median(row.pss):.1f}", f"{min(row.pss):.1f}-{max(row.pss):.1f}"]
        cells += [f"{statistics.median(part):.1f}" for part in (row.own, row.shared)]
        cells += [f"{sum(row.pss):.0f}", f"{sum(row.pss) / floor:.3f}"]
        lines.append([row.way, *cells])
    return lines


def _markdown(title: str, lines: list[Line]) -> str:
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([f"### {title}", "", head, "|---" * len(lines[0]) + "|", *body, ""])


class Report:
    """What was found so far: tables as they come in, and the figures behind them."""

    def __init__(self, *, quiet: bool) -> None:
        self.tables: list[str] = []
        self.figures: dict[str, list[dict[str, object]]] = {}
        self._out = sys.stderr if quiet else sys.stdout

    def add(self, what: str, title: str, rows: Rows, lines: list[Line]) -> None:
        self.tables.append(_markdown(title, lines))
        self.figures.setdefault(what, []).extend(map(dataclasses.asdict, rows))
        print(self.tables[-1], file=self._out, flush=True)

    def json(self) -> str:
        head: dict[str, object] = {"format": "qmpsnap-bench-ram", "version": 1}
        return json.dumps(head | self.figures, indent=1)


async def run(options: argparse.Namespace, report: Report) -> None:
    for version in options.qemu:
        least: dict[str, float] = {}
        for mib in options.ram if "restore" in options.what else []:
            _refuse_full(options.folder, mib)
            async with ram_scene.captured(version, mib, options.folder) as it:
                rows = await ram_restores.restores(it, version, options.repeat)
            title = f"Restore, QEMU {version}, {mib} MiB"
            report.add("restore", title, rows, _restores(rows, least))
        for load in options.load if "series" in options.what else []:
            mib = options.series_ram
            _refuse_full(options.folder, mib * 2)
            async with ram_scene.running(version, mib, options.folder, free=80) as guest:
                taken = await ram_series.series(
                    guest, version, mib, load, options.snapshots, options.interval
                )
            title = f"{options.snapshots} snapshots, QEMU {version}, {mib} MiB, {load}"
            report.add("series", title, taken, _series(taken))
        if "clones" in options.what:
            mib = ram_clones.affordable(options.clones_ram, options.clones)
            _refuse_full(options.folder, mib)
            async with ram_scene.captured(version, mib, options.folder) as it:
                back = await ram_clones.clones(it, version, options.clones, options.settle)
            title = f"{options.clones} clones, QEMU {version}, {mib} MiB"
            report.add("clones", title, back, _clones(back))


def _refuse_full(folder: Path, mib: int) -> None:
    """Raises SystemExit where a guest's forms would fill the disk."""
    free, needed = shutil.disk_usage(folder).free // _MIB, _FORMS * mib
    if free < needed:
        raise SystemExit(f"{folder}: {free} MiB are free, and {mib} MiB of RAM need {needed}")


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench ram", description=__doc__)
    parts = ["restore", "series", "clones"]
    parser.add_argument("--what", nargs="+", default=parts, choices=parts)
    sizes = [256, 1024, 4096, 8192]
    parser.add_argument("--ram", nargs="+", type=int, default=sizes, help="MiB, for the restores")
    parser.add_argument("--repeat", type=int, default=3, help="restores of each way")
    parser.add_argument("--series-ram", type=int, default=1024, help="MiB")
    parser.add_argument("--snapshots", type=int, default=10)
    parser.add_argument("--interval", type=float, default=10, help="seconds between snapshots")
    parser.add_argument("--load", nargs="+", default=_LOADS)
    parser.add_argument("--clones-ram", type=int, default=1024, help="MiB; 256 if short of memory")
    parser.add_argument("--clones", type=int, default=20)
    parser.add_argument("--settle", type=float, default=10, help="seconds that the clones run")
    parser.add_argument("--qemu", nargs="+", default=["11.1"], choices=list(binaries()))
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="for all files")
    parser.add_argument("--quick", action="store_true", help="256 MiB, few of everything")
    parser.add_argument("--json", action="store_true", help="the figures, on stdout at the end")
    parser.add_argument("--output", type=Path, help="the tables as Markdown")
    quick = "--quick" in words
    parser.set_defaults(**_QUICK if quick else {})
    options = parser.parse_args(words)
    if options.snapshots < 2:
        parser.error("--snapshots: a series has two at least")
    report = Report(quiet=options.json)
    asyncio.run(run(options, report))
    if options.json:
        print(report.json())
    if options.output:
        options.output.write_text("\n".join(report.tables))
