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
_LOADS = ["idle", "ram=64 rate=40 disk=1024", "noise=16"]
_QUICK = {"ram": [256], "series_ram": 256, "clones_ram": 256} | {
    "repeat": 2, "snapshots": 3, "interval": 1, "clones": 3, "settle": 1,
}  # fmt: skip
_FORMS = 6  # as many times the guest's RAM may lie on the disk at once

Rows = Sequence[ram_restores.Row | ram_series.Row | ram_clones.Row]
Line = list[str]


def restore_table(rows: Sequence[ram_restores.Row], least: dict[str, float]) -> list[Line]:
    """Medians and ratios to the floor; *least* has each way's figure at the smallest RAM."""
    head = ["way", "to RESUME ms", "least-most", "x QEMU", "x least RAM"]
    lines = [[*head, "verb ms", "x QEMU", "all local ms", "x QEMU"]]
    floor = statistics.median(rows[0].resume_ms)
    for row in rows:
        running = statistics.median(row.resume_ms)
        first = least.setdefault(row.way, running)
        cells = [f"{running:.1f}", f"{min(row.resume_ms):.1f}-{max(row.resume_ms):.1f}"]
        cells += [f"{running / floor:.3f}", f"{running / first:.2f}"]
        for values in (row.verb_ms, row.local_ms):
            middle = statistics.median(values) if values else None
            cells += ["", ""] if middle is None else [f"{middle:.1f}", f"{middle / floor:.3f}"]
        lines.append([row.way, *cells])
    return lines


def series_table(rows: Sequence[ram_series.Row]) -> list[Line]:
    """The first snapshot, the median of those after it, and their sum."""
    head = ["way", "first MiB", "next MiB", "least-most", "x first", "all MiB", "x zstd"]
    lines = [[*head, "first s", "next s", "x zstd"]]
    floor = rows[0]
    for row in rows:
        first, *rest = (size / _MIB for size in row.shipped_bytes)
        middle, total = statistics.median(rest), sum(row.shipped_bytes)
        cells = [f"{first:.1f}", f"{middle:.2f}", f"{min(rest):.2f}-{max(rest):.2f}"]
        cells += [f"{middle / first:.3f}", f"{total / _MIB:.1f}"]
        cells += [f"{total / sum(floor.shipped_bytes):.3f}"]
        next_s, base_s = (statistics.median(one.seconds[1:]) for one in (row, floor))
        cells += [f"{row.seconds[0]:.2f}", f"{next_s:.2f}", f"{next_s / base_s:.2f}"]
        lines.append([row.way, *cells])
    return lines


def clones_table(rows: Sequence[ram_clones.Row]) -> list[Line]:
    lines = [["way", "PSS MiB each", "least-most", "own MiB", "of files MiB", "all MiB", "x QEMU"]]
    floor = sum(rows[0].pss_mib)
    for row in rows:
        cells = [
            f"{statistics.median(row.pss_mib):.1f}",
            f"{min(row.pss_mib):.1f}-{max(row.pss_mib):.1f}",
        ]
        cells += [f"{statistics.median(part):.1f}" for part in (row.own_mib, row.files_mib)]
        cells += [f"{sum(row.pss_mib):.0f}", f"{sum(row.pss_mib) / floor:.3f}"]
        lines.append([row.way, *cells])
    return lines


def _markdown(title: str, lines: list[Line]) -> str:
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([f"### {title}", "", head, "|---" * len(lines[0]) + "|", *body, ""])


def _plain(row: ram_restores.Row | ram_series.Row | ram_clones.Row) -> dict[str, object]:
    """*row* for programs: every run's figure, none where there is nothing to measure."""
    facts = dataclasses.asdict(row).items()
    lists = {name: [round(one, 3) for one in it] or None for name, it in facts if type(it) is list}
    return dict(facts) | lists


