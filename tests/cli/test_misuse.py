"""Bad words, roots, sockets and files, for every verb: one line, a hint, the right exit code."""

from __future__ import annotations

import asyncio
import itertools
import socket
from pathlib import Path

import pytest

from tests.cli.conftest import Program, powered, shipped
from tests.rig.halves import ID

ALL_BUT_RUN = {
    "create": [],
    "list": [],
    "show": [],
    "info": [],
    "verify": [],
    "restore": ["--to", "back"],
    "ship": [],
    "delete": [ID],
    "prune": ["--keep-last", "1"],
    "protect": [ID],
    "unprotect": [ID],
    "recover": [],
    "thaw": [],
}
ROOTED = sorted(set(ALL_BUT_RUN) - {"info", "thaw"})
HEAD = ["ID", "STATE", "TAKEN", "LEVEL", "RAM", "PAUSE", "NOTE"]
MEETING = ["create", "info", "recover", "thaw"]  # those that cannot do without the VM


def words(verb: str, vm: str = "web") -> list[str]:
    return [verb, vm, *ALL_BUT_RUN[verb]]


@pytest.mark.parametrize(
    ("verb", "name"),
    list(zip(sorted(ALL_BUT_RUN), itertools.cycle(["../up", "a/b", ID, "x" * 65]), strict=False)),
)
async def test_a_name_that_cannot_be(program: Program, verb: str, name: str) -> None:
    roots = program.roots if verb != "thaw" else []
    ran = await program.run(*words(verb, name), *roots, "--socket", "nobody.sock")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"qmpsnap: not a name for a VM: {name!r}\n"


@pytest.mark.parametrize("verb", sorted(ALL_BUT_RUN))
async def test_an_unknown_vm(program: Program, verb: str) -> None:
    roots = program.roots if verb != "thaw" else []
    ran = await program.run(*words(verb, "nosuch"), *roots, "--json")
    assert ran.code == 3
    assert ran.error["code"] in {"vm-unknown", "snapshot-unknown"}
    assert "nosuch" in ran.error["message"]
    assert ran.error["hint"]


@pytest.mark.parametrize("verb", MEETING)
async def test_a_dead_socket(program: Program, verb: str) -> None:
    dead = program.dir / "dead.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))
    roots = program.roots if verb != "thaw" else []
    given = "--agent-socket" if verb == "thaw" else "--socket"
    ran = await program.run(*words(verb), *roots, given, dead, "--json")
    assert ran.code == (6 if verb == "thaw" else 3)  # who asks for a thaw has a frozen guest
    assert str(dead) in ran.error["message"]


async def test_a_socket_that_another_client_holds(program: Program, qemu72: Path) -> None:
    async with powered(program, qemu72) as vm:
        reader, writer = await asyncio.open_unix_connection(vm.qmp)
        await reader.readline()
        for verb in ("create", "info"):
            ran = await program.run(*words(verb), *program.roots, "--socket", vm.qmp, "--json")
            assert ran.code == 3
            assert ran.error["code"] == "monitor-busy"
            assert "it serves" in ran.error["message"]
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("verb", sorted(ALL_BUT_RUN))
async def test_a_broken_configuration(program: Program, verb: str) -> None:
    config = program.dir / "broken.toml"
    config.write_text('local = "/srv"\nstore = \n')
    ran = await program.run(*words(verb), "--config", config)
    assert ran.code == 2
    assert ran.err.startswith(f"qmpsnap: {config}: ")
    assert "line 2" in ran.err


@pytest.mark.parametrize("verb", ROOTED)
async def test_no_roots(program: Program, verb: str) -> None:
    ran = await program.run(*words(verb), "--socket", "x.sock", "--store", program.store)
    assert ran.code == 2
    assert "no local root" in ran.err
    assert "hint: give --local DIR" in ran.err
    ran = await program.run(*words(verb), "--socket", "x.sock", "--local", program.local)
    assert ran.code == 2
    assert "no store root" in ran.err


async def test_a_store_that_is_no_folder(program: Program, qemu72: Path) -> None:
    file = program.dir / "file"
    file.touch()
    roots = ["--local", program.local, "--store", file, "--allow-local-store"]
    async with powered(program, qemu72) as vm:
        ran = await program.run("create", "web", *roots, "--socket", vm.qmp, "--json")
    assert ran.code == 3
    assert str(file) in ran.error["message"]


async def test_a_pair_on_one_file_system(program: Program, qemu72: Path) -> None:
    beside = program.dir / "beside"
    beside.mkdir()
    async with powered(program, qemu72) as vm:
        for more in ([], ["--dry-run"]):
            roots = ["--local", program.local, "--store", beside]
            ran = await program.run("create", "web", *roots, "--socket", vm.qmp, "--json", *more)
            assert ran.code == 3
            assert ran.error["code"] == "store-refused"
            assert "same file system" in ran.error["message"]


