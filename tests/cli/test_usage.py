"""`usage` and `show --usage` on a real QEMU: tables, CSV, JSON, bars, and what cannot be read."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from qmpsnap import Engine
from qmpsnap.cli import chart, picture, units
from qmpsnap.engine import usage
from qmpsnap.engine.history import Record, earlier
from qmpsnap.engine.row import Row, row
from tests.cli.conftest import Program, powered, shipped
from tests.unit import test_raster
from tests.unit.test_usage import FIRST


async def test_a_history_of_two(program: Program, qemu72: Path) -> None:
    async with powered(program, qemu72) as vm:
        reach = ["--socket", vm.qmp, *program.roots, "--ram", "none", "--json"]
        ids = [(await program.ok("create", "web", *reach)).record["id"] for _ in range(2)]
    lines = (await program.ok("usage", "web", *program.roots, "--json")).records
    first, second = (msgspec.convert(line, Record) for line in lines)
    assert [first.id, second.id] == ids
    assert first.usage is not None
    assert first.usage.since_last is None
    assert second.usage is not None
    assert second.usage.since_last is not None
    assert second.usage.since_last.since == ids[0]

    # what a suggestion is made from, besides the snapshot itself
    roots = Engine(program.local, program.store, allow_local_store=True).roots
    assert [one.id for one in await earlier(roots, "web", ids[1])] == [ids[0]]
    assert await earlier(roots, "web", ids[0]) == []
    assert len(await earlier(roots, "web", "9", most=1)) == 1

    text = (await program.ok("usage", "web", *program.roots)).out
    head, *rows = text.splitlines()
    assert head.split()[:4] == ["ID", "INTERVAL", "CPUS", "VCPUS"]
    assert [row.split()[0] for row in rows] == ids
    assert rows[0].split()[1:4] == ["-", "-", "-"]

    table = (await program.ok("usage", "web", *program.roots, "--csv")).out
    read = list(csv.DictReader(io.StringIO(table)))
    assert list(read[0]) == list(Row.__struct_fields__)
    assert read[0]["cpu_share"] == ""  # absent, and not 0
    over = second.usage.since_last
    assert float(read[1]["cpu_share"]) == over.cpu_share
    assert float(read[1]["interval_seconds"]) == over.seconds
    assert second.usage.before.memory is not None
    assert int(read[1]["rss_bytes"]) == second.usage.before.memory.rss_bytes
    assert second.usage.store_root is not None
    assert int(read[1]["store_root_free_bytes"]) == second.usage.store_root.free_bytes

    drawn = ElementTree.fromstring((await program.ok("usage", "web", *program.roots, "--svg")).out)
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    assert {one.text for one in drawn.iter() if one.text} >= {"CPUs in use", "RSS", "written"}

    await program.ok("usage", "web", *program.roots, "--png", "web.png")
    content = (program.dir / "web.png").read_bytes()
    colours = {dot for row in test_raster.read(content) for dot in row}
    assert {(0x0B, 0x6B, 0xCB), (0xC2, 0x57, 0x0C)} <= colours
    ran = await program.run("usage", "web", *program.roots, "--png", "no/such/folder.png")
    assert (ran.code, ran.out) == (4, "")
    assert "no/such/folder.png: No such file or directory" in ran.err

    bars = (await program.ok("usage", "web", *program.roots, "--chart", "memory")).out
    assert bars.count("█" * 30) == 2

    shown = (await program.ok("show", "web", ids[1], *program.roots, "--usage")).out
    for word in ("vCPU 0", "vd0", f"since {ids[0]}", "RSS", "LATENCY", "GROUP", "store root"):
        assert word in shown, word
    one = await program.ok("show", "web", ids[1], *program.roots, "--usage", "--json")
    assert msgspec.convert(one.record, Record) == second

    # one that cannot be read does not hide the other
    broken = program.store / "web" / ids[0] / "usage.json"
    broken.chmod(0o600)
    broken.write_text("{}")
    ran = await program.ok("usage", "web", *program.roots)
    assert [row.split()[0] for row in ran.out.splitlines()[1:]] == ids
    assert ids[0] in ran.err
    assert (await program.run("show", "web", ids[0], *program.roots, "--usage")).code == 7


async def test_misuse(program: Program) -> None:
    for words in (
        ["--csv", "--json"],
        ["--chart", "cpu", "--csv"],
        ["--svg", "--png", "web.png"],
        ["--chart", "colour"],
    ):
        ran = await program.run("usage", "web", *program.roots, *words)
        assert (ran.code, ran.out) == (2, "")
    assert (await program.run("usage", "nobody", *program.roots)).code == 3


async def test_a_spool_without_usage_says_so(program: Program) -> None:
    await shipped(program)
    lines = (await program.ok("usage", "web", *program.roots, "--json")).records
    assert [line["usage"] for line in lines] == [None]
    assert "usage.json" in lines[0]["why"]


def test_a_picture_has_gaps_where_nothing_is_known() -> None:
    shares = [0.5, 1.0, None, 0.25, None]
    rows = [
        Row(
            vm="a<b",
            id="x",
            state="paired",
            taken_at=f"2026-11-2{day}T00:00:00.000Z",
            cpu_share=one,
        )
        for day, one in enumerate(shares)
    ]
    drawn = ElementTree.fromstring(picture.svg(picture.drawn("a<b", rows)))
    kinds = [one.tag.rpartition("}")[2] for one in drawn.iter()]
    assert kinds.count("circle") == 3
    (line,) = [one for one in drawn.iter() if one.tag.endswith("polyline")]
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line.attrib["points"].split())
    assert x1 < x2
    assert y1 > y2  # upwards is more
    assert "a<b" in str(drawn.findtext("{http://www.w3.org/2000/svg}text"))
    assert "no snapshots" in picture.svg(picture.drawn("web", []))


def test_a_bar_in_eighths() -> None:
    assert chart.bar(1, 2, width=2) == "█"
    assert chart.bar(9, 16, width=2) == "█▏"
    assert chart.bar(0.0001, 1) == "▏"  # little is not nothing
    assert chart.bar(0, 1) == chart.bar(None, 1) == ""


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (units.duration(0.0005), "0.50 ms"),
        (units.duration(119), "119.0 s"),
        (units.duration(7200), "2.0 h"),
        (units.duration(None), "-"),
        (units.per_second(1536), "1.5 KiB/s"),
        (units.percent(0.025), "2.5 %"),
        (units.numbers([5, 0, 1, 2]), "0-2,5"),
        (units.numbers([]), "none"),
    ],
)
def test_units(told: str, text: str) -> None:
    assert told == text


def test_a_record_of_version_1_has_a_row() -> None:
    old = usage.decode(json.dumps(FIRST), "usage.json")
    found = row(Record(vm="web", id="a", state="paired", taken_at=None, usage=old))
    assert (found.rss_bytes, found.cpu_share, found.host_load_1_minute) == (4096, None, 0.5)
