"""docs/python-api.md is true: its example runs against a real guest."""

from __future__ import annotations

import asyncio
import inspect
import re
import sys
from pathlib import Path

import pytest

from qmpsnap import Engine
from tests.rig.guest import booted
from tests.rig.qemu import ROOT

PAGE = (ROOT / "docs/python-api.md").read_text()


@pytest.mark.guest
async def test_the_example_runs(qemu72: Path, short: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    (short / "store").mkdir()
    async with booted(qemu72, short) as guest:
        # the example calls the monitor by another name than the rig
        (short / "qmp.sock").symlink_to(guest.qmp)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-W", "error", "-c", example),
            cwd=short,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
        witness = await guest.console.witness(within=20)
    said = out.decode()
    assert process.returncode == 0, said
    assert "agent " in said
    assert re.search(r"^\d+ running$", said, re.M)
    assert "restored machines stand on it" in said
    assert witness.ok


def test_every_method_of_the_engine_is_in_the_table() -> None:
    methods = {name for name, _ in inspect.getmembers(Engine, inspect.isfunction)}
    assert {name for name in methods if not name.startswith("_")} == set(
        re.findall(r"^\| `(\w+)\(", PAGE, re.M)
    )
