"""`restore --limits`: a real machine in a real control group, and out of it again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from qmpsnap.engine.captured import as_limits
from qmpsnap.host import cage, cgroup, site
from qmpsnap.host.limits import GroupLimits, limits
from tests.cli.conftest import Program, ended, line, powered
from tests.cli.test_verbs import shaped
from tests.rig.groups import settable

HEAD = ["LIMIT", "CAPTURED", "MEASURED", "SUGGESTED", "SET", "WHY"]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


def gone(groups: list[str]) -> bool:
    return not any(Path(folder).exists() for folder in groups)


def open_files(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(link.readlink()))
    return found


def held(wanted: GroupLimits, pid: int) -> dict[str, object]:
    """The limits of the group of *pid*, as far as they are *wanted*."""
    seen = limits(cgroup.folders_of(pid))
    fields = [name for name in wanted.__struct_fields__ if getattr(wanted, name) is not None]
    return {name: getattr(seen, name) for name in fields}


async def test_a_restored_machine_is_limited(program: Program, qemu72: Path) -> None:
    wanted = settable()
    named = {name: one for name, one in msgspec.structs.asdict(wanted).items() if one is not None}
    async with (
        cage.made(site.site(wanted), "captured") as group,
        powered(program, qemu72) as vm,
    ):
        for folder in group.folders:
            (folder / "cgroup.procs").write_text(str(vm.pid))
        await program.ok("create", "web", "--socket", vm.qmp, *program.roots)
        asked = await program.ok("info", "web", "--socket", vm.qmp, *program.roots, "--json")
        known = shaped("info", asked.record)["limits"]
        own = {one["folder"]: one for one in known["groups"]}
        limited = [folder for folder in group.folders if folder.parts[-2] != "cpuset"]
        assert {str(folder) for folder in limited} <= set(own)
        assert all(one["enough"] for one in own.values())
        assert known["why"] == ""
        if wanted.pids_max_count is not None:
            # where no thread can be started, QEMU would end, and the guest with it
            (folder,) = (one for one in group.folders if (one / "pids.max").exists())
            (folder / "pids.max").write_text((folder / "pids.current").read_text())
            for more in (["--dry-run"], ["--ram", "none"]):
                ran = await program.run("create", "web", "--socket", vm.qmp, *program.roots, *more)
                assert (ran.code, ran.out) == (3, "")
                assert f"{folder}/pids.max: 0 of " in ran.err
            ran = await program.run("refresh", "web", "--socket", vm.qmp, *program.roots)
            assert ran.code == 3
            asked = await program.ok("info", "web", "--socket", vm.qmp, *program.roots, "--json")
            (blocker,) = asked.record["blockers"]
            assert blocker["of"] == "snapshot"
            assert not all(one["enough"] for one in asked.record["limits"]["groups"])
    words = ["restore", "web", "--to", "back", *program.roots]

    same = (await program.ok(*words, "--check", "--limits", "same", "--json")).record
    rows = {one["limit"]: one for one in shaped("restore-check", same)["limits"]}
    assert set(named) <= set(rows)  # we may be limited ourselves
    for name, most in named.items():
        assert rows[name]["captured"] == rows[name]["chosen"] == most
        assert rows[name]["why"] == "of its group"
    verdicts = {row["what"]: row["verdict"] for row in same["rows"]}
    assert len(verdicts) == len(same["rows"])
    assert verdicts["limits"] == verdicts["control group"] == "ok"
    text = (await program.ok(*words, "--check", "--limits", "suggest")).out
    assert HEAD in [row.split() for row in text.splitlines()]
    assert "all its RAM, 32.0 MiB" in text
    assert not (program.dir / "back").exists()

    # with us, until the program is told to end
    process = await program.start(*words, "--limits", "same", "--json")
    assert process.stdout is not None
    async with asyncio.timeout(60):
        back = shaped("restore", msgspec.json.decode(await process.stdout.readline()))
    assert held(wanted, back["pid"]) == named
    groups = back["groups"]
    assert groups
    assert not gone(groups)
    process.send_signal(signal.SIGTERM)
    assert (await ended(process)).code == 143
    assert gone(groups)

    # beyond us, until the machine ends
    words[3] = "again"
    ran = await program.ok(*words, "--limits", "suggest", "--detach", "--json")
    again = shaped("restore", ran.record)
    try:
        asked = {one["limit"]: one["chosen"] for one in again["limits"]}
        chosen = {name: one for name, one in asked.items() if one is not None}
        assert held(as_limits(chosen), again["pid"]) == chosen
        assert set(again["groups"]) <= open_files(again["pid"])  # they stay for as long
    finally:
        os.kill(again["pid"], signal.SIGKILL)
    await until(lambda: gone(again["groups"]))

    # what cannot be, is refused before anything is made
    words[3] = "never"
    ran = await program.run(*words, "--limits", "same", "--limits-parent", "/qs/no/such")
    assert (ran.code, ran.out) == (3, "")
    assert "there is no control group /qs/no/such" in ran.err
    if "pids" in cgroup.folders_of(os.getpid()) and wanted.pids_max_count is not None:
        async with cage.made(site.site(GroupLimits(pids_max_count=60)), "tight") as group:
            process = await asyncio.create_subprocess_exec(
                *(*group.words, *line(*words, "--limits", "same", "--json")),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=program.dir,
                env=program.surroundings(),
                pass_fds=group.hold,
            )
            ran = await ended(process)
        assert ran.code == 3
        told = f"pids: pids.max: 300 is above the 60 of {group.folders[0]}"
        assert told in ran.error["message"]
        assert ran.error["code"] == "blocked"
    assert not (program.dir / "never").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--limits", "most"], "--limits: not one of none, same, suggest: 'most'"),
        (["--limits-parent", "/vms"], "--limits-parent: there is no group to make"),
    ],
)
async def test_misused(program: Program, words: list[str], told: str) -> None:
    ran = await program.run("restore", "web", "--to", "back", *program.roots, *words)
    assert ran.code == 2
    assert told in ran.err
