"""README.md is true: its walk works as written, on every QEMU."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig.guest import built
from tests.rig.qemu import ROOT

README = (ROOT / "README.md").read_text()
SECTION = "Five minutes with a QEMU of your own"


def walk() -> str:
    """The walk's blocks, one after the other, as one script."""
    section = README.split(f"\n## {SECTION}\n")[1].split("\n## ")[0]
    script = ["set -eu"]
    for language, block in re.findall(r"^```(sh|python)\n(.*?)^```$", section, re.M | re.S):
        script.append(block if language == "sh" else f"python <<'PYTHON'\n{block}PYTHON\n")
    return "\n".join(script)


@pytest.mark.guest
def test_the_walk_works_as_written(qemu: Path, short: Path) -> None:
    built()
    path = f"{Path(sys.executable).parent}:{qemu.parent}:{os.environ['PATH']}"
    surroundings = os.environ | {"PATH": path, "WALK": str(short / "walk")}
    log = short / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", "-c", walk()],
            cwd=ROOT,
            env=surroundings,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(200)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what a walk cut short left behind
    said = log.read_text(errors="replace")
    assert code == 0, said
    before, restored, further = map(int, re.findall(r"^W [0-9a-f]{16} (\d+)\r?$", said, re.M))
    assert before <= restored < further
    assert len(set(re.findall(r"^W ([0-9a-f]{16}) \d+\r?$", said, re.M))) == 1
    assert said.count(": deleted") == 3
    # the disk was never another file, and nothing stays of the snapshots
    assert "folded: " not in said
    assert not list((short / "walk").glob(".qmpsnap-*"))
    assert not list((short / "walk/local/web").rglob("*.qcow2"))


@pytest.mark.parametrize(
    "page", sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")]), ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target


def test_every_exit_code_is_in_the_table() -> None:
    codes = set(re.findall(r"exit_code = (\d)", (ROOT / "qmpsnap/errors.py").read_text()))
    table = README.split("| exit code | means |")[1].split("\n\n")[0]
    assert codes <= set(re.findall(r"^\| (\d) ", table, re.M))