async def test_a_local_root_that_cannot_be_written(program: Program, qemu72: Path) -> None:
    (program.dir / "file").touch()
    roots = ["--local", program.dir / "file/below", "--store", program.store]
    async with powered(program, qemu72) as vm:
        ran = await program.run(
            "create", "web", *roots, "--allow-local-store", "--socket", vm.qmp, "--json"
        )
    assert ran.code == 4
    assert ran.error["code"] == "local-failed"


@pytest.mark.parametrize(
    ("verb", "id"),
    [
        ("show", ""),
        ("show", "LATEST"),
        ("verify", "2026-11-22"),
        ("restore", "20261122T1650Z"),
        ("delete", "../.."),
    ],
)
async def test_an_id_that_cannot_be(program: Program, verb: str, id: str) -> None:
    more = ["--to", "back"] if verb == "restore" else []
    ran = await program.run(verb, "web", id, *more, *program.roots)
    assert ran.code == 2
    assert ran.err.startswith(f"qmpsnap: not a snapshot ID: {id!r}\nhint: ")


@pytest.mark.parametrize(
    "options",
    [
        ["--max-pause", "soon"],
        ["--max-pause", "200"],
        ["--max-pause", "-1s"],
        ["--pause", ""],
        ["--ram", "all"],
        ["--level", "best"],
        ["--ram-from", "../up"],
        ["--quiesce", "maybe"],
        ["--nosuch"],
        ["another-vm"],
    ],
    ids=" ".join,
)
async def test_create_with_words_that_cannot_be(program: Program, options: list[str]) -> None:
    ran = await program.run("create", "web", "--socket", "x.sock", *program.roots, *options)
    assert ran.code == 2
    assert ran.err.startswith("qmpsnap: ")
    told = options[0] if options[0].startswith("--") else options[-1]
    assert told in ran.err


@pytest.mark.parametrize(
    "words",
    [["bogus"], ["create"], ["create", "--json"], ["restore", "web"], ["run"], ["delete", "web"]],
    ids=" ".join,
)
async def test_a_line_that_cannot_be(program: Program, words: list[str]) -> None:
    ran = await program.run(*words)
    assert (ran.code, ran.out) == (2, "")
    if "--json" in words:
        assert ran.error["code"] == "usage-error"
    else:
        assert ran.err.startswith("qmpsnap: ")
        assert "--help" in ran.err


async def test_a_manifest_cut_short(program: Program) -> None:
    await shipped(program)
    manifest = program.store / "web" / ID / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100])
    ran = await program.ok("list", "web", "--json", *program.roots)
    assert ran.record["state"] == "damaged"
    assert "manifest.json: is not what manifest.sig" in ran.record["why"]
    for verb in ("show", "restore"):
        ran = await program.run(verb, "web", ID, *ALL_BUT_RUN[verb], *program.roots, "--json")
        assert ran.code == 7
        assert "manifest.json: is not what manifest.sig" in ran.error["message"]
    ran = await program.run("verify", "web", ID, *program.roots, "--json")
    assert ran.code == 7
    assert ran.record["findings"]
    assert not (program.dir / "back").exists()


async def test_foreign_files_in_the_store(program: Program) -> None:
    await shipped(program)
    (program.store / "lost+found").mkdir()
    (program.store / "a file").touch()
    (program.store / "web/README").touch()
    (program.store / "web/20269999T000000000Z").mkdir()
    ran = await program.ok("list", "--json", *program.roots)
    assert [(one["id"], one["state"]) for one in ran.records] == [(ID, "paired")]
    ran = await program.ok("list", *program.roots)
    assert ran.err == ""
    assert ran.out.splitlines()[0].split() == ["VM", *HEAD]


async def test_a_note_does_not_steer_the_terminal(program: Program) -> None:
    await shipped(program, note="nice \x1b[2J try")
    ran = await program.ok("list", "web", *program.roots)
    assert "\x1b" not in ran.out
    assert "nice" in ran.out


async def test_restore_into_a_folder_that_is_not_empty(program: Program) -> None:
    await shipped(program)
    (program.dir / "back").mkdir()
    (program.dir / "back/mine").touch()
    ran = await program.run("restore", "web", "--to", "back", *program.roots, "--cold")
    assert ran.code in {2, 7}
    assert (program.dir / "back/mine").exists()


async def test_whoever_reads_stdout_may_go(program: Program) -> None:
    await shipped(program)
    process = await program.start("list", "web", *program.roots)
    assert process.stdout is not None
    process.stdout._transport.close()  # type: ignore[attr-defined]
    assert process.stderr is not None
    assert await process.stderr.read() == b""
    assert await process.wait() == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--keep-macs"], "--keep-macs"),
        (["--clones", "2", "--qmp-socket", "qmp.sock"], "--qmp-socket"),
        (["--clones", "0"], "--clones"),
    ],
)
async def test_what_makes_no_sense_of_clones(program: Program, more: list[str], told: str) -> None:
    ran = await program.run("restore", "web", "--to", "back", *program.roots, *more)
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err
    assert not (program.dir / "back").exists()
