"""`scripts/bench ram` makes of figures what is read: medians, ratios to the floor, JSON."""

from __future__ import annotations

import json

import pytest

from scripts import bench_ram
from scripts.ram_restores import FLOOR, Row


def _cells(table: str) -> dict[str, list[str]]:
    lines = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")]
    return {way.strip(): [cell.strip() for cell in cells] for way, *cells in lines}


def test_each_way_is_measured_against_the_floor_and_against_the_least_ram(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report, least = bench_ram.Report(quiet=False), {}
    for mib, floor, ours in ((256, [100.0, 300.0, 200.0], [50.0]), (1024, [1000.0], [60.0])):
        rows = [
            Row("11.1", mib, FLOOR, floor),
            Row("11.1", mib, "ours", ours, verb_ms=[80.0], local_ms=[900.0]),
        ]
        report.add("restore", f"{mib} MiB", rows, bench_ram.restore_table(rows, least))
    small, large = map(_cells, report.tables)
    assert small[FLOOR] == ["200.0", "100.0-300.0", "1.000", "1.00", "", "", "", ""]
    assert small["ours"] == [
        "50.0",
        "50.0-50.0",
        "0.250",
        "1.00",
        "80.0",
        "0.400",
        "900.0",
        "4.500",
    ]
    assert large[FLOOR][2:4] == ["1.000", "5.00"]
    assert large["ours"][2:4] == ["0.060", "1.20"]
    assert capsys.readouterr().out.count("### ") == 2
    told = json.loads(report.json())
    assert (told["format"], told["version"]) == ("qmpsnap-bench-ram", 1)
    assert told["restore"][0] == {
        "qemu": "11.1",
        "ram_mib": 256,
        "way": FLOOR,
        "resume_ms": [100.0, 300.0, 200.0],
        "verb_ms": None,
        "local_ms": None,
    }


def test_options_of_a_quick_run_can_still_be_chosen() -> None:
    quick = bench_ram.options(["--quick", "--repeat", "7"])
    assert (quick.ram, quick.repeat, quick.qemu) == ([256], 7, ["11.1"])
    assert bench_ram.options([]).ram == [256, 1024, 4096, 8192]
    with pytest.raises(SystemExit):
        bench_ram.options(["--snapshots", "1"])
