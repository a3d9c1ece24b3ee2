"""The verbs on a real QEMU: results, JSON and exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qmpsnap.cli.shapes import KINDS, schemas
from tests.cli.agent import agent
from tests.cli.conftest import Program, Ran, powered, shipped
from tests.rig.halves import ID
from tests.rig.qemu import ROOT


def shaped(word: str, value: dict[str, Any]) -> dict[str, Any]:
    """*value*, which has the keys and types that programs were promised, no more and no fewer."""
    kind = KINDS[word]
    msgspec.convert(value, kind)
    assert set(value) == set(kind.__struct_fields__)
    return value


def test_the_committed_schemas_are_current() -> None:
    for word, schema in schemas().items():
        committed = ROOT / "docs/schemas" / f"{word}.json"
        assert json.loads(committed.read_text()) == schema, "run scripts/schemas"


def test_what_create_promises() -> None:
    promised = "id vm level ram quiesce pause_ms frozen_ms local store bytes revision state"
    schema = schemas()["cli-create"]["$defs"]
    assert set(promised.split()) <= set(schema["Created"]["required"])
    assert set(schema["Bytes"]["required"]) == {"disks", "vmstate", "shipped"}


async def test_the_whole_job(program: Program, qemu72: Path) -> None:
    async with powered(program, qemu72) as vm:
        reach = ["--socket", vm.qmp]
        info = shaped("info", (await program.ok("info", "web", *reach, "--json")).record)
        assert [disk["name"] for disk in info["disks"]] == ["vd0"]
        levels = {one["what"]: one for one in info["disks"][0]["levels"]}
        possible = {"full": True, "inc": False, "diff": False, "overlay": True}
        assert {what: one["possible"] for what, one in levels.items()} == possible
        assert levels["inc"]["why"] == "the first copy of this disk"
        asked = {one["what"]: one for one in info["possibilities"]}
        assert not asked["--quiesce agent"]["possible"]
        assert "no agent socket" in asked["--quiesce agent"]["why"]
        assert info["blockers"] == []
        text = (await program.ok("info", "web", *reach)).out
        assert "--ram live" in text
        plan = await program.ok("create", "web", *reach, *program.roots, "--dry-run", "--json")
        planned = shaped("create-dry-run", plan.record)
        actions = planned["at_the_instant"]["arguments"]["actions"]
        types = ["block-dirty-bitmap-add", "blockdev-snapshot"]
        assert [action["type"] for action in actions] == types
        assert {action["data"]["node"] for action in actions} == {"d0"}
        (disk,) = planned["disks"]
        assert (disk["level"], disk["parent"]) == ("full", None)
        plan = await program.ok("create", "web", *reach, *program.roots, "--dry-run")
        assert '"execute": "transaction"' in plan.out
        assert (await program.run("list", "web", *reach, *program.roots, "--json")).out == ""

        ran = await program.ok("create", "web", *reach, *program.roots, "--json", "--note", "one")
        made = shaped("create", ran.record)
        assert (made["vm"], made["state"], made["revision"]) == ("web", "paired", 0)
        assert made["pause_ms"] > 0
        assert (program.local / "web" / made["id"] / "storage.json").exists()
        assert (program.store / "web" / made["id"] / "manifest.json").exists()
        second = await program.ok(
            "create", "web", *reach, *program.roots, *("--ram", "none", "-i", "vd0", "-x", "vd0")
        )
        assert "left out" not in second.err

    listed = await program.ok("list", "web", *program.roots, "--json")
    assert [shaped("list", one)["state"] for one in listed.records] == ["paired", "paired"]
    assert (await program.ok("list", *program.roots)).out.count(" paired ") == 2
    shown = shaped("show", (await program.ok("show", "web", made["id"], *program.roots,
                                             "--json")).record)  # fmt: skip
    assert shown["manifest"]["note"] == "one"
    text = (await program.ok("show", "web", made["id"], *program.roots)).out
    assert "for a trial only" in text
    assert str(program.local / "web" / made["id"] / "vd0.qcow2") in text
    good = await program.ok("verify", "web", made["id"], *program.roots, "--json")
    assert shaped("verify", good.record)["findings"] == []

    await restored(program, made["id"])
    refused = await program.run("delete", "web", made["id"], *program.roots, "--json")
    assert refused.code == 3
    assert refused.error["code"] == "refused"

    spoilt = program.store / "web" / made["id"] / "vmstate/stream.zst"
    spoilt.chmod(0o600)
    spoilt.write_bytes(spoilt.read_bytes()[:-9])
    bad = await program.run("verify", "web", made["id"], *program.roots, "--json")
    assert bad.code == 7
    assert shaped("verify", bad.record)["findings"]
    assert shaped("error", {"error": bad.error})
    both = await program.run("verify", "web", "--all", *program.roots, "--json")
    assert [shaped("verify", one)["findings"] == [] for one in both.records] == [False, True]
    assert (both.code, both.records[0]["id"]) == (7, made["id"])
    assert (await program.run("verify", "web", "--all", "--boot", *program.roots)).code == 2
    assert "1 finding" in (await program.run("verify", "web", made["id"], *program.roots)).err

    last = await program.ok("delete", "web", "latest", *program.roots, "--json")
    assert shaped("delete", last.record)["folded"] == []
    assert "not running" in last.record["why"]
    again = await program.run("delete", "web", last.record["id"], *program.roots)
    assert again.code == 3


async def restored(program: Program, id: str) -> None:
    """Restore in each way; the last one leaves its folder behind."""
    ran = await program.ok(
        "restore",
        "web",
        id,
        "--to",
        "built",
        *program.roots,
        "--no-start",
        "--json",
        "--standalone",
    )
    built = shaped("restore-no-start", ran.record)
    assert built["argv"][-1]
    ran = await program.ok("restore", "web", id, "--to", "line", *program.roots, "--no-start")
    assert "defer" in shlex.split(ran.out)

    ran = await program.ok(
        "restore", "web", id, "--to", "off", *program.roots, "--detach", "--json"
    )
    back = shaped("restore", ran.record)
    os.kill(back["pid"], signal.SIGKILL)

    words = ["restore", "web", id, "--to", "many", *program.roots, "--clones", "2", "--json"]
    process = await program.start(*words)
    assert process.stdout is not None
    clones = [shaped("restore", json.loads(await process.stdout.readline())) for _ in range(2)]
    assert [one["clone"] for one in clones] == [1, 2]
    assert [one["clock"] for one in clones] == ["there is no guest agent"] * 2
    for one in clones:
        await quit_qemu(Path(one["qmp"]))
    assert await asyncio.wait_for(process.wait(), 30) == 0

    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        to = f"back{code}"
        process = await program.start("restore", "web", id, "--to", to, *program.roots, "--json")
        assert process.stdout is not None
        assert process.stderr is not None
        back = shaped("restore", json.loads(await process.stdout.readline()))
        assert (await process.stderr.readline()).startswith(b'{"notice":')
        process.send_signal(number)
        _, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == code, err
        assert "interrupted" in err.decode()
        with pytest.raises(ProcessLookupError):
            os.kill(back["pid"], 0)

    process = await program.start("restore", "web", id, "--to", "own", *program.roots, "--json")
    assert process.stdout is not None
    back = json.loads(await process.stdout.readline())
    await quit_qemu(Path(back["qmp"]))
    assert await asyncio.wait_for(process.wait(), 30) == 0


async def quit_qemu(qmp: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(qmp)
    await reader.readline()
    writer.write(b'{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n')
    with contextlib.suppress(ConnectionError):  # QEMU does not wait until we have read all
        await reader.read()
    writer.close()


async def test_what_waits_is_shipped_later(program: Program, qemu72: Path) -> None:
    roots, in_the_way = program.roots, program.store / "web"
    in_the_way.touch()  # where the VM's folder is to be
    async with powered(program, qemu72) as vm:
        ran = await program.run("create", "web", "--socket", vm.qmp, *roots, "--json")
        assert ran.code == 5
        made = shaped("create", ran.record)
        assert made["state"] == "shipping"
        assert ran.error["code"] == "not-shipped"
        assert "qmpsnap ship" in ran.error["hint"]
    ran = await program.ok("list", "web", *roots)
    assert "the store half waits in the spool" in ran.out
    assert "1 shipping" in ran.err
    for words in (["ship"], ["ship", "web"]):
        ran = await program.run(*words, *roots, "--json")
        assert (ran.code, ran.out) == (5, "")
        assert made["id"] in ran.error["message"]
    in_the_way.unlink()
    ran = await program.ok("ship", *roots, "--json")
    assert shaped("ship", ran.record)["id"] == made["id"]
    ran = await program.ok("ship", *roots)
    assert (ran.out, ran.err) == ("", "nothing waits to be shipped\n")


async def test_a_pause_that_is_too_long(program: Program, qemu72: Path) -> None:
    async with powered(program, qemu72) as vm:
        ran = await program.run(
            *("create", "web", "--socket", vm.qmp, *program.roots, "--json"),
            *("--ram", "paused", "--max-pause", "0ms"),
        )
    assert ran.code == 4
    assert ran.error["code"] == "pause-too-long"
    listed = await program.ok("list", "web", *program.roots, "--socket", vm.qmp)
    assert listed.out == ""


async def test_thaw(program: Program) -> None:
    path = program.dir / "agent.sock"
    async with agent(path) as guest:
        guest.may_thaw.set()
        guest.frozen = True
        ran = await program.ok("thaw", "web", "--agent-socket", path, "--json")
        assert shaped("thaw", ran.record)["thawed"] == 1
        ran = await program.ok("thaw", "web", "--agent-socket", path)
        assert ran.out == "web: nothing was frozen\n"
    path.unlink()
    async with agent(path, stubborn=True) as guest:
        guest.may_thaw.set()
        guest.frozen = True
        ran = await program.run("thaw", "web", "--agent-socket", path, "--json")
        assert ran.code == 6
        assert ran.error["code"] == "guest-still-frozen"
        assert ran.error["hint"]


async def test_recover_with_nothing_owed(program: Program, qemu72: Path) -> None:
    async with powered(program, qemu72) as vm:
        ran = await program.ok("recover", "web", "--socket", vm.qmp, *program.roots)
        assert (ran.out, ran.err) == ("", "nothing was owed\n")
    assert (await program.ok("recover", *program.roots, "--json")).out == ""


async def test_two_at_once(program: Program, qemu72: Path) -> None:
    path = program.dir / "agent.sock"
    async with powered(program, qemu72) as vm, agent(path) as guest:
        words = ["--socket", vm.qmp, *program.roots]
        frozen = ["--ram", "none", "--quiesce", "agent", "--agent-socket", path]
        first = await program.start("create", "web", *words, *frozen)
        await asyncio.wait_for(guest.freezing.wait(), 60)
        for verb in ("create", "recover"):
            ran = await program.run(verb, "web", *words, "--json")
            assert ran.code == 3
            assert ran.error["code"] == "vm-busy"
            assert "`create` of process" in ran.error["message"]
        guest.may_freeze.set()
        guest.may_thaw.set()
        _, err = await first.communicate()
        assert first.returncode == 0, err


async def test_json_keeps_stderr_to_objects(program: Program) -> None:
    await shipped(program)
    roots = ["--local", program.local, "--store", program.dir / "nowhere"]
    ran = await program.ok("list", "web", *roots, "--json")
    (warning,) = (json.loads(line) for line in ran.err.splitlines())
    assert "could not be asked" in warning["warning"]
    ran = await program.ok("list", "web", *roots, "--quiet")
    assert ran.err == ""
    assert ID in ran.out


async def test_what_nobody_expected_is_one_line(program: Program) -> None:
    (program.dir / "sitecustomize.py").write_text(
        "import qmpsnap.engine.listing as here\n"
        "async def entries(roots, vm):\n"
        "    raise RuntimeError('first\\nsecond')\n"
        "here.entries = entries\n"
    )
    paths = f"{program.dir}:{ROOT}"
    ran = await program.run("list", *program.roots, PYTHONPATH=paths)
    assert ran.code == 4
    assert ran.err.splitlines()[0] == "qmpsnap: unexpected RuntimeError: first second"
    assert "-vv" in ran.err.splitlines()[1]
    process = await program.start("list", *program.roots, "-vv", PYTHONPATH=paths)
    _, err = await process.communicate()
    assert "Traceback" in err.decode()


def test_ran_notices_a_traceback() -> None:
    with pytest.raises(AssertionError):
        Ran(4, "", "Traceback (most recent call last):")


async def test_metrics_of_good_and_bad_runs(program: Program, qemu72: Path) -> None:
    told = program.dir / "web.prom"
    words = ["web", *program.roots, "--metrics-file", told]

    def value(name: str) -> float | None:
        found = re.search(rf"^{name} (\S+)$", told.read_text(), re.M)
        return None if found is None else float(found[1])

    async with powered(program, qemu72) as vm:
        reach = ["--socket", vm.qmp]
        await program.ok("create", *words, *reach, "--ram", "none")
        assert value('qmpsnap_snapshots{vm="web",state="paired"}') == 1
        assert value('qmpsnap_last_run_exit_code{vm="web",verb="create"}') == 0
        assert value('qmpsnap_last_run_pause_seconds{vm="web",verb="create"}') is not None
        success = value('qmpsnap_last_success_timestamp_seconds{vm="web"}')
        ran = await program.run("create", *words, *reach, "-i", "nosuchdisk")
        assert ran.code == 2
        assert value('qmpsnap_last_run_exit_code{vm="web",verb="create"}') == 2
        assert value('qmpsnap_last_run_pause_seconds{vm="web",verb="create"}') is None
        assert value('qmpsnap_last_success_timestamp_seconds{vm="web"}') == success
        await program.ok("refresh", *words, *reach)
        assert value('qmpsnap_last_run_exit_code{vm="web",verb="refresh"}') == 0
        # a place that is none costs the metrics, not the snapshot
        nowhere = program.dir / "nowhere/web.prom"
        ran = await program.ok("refresh", "web", *program.roots, *reach, "--metrics-file", nowhere)
        assert "nowhere/web.prom" in ran.err


async def test_show_and_info_name_another_host(program: Program, qemu72: Path) -> None:
    await shipped(program)
    shown = (await program.ok("show", "web", "--json", *program.roots)).record
    assert shaped("show", shown)["lease"] is None
    assert "belongs to" not in (await program.ok("show", "web", *program.roots)).out
    elsewhere = ["--local", program.dir / "there", *program.roots[2:]]
    ran = await program.ok("lease", "web", "--take", "--json", *elsewhere)
    assert ran.record["newest"] == ID
    shown = (await program.ok("show", "web", "--json", *program.roots)).record
    assert shaped("show", shown)["lease"]["holder"] == ran.record["holder"]
    text = (await program.ok("show", "web", *program.roots)).out
    assert "lease" in text
    assert f"it belongs to the host {ran.record['host']} ({ran.record['holder'][:8]})" in text
    async with powered(program, qemu72) as vm:
        words = ["info", "web", "--socket", vm.qmp, *program.roots]
        told = shaped("info", (await program.ok(*words, "--json")).record)
        assert told["lease"]["holder"] == ran.record["holder"]
        lines = (await program.ok(*words)).out.splitlines()
        assert any(re.match("lease +it belongs to the host", line) for line in lines)
        assert any(re.match("snapshot +web is not this host's", line) for line in lines)
        told = (await program.ok("info", "web", "--socket", vm.qmp, "--json")).record
        assert told["lease"] is None  # no roots, no store to ask