class Report:
    """What was found so far: tables as they come in, and the figures behind them."""

    def __init__(self, *, quiet: bool) -> None:
        self.tables: list[str] = []
        self.figures: dict[str, list[dict[str, object]]] = {}
        self._out = sys.stderr if quiet else sys.stdout

    def add(self, what: str, title: str, rows: Rows, lines: list[Line]) -> None:
        self.tables.append(_markdown(title, lines))
        self.figures.setdefault(what, []).extend(map(_plain, rows))
        print(self.tables[-1], file=self._out, flush=True)

    def json(self) -> str:
        head: dict[str, object] = {"format": "qmpsnap-bench-ram", "version": 1}
        return json.dumps(head | self.figures, indent=1)


async def run(wanted: argparse.Namespace, report: Report) -> None:
    for version in wanted.qemu:
        least: dict[str, float] = {}
        for mib in wanted.ram if "restore" in wanted.what else []:
            _refuse_full(wanted.folder, mib)
            async with ram_scene.captured(version, mib, wanted.folder) as it:
                rows = await ram_restores.restores(it, wanted.repeat)
            title = f"Restore, QEMU {version}, {mib} MiB"
            report.add("restore", title, rows, restore_table(rows, least))
        for load in wanted.load if "series" in wanted.what else []:
            mib = wanted.series_ram
            _refuse_full(wanted.folder, mib * 2)
            async with ram_scene.running(version, mib, wanted.folder, free=80) as guest:
                taken = await ram_series.series(guest, load, wanted.snapshots, wanted.interval)
            title = f"{wanted.snapshots} snapshots, QEMU {version}, {mib} MiB, {load}"
            report.add("series", title, taken, series_table(taken))
        if "clones" in wanted.what:
            mib = ram_clones.affordable(wanted.clones_ram, wanted.clones)
            _refuse_full(wanted.folder, mib)
            async with ram_scene.captured(version, mib, wanted.folder) as it:
                back = await ram_clones.clones(it, wanted.clones, wanted.settle)
            title = f"{wanted.clones} clones, QEMU {version}, {mib} MiB"
            report.add("clones", title, back, clones_table(back))


def _refuse_full(folder: Path, mib: int) -> None:
    """Raises SystemExit where a guest's forms would fill the disk."""
    free, needed = shutil.disk_usage(folder).free // _MIB, _FORMS * mib
    if free < needed:
        raise SystemExit(f"{folder}: {free} MiB are free, and {mib} MiB of RAM need {needed}")


def options(words: list[str]) -> argparse.Namespace:
    """What is to be measured. Raises SystemExit for words that make no sense."""
    parser = argparse.ArgumentParser(prog="bench ram", description=__doc__)
    parts = ["restore", "series", "clones"]
    parser.add_argument("--what", nargs="+", default=parts, choices=parts)
    sizes = [256, 1024, 4096, 8192]
    parser.add_argument("--ram", nargs="+", type=int, default=sizes, help="MiB, for the restores")
    parser.add_argument("--repeat", type=int, default=3, help="restores of each way")
    parser.add_argument("--series-ram", type=int, default=1024, help="MiB")
    parser.add_argument("--snapshots", type=int, default=10)
    parser.add_argument("--interval", type=float, default=10, help="seconds between snapshots")
    parser.add_argument("--load", nargs="+", default=_LOADS, help="of the series")
    parser.add_argument("--clones-ram", type=int, default=1024, help="MiB; less if short of memory")
    parser.add_argument("--clones", type=int, default=20)
    parser.add_argument("--settle", type=float, default=10, help="seconds that the clones run")
    parser.add_argument("--qemu", nargs="+", default=["11.1"], choices=list(binaries()))
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="for all files")
    parser.add_argument("--quick", action="store_true", help="256 MiB, few of everything")
    parser.add_argument("--json", action="store_true", help="the figures, on stdout at the end")
    parser.add_argument("--output", type=Path, help="the tables as Markdown")
    if "--quick" in words:
        parser.set_defaults(**_QUICK)
    chosen = parser.parse_args(words)
    if chosen.snapshots < 2:
        parser.error("--snapshots: a series has two at least")
    return chosen


def main(words: list[str]) -> None:
    chosen = options(words)
    report = Report(quiet=chosen.json)
    asyncio.run(run(chosen, report))
    if chosen.json:
        print(report.json())
    if chosen.output:
        chosen.output.write_text("\n".join(report.tables))
