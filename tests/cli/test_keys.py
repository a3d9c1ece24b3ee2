"""`keys`: shown, handed on, imported, rotated, forgotten; and `--insecure` where one is missing."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from qmpsnap.store.keyring import Keyring
from tests.cli.conftest import Program, shipped
from tests.cli.test_verbs import shaped
from tests.rig.halves import ID


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}


async def test_a_key_from_its_making_to_its_end(program: Program) -> None:
    folder, local = program.local / ".keys", ["--local", program.local]
    ran = await program.ok("keys", "show", *local)
    assert (ran.out, "no key yet" in ran.err) == ("", True)
    assert not folder.exists()

    public = shaped("keys-export", (await program.ok("keys", "export", "--json", *local)).record)
    (first,) = (await program.ok("keys", "show", "--json", *local)).records
    shaped("keys-show", first)
    assert (first["role"], first["key"]) == ("signs", public["key"])
    assert first["fingerprint"].startswith(first["key"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    secret = json.loads((folder / "signing.json").read_bytes())["secret_key"]

    before = _files(folder)
    dry = (await program.ok("keys", "rotate", "--dry-run", "--json", *local)).record
    assert shaped("keys-rotate", dry)["signs"] is None
    assert _files(folder) == before
    done = shaped("keys-rotate", (await program.ok("keys", "rotate", "--json", *local)).record)
    assert done["retired"]["key"] == dry["retired"]["key"] == first["key"]
    ran = await program.ok("keys", "show", *local)
    assert [line.split()[:2] for line in ran.out.splitlines()[1:]] == [
        [done["signs"]["key"], "signs"],
        [first["key"], "retired"],
    ]
    assert secret not in ran.out + "".join(map(str, _files(folder).values()))

    ran = await program.run("keys", "forget", done["signs"]["key"], "--json", *local)
    assert (ran.code, ran.error["code"]) == (3, "key-refused")
    assert "keys rotate" in ran.error["hint"]
    before = _files(folder)
    await program.ok("keys", "forget", first["key"][:8], "--dry-run", *local)
    assert _files(folder) == before
    gone = (await program.ok("keys", "forget", first["key"][:8], "--json", *local)).record
    assert shaped("keys-forget", gone)["key"] == first["key"]
    assert [*_files(folder)] == ["signing.json"]
    ran = await program.run("keys", "forget", first["key"], *local)
    assert ran.code == 3
    assert "no single key" in ran.err


async def test_the_key_of_another_host(program: Program, short: Path) -> None:
    there = Keyring(short / "there", "there")
    await shipped(program)
    half = program.store / "web" / ID
    (half / "manifest.sig").write_bytes(there.sign((half / "manifest.json").read_bytes()))
    ran = await program.ok("list", "web", "--json", *program.roots)
    assert ran.record["state"] == "untrusted"
    assert ran.record["signature"] == {
        "verdict": "foreign", "key": there.ready(), "accepted": False,
    }  # fmt: skip
    for verb, more in {"show": [], "restore": ["--to", "back"], "export": ["vda"]}.items():
        ran = await program.run(verb, "web", ID, *more, *program.roots, "--json")
        assert (ran.code, ran.error["code"]) == (3, "foreign"), verb
        assert "keys import" in ran.error["hint"]
    ran = await program.run("verify", "web", ID, *program.roots, "--json")
    assert ran.code == 7  # its disks are on no host: that is damage
    (first, *_) = ran.record["findings"]
    assert (first["where"], "not trusted here" in first["what"]) == ("manifest.sig", True)
    assert not (program.dir / "back").exists()

    accepted = ["--insecure", "foreign", *program.roots]
    ran = await program.ok("show", "web", ID, *accepted)
    assert f"it is signed with the key {there.ready()}, which is not trusted here" in ran.out
    ran = await program.run("show", "web", ID, "--insecure", "unsigned", *program.roots)
    assert ran.code == 3
    ran = await program.run("show", "web", ID, "--insecure", "all", *program.roots)
    assert (ran.code, "not one of unsigned, foreign" in ran.err) == (2, True)

    (program.dir / "key").write_text(
        (await program.ok("keys", "export", "--local", short / "x")).out
    )
    handed = (await program.ok("keys", "export", "--local", short / "x", "--json")).record
    await program.ok("keys", "import", "key", "--dry-run", *program.roots)
    assert "imported" not in (await program.ok("keys", "show", *program.roots)).out
    ran = await program.ok("keys", "import", "key", "--json", *program.roots)
    assert shaped("keys-import", ran.record)["key"] == handed["key"]

    # the right one: `show` tells it, and no option is needed
    from qmpsnap.store import keyfile

    (program.dir / "key").write_bytes(keyfile.encode(there.public()))
    await program.ok("keys", "import", "key", *program.roots)
    ran = await program.ok("show", "web", ID, "--json", *program.roots)
    assert shaped("show", ran.record)["signature"]["verdict"] == "trusted"
    ran = await program.run("verify", "web", ID, "--json", *program.roots)
    assert shaped("verify", ran.record)["signature"]["accepted"]
    assert "manifest.sig" not in {one["where"] for one in ran.record["findings"]}


async def test_what_was_shipped_before_there_was_a_key(program: Program) -> None:
    await shipped(program)
    half = program.store / "web" / ID
    (half / "manifest.sig").unlink()
    ran = await program.run("show", "web", *program.roots, "--json")
    assert (ran.code, "keys sign" in ran.error["hint"]) == (3, True)
    ran = await program.ok("prune", "web", "--keep-last", 1, "--dry-run", *program.roots)
    assert "untrusted: it is not signed" in ran.out
    assert "`qmpsnap keys sign VM --all` signs" in ran.err
    for words in ([], [ID, "--all"], ["--all", "--insecure", "foreign"], ["not-an-id"]):
        ran = await program.run("keys", "sign", "web", *words, *program.roots)
        assert ran.code == 2, words
    ran = await program.ok("keys", "sign", "web", "--all", "--dry-run", *program.roots)
    assert "would be signed, with the key" in ran.out
    assert not (half / "manifest.sig").exists()
    ran = await program.ok("keys", "sign", "web", ID, "--json", *program.roots)
    assert shaped("keys-sign", ran.record)["outcome"] == "signed"
    ran = await program.ok("list", "web", "--json", *program.roots)
    assert ran.record["state"] == "paired"
    ran = await program.ok("keys", "sign", "web", "--all", *program.roots)
    assert (ran.out, "all that is on the store is signed" in ran.err) == ("", True)
    ran = await program.ok("keys", "sign", "web", ID, *program.roots)
    assert "was signed" in ran.out
    ran = await program.ok("prune", "web", "--keep-last", 1, *program.roots)
    assert "keys sign" not in ran.err
    # the host that has it no more
    (half / "manifest.sig").unlink()
    ran = await program.run(
        "keys", "sign", "web", ID, "--local", program.dir / "other", *program.roots[2:], "--json"
    )
    assert (ran.code, ran.error["code"]) == (3, "unsigned")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        (b"", "not a public key"),
        (b"-----BEGIN PUBLIC KEY-----\n", "not a public key"),
        (b" " * (70 << 10), "larger"),
    ],
)
async def test_what_is_no_key_changes_nothing(
    program: Program, content: bytes | None, why: str
) -> None:
    if content is not None:
        (program.dir / "key").write_bytes(content)
    ran = await program.run("keys", "import", "key", *program.roots, "--json")
    assert (ran.code, ran.error["code"], ran.out) == (3, "key-refused", "")
    assert why in ran.error["message"]
    assert "\n" not in ran.error["message"]
    assert not (program.local / ".keys").exists()


async def test_where_the_keys_are(program: Program) -> None:
    ran = await program.run("keys", "show")
    assert (ran.code, "no local root" in ran.err) == (2, True)
    config = program.dir / "c.toml"
    config.write_text('keys = "mine/keys"\n')
    (program.dir / "mine").mkdir()
    key = (await program.ok("keys", "export", "--json", "--config", config)).record
    (shown,) = (await program.ok("keys", "show", "--json", "--config", config)).records
    assert shown["path"] == str(program.dir / "mine/keys/signing.json")
    assert shown["key"] == key["key"]
    config.write_text(f'keys = "{program.store}/keys"\n')
    ran = await program.run("keys", "export", "--config", config, *program.roots)
    assert (ran.code, "would lie on the store" in ran.err) == (3, True)
    assert not (program.store / "keys").exists()
