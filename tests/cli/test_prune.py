"""prune, protect and unprotect as a user calls them: decisions, JSON, exit codes."""

from __future__ import annotations

import pytest

from qmpsnap.store.layout import StoreRoot
from tests.cli.conftest import Program
from tests.cli.test_verbs import shaped
from tests.rig.series import VM, Series


@pytest.fixture
def series(program: Program) -> Series:
    return Series(program.dir, program.store)


async def test_prune_from_the_first_look_to_the_end(program: Program, series: Series) -> None:
    names = series.chain(4)
    held = await program.ok("protect", VM, names[1], "--note", "as sold", *program.roots, "--json")
    assert shaped("protect", held.record)["protected"]
    refused = await program.run("delete", VM, names[1], *program.roots, "--json")
    assert (refused.code, refused.error["code"]) == (3, "refused")
    assert "as sold" in refused.error["message"]
    assert "unprotect" in refused.error["hint"]
    listed = await program.ok("list", VM, *program.roots, "--json")
    assert [one["protected"] for one in listed.records] == [name == names[1] for name in names]
    assert "protected" in (await program.ok("list", VM, *program.roots)).out

    rule = ["prune", VM, *program.roots, "--keep-last", "1"]
    dry = await program.ok(*rule, "--dry-run", "--json")
    decisions = [shaped("prune", one)["decision"] for one in dry.records]
    assert decisions == ["remove", "keep", "remove", "keep"]
    assert dry.records[1]["reasons"] == ["protected"]
    assert dry.records[2]["reasons"] == ["no rule keeps it", f"images merged into {names[3]}"]
    assert len((await program.ok("list", VM, *program.roots, "--json")).records) == 4

    text = await program.ok(*rule, "--no-merge")
    rows = [line.split()[:5] for line in text.out.splitlines()]
    assert rows[0] == ["ID", "TAKEN", "STATE", "DECISION", "WHY"]
    assert [row[4] for row in rows[1:]] == ["images", "keep", "images", "keep"]
    assert "kept: 2; removed: 0" in text.err
    done = await program.ok(*rule, "--json")
    assert done.out != dry.out
    assert [(one["state"], one["decision"]) for one in done.records] == [
        ("deleted", "remove"), ("paired", "keep"), ("deleted", "remove"), ("paired", "keep")
    ]  # fmt: skip
    await series.expect(names[1], names[3])

    assert "not protected" in (await program.ok("unprotect", VM, names[1], *program.roots)).out
    assert (await program.ok(*rule, "--json")).records[0]["decision"] == "remove"
    assert (await program.ok("verify", VM, *program.roots)).out.count("all is well") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no rule says what is to be kept"),
        (["--keep-last", "0"], "no rule says what is to be kept"),
        (["--keep-last", "-1"], "--keep-last"),
        (["--keep-daily", "x"], "--keep-daily"),
        (["--keep-within", "a month"], "--keep-within: not a duration: 'a month'"),
    ],
)
async def test_no_rule_removes_nothing(
    program: Program, series: Series, words: list[str], told: str
) -> None:
    series.chain(2)
    ran = await program.run("prune", VM, *program.roots, *words, "--json")
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.error["message"]
    assert len((await program.ok("list", VM, *program.roots, "--json")).records) == 2


async def test_what_could_not_be_merged_is_in_the_exit_code(
    program: Program, series: Series
) -> None:
    names = series.chain(2)
    image = series.root.image(VM, names[0], "vda", "qcow2")
    image.write_bytes(image.read_bytes()[:-1] + b"\1")
    ran = await program.run("prune", VM, *program.roots, "--keep-last", "1", "--json")
    assert (ran.code, ran.error["code"]) == (4, "local-failed")
    assert "could not be merged" in ran.records[0]["reasons"][-1]
    assert image.exists()


async def test_a_store_that_is_not_there_costs_nothing(program: Program, series: Series) -> None:
    names = series.chain(3)
    away = program.store.with_name(f"{program.store.name}-away")
    program.store.rename(away)
    try:
        ran = await program.run("prune", VM, *program.roots, "--keep-last", "1", "--json")
        dry = await program.ok(
            "prune", VM, *program.roots, "--keep-last", "1", "--dry-run", "--json"
        )
    finally:
        away.rename(program.store)
    assert ran.code in {3, 4}
    assert {one["decision"] for one in dry.records} == {"keep"}
    assert "the store could not be asked" in dry.records[0]["reasons"][0]
    await series.expect(*names)
    assert StoreRoot(program.store).manifest(VM, names[0]).exists()
