"""docs/cli.md is true: its commands run as they stand; exit-codes.md and the code agree."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tomllib
from pathlib import Path

from qmpsnap import config, errors
from tests.cli.conftest import Program, ended
from tests.rig.qemu import ROOT

DOCS = ROOT / "docs"


async def test_the_walk(program: Program, qemu72: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", (DOCS / "cli.md").read_text(), re.M | re.S)
    bin = program.dir / "bin"
    bin.mkdir()
    (bin / "qmpsnap").write_text(f'#!/bin/sh\nexec {sys.executable} -m qmpsnap "$@"\n')
    (bin / "qmpsnap").chmod(0o700)
    (bin / "qemu-system-x86_64").symlink_to(qemu72)
    here = program.surroundings(
        PATH=f"{bin}:{os.environ['PATH']}", STORE=str(program.store), PYTHONUNBUFFERED="1"
    )
    try:
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", "\n".join(["set -eu -o pipefail", *blocks])),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=program.dir,
            env=here,
        )
        ran = await ended(process, within=500)  # some fifty commands
    finally:
        for pid in machines(program.dir):
            os.kill(pid, signal.SIGKILL)
    assert ran.code == 0, ran.err
    assert "before the upgrade" in ran.out
    assert "all is well" in ran.out
    assert "deleted" in ran.out
    assert len(blocks) > 8


def machines(folder: Path) -> list[int]:
    """The QEMUs that were started in *folder*, or on files there."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
            words.append(os.fsencode((entry.parent / "cwd").readlink()))
        except OSError:
            continue
        if b"qemu-system" in words[0] and any(os.fsencode(folder) in word for word in words):
            found.append(int(entry.parent.name))
    return found


def test_every_error_is_in_the_table_with_its_exit_code() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \| (.*) \|$", (DOCS / "exit-codes.md").read_text(), re.M)
    told = {
        code: int(number)
        for number, codes in rows
        if number.isdecimal()
        for code in re.findall(r"`([a-z-]+)`", codes)
        if "| " not in codes
    }
    kinds = [errors.SnapError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    ours = {kind for kind in kinds[1:] if kind.__module__ == errors.__name__}
    assert len(ours) > 20
    for kind in ours:
        word = kind.code.fget(kind.__new__(kind))  # type: ignore[attr-defined]
        assert told.get(word) == kind.exit_code, word


def test_the_example_configuration_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(
        r"^```toml\n(.*?)^```$", (DOCS / "configuration.md").read_text(), re.M | re.S
    )
    file = tmp_path / "qmpsnap.toml"
    file.write_text(example)
    assert set(config.load(file).vms) == {"web", "mail"}
    known = {
        "local",
        "store",
        "allow_local_store",
        "store_timeout",
        "ship_retry",
        "lease",
        "ram_images",
        "ram_images_in",
        "keys",
        "encrypt",
        "vm",
    }
    assert set(tomllib.loads(example)) == known
