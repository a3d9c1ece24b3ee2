"""--help: complete, and nothing heavy is loaded for it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.cli.conftest import Program
from tests.rig.qemu import ROOT

VERBS = [
    "create",
    "refresh",
    "list",
    "show",
    "usage",
    "info",
    "verify",
    "restore",
    "export",
    "ship",
]
VERBS += ["lease", "delete", "prune", "protect", "unprotect", "recover", "thaw", "run"]
KEYS = ["keys show", "keys export", "keys import", "keys rotate", "keys forget", "keys sign"]
HEAVY = "qmpsnap.engine qmpsnap.hypervisor qmpsnap.store qmpsnap.host qmpsnap.config"
HEAVY += " qemu psutil zstandard blake3 rich msgspec asyncio cryptography"
_LOADED = """
import sys
from qmpsnap.cli.main import main
main(sys.argv[1:])
print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words", [[], *(verb.split() for verb in (*VERBS, "keys", *KEYS))], ids=" ".join
)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    asked = [sys.executable, "-c", _LOADED, *words, "--help"]
    ran = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(ran.stderr.split())
    assert "Usage: qmpsnap" in ran.stdout
    assert "qmpsnap.cli.main" in loaded
    assert not loaded & set(HEAVY.split())


@pytest.mark.parametrize("verb", [*VERBS, *KEYS])
async def test_help_of_each_verb_is_complete(program: Program, verb: str) -> None:
    text = (await program.ok(*verb.split(), "--help")).out
    options = text.partition("Options:\n")[2].partition("  -h, --help")[0]
    entries = re.findall(r"^  (-\S.*?)(?=^  -|\Z)", options, re.M | re.S)
    assert entries
    for entry in entries:
        words = " ".join(entry.split())
        flag = "--verbose" in words or "Print what would" in words or "required" in words
        assert flag or re.search(r"[Dd]efault", words), f"{verb}: no default: {words}"
    assert re.search(r"Examples?:\n +qmpsnap " + verb, text)
    assert re.search(r"Exit codes:(?s:.*)2 usage", text)


async def test_the_first_help_lists_the_verbs_and_all_exit_codes(program: Program) -> None:
    text = (await program.ok("--help")).out
    listed = re.findall(r"^  (\w+) ", text.partition("Commands:\n")[2].partition("Exit")[0], re.M)
    assert listed == [*VERBS, "keys"]
    below = (await program.ok("keys", "--help")).out
    listed = re.findall(r"^  (\w+) ", below.partition("Commands:\n")[2].partition("Exam")[0], re.M)
    assert [f"keys {verb}" for verb in listed] == KEYS
    assert re.findall(r"^    (\d+) ", text, re.M) == ["0", "2", "3", "4", "5", "6", "7", "130"]
    assert (await program.ok()).out == text


async def test_shell_completion(program: Program) -> None:
    (program.local / "web" / "20261122T165057123Z").mkdir(parents=True)
    config = program.dir / "c.toml"
    config.write_text(f'local = "{program.local}"\n[vm.mail]\nsocket = "m.sock"\n')

    async def completed(*words: str) -> list[str]:
        line = " ".join(["qmpsnap", *words])
        ran = await program.run(
            _QMPSNAP_COMPLETE="complete_bash",
            COMP_WORDS=line,
            COMP_CWORD=str(len(words)),
            QMPSNAP_CONFIG=str(config),
        )
        return ran.out.split()

    assert await completed("cre") == ["create"]
    assert await completed("show", "") == ["mail", "web"]
    assert await completed("show", "w") == ["web"]
    assert await completed("show", "web", "2026") == ["20261122T165057123Z"]
    assert await completed("keys", "im") == ["import"]
    assert await completed("restore", "web", "--insecure", "") == ["unsigned", "foreign"]
    assert await completed("keys", "forget", "") == []
    (program.local / ".keys").mkdir()
    (program.local / ".keys/retired-00112233aabbccdd.json").touch()
    (program.local / ".keys/signing.json").touch()
    assert await completed("keys", "forget", "00") == ["00112233aabbccdd"]
    config.write_text("local = ")
    assert await completed("show", "w") == []
    # without it typer asks which shell runs the tests, and a plain sh is none that it knows
    told = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "True"}
    shown = await program.run("--show-completion", "bash", **told)
    assert shown.err == ""
    assert "complete" in shown.out


async def test_version(program: Program) -> None:
    assert (await program.ok("--version")).out == "qmpsnap 0.1.0\n"
