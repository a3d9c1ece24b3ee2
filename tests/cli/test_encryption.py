"""`create --encrypt` and the keys that it takes, from the making to another local root."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

from tests.cli.conftest import Program, powered
from tests.cli.test_verbs import shaped

LONG = ("--max-pause", "20s")


def _lying(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.timeout(200)
async def test_from_the_making_to_another_local_root(program: Program, qemu72: Path) -> None:
    keys = program.local / ".keys"
    config = program.dir / "qmpsnap.toml"
    config.write_text(f'''local = "{program.local}"
store = "{program.store}"
allow_local_store = true
ram_images = 0

[vm.web]
socket = "{program.dir}/qmp"
encrypt = "store"
''')
    own = ["--config", config]
    async with powered(program, qemu72):
        made = shaped("create", (await program.ok("create", "web", *LONG, *own, "--json")).record)
        plain = (
            await program.ok("create", "web", *LONG, *own, "--encrypt", "none", "--json")
        ).record
        assert plain["encryption"] is None
        ran = await program.run("create", "web", *LONG, *own, "--encrypt", "some")
        assert (ran.code, "not one of none, store, all" in ran.err) == (2, True)
    known = (await program.ok("keys", "show", *own, "--json")).records
    assert [shaped("keys-show", one)["role"] for one in known] == ["signs", "encrypts"]
    key = known[1]["key"]
    assert made["encryption"] == key
    assert stat.S_IMODE((keys / "encryption.json").stat().st_mode) == 0o600
    listed = await program.ok("list", "web", *own)
    assert f"encrypted ({key})" in listed.out
    assert f"with the key {key}" in (await program.ok("show", "web", made["id"], *own)).out
    stored = b"".join(_lying(program.store / "web" / made["id"]).values())
    assert b"d0.qcow2" not in stored
    plainly = b"".join(_lying(program.store / "web" / plain["id"]).values())
    assert b"d0.qcow2" in plainly

    # carried to another local root: the key is what it lacks
    file = program.dir / "secret.key"
    told = await program.ok("keys", "export", "--encryption", file, *own, "--json")
    assert shaped("keys-export-encryption", told.record)["key"] == key
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for there in (file, program.store / "secret.key"):
        ran = await program.run("keys", "export", "--encryption", there, *own)
        assert ran.code == 3
    assert not (program.store / "secret.key").exists()
    secret = (keys / "encryption.json").read_text().split('"secret_key": "')[1][:64]
    away = program.dir / "away"
    shutil.move(keys / "encryption.json", away)
    to = program.dir / "back"
    before = _lying(program.local) | _lying(program.store)
    for words in (
        ("restore", "web", made["id"], "--to", to),
        ("show", "web", made["id"], "--machine"),
        ("show", "web", made["id"], "--vmstate"),
    ):
        ran = await program.run(*words, *own, "--json")
        assert (ran.code, ran.error["code"]) == (3, "key-missing"), ran.err
        assert key in ran.error["message"]
        assert "keys import" in ran.error["hint"]
        assert secret not in ran.out + ran.err
    ran = await program.run("restore", "web", made["id"], "--to", to, "--check", *own, "--json")
    assert ran.code == 3
    rows = shaped("restore-check", ran.record)["rows"]
    assert [(row["what"], row["verdict"]) for row in rows] == [("encryption", "blocks")]
    checked = shaped(
        "verify", (await program.ok("verify", "web", made["id"], *own, "--json")).record
    )
    assert (checked["encryption"], checked["decrypted"]) == (key, False)
    assert "was not decrypted" in (await program.ok("verify", "web", made["id"], *own)).out
    assert _lying(program.local) | _lying(program.store) == before
    assert not to.exists()

    file.chmod(0o644)
    ran = await program.run("keys", "import", file, *own)
    assert (ran.code, "others may read the secret key" in ran.err) == (3, True)
    file.chmod(0o600)
    dry = (await program.ok("keys", "import", file, "--dry-run", *own, "--json")).record
    assert shaped("keys-import", dry)["role"] == "decrypts"
    assert not list(keys.glob("encryption*"))
    ran = await program.ok("keys", "import", file, *own)
    assert (key in ran.out, secret in ran.out + ran.err) == (True, False)
    ran = await program.ok("restore", "web", made["id"], "--to", to, "--check", *own, "--json")
    assert ("encryption", "ok") in [(row["what"], row["verdict"]) for row in ran.record["rows"]]
    await program.ok("restore", "web", made["id"], "--to", to, "--no-start", *own)
    assert (await program.ok("show", "web", made["id"], "--machine", *own)).out

    # what is new has a new key, and the old one still reads
    dry = (await program.ok("keys", "rotate", "--encryption", "--dry-run", *own, "--json")).record
    assert shaped("keys-rotate-encryption", dry)["encrypts"] is None
    done = (await program.ok("keys", "rotate", "--encryption", *own, "--json")).record
    shaped("keys-rotate-encryption", done)
    known = (await program.ok("keys", "show", *own, "--json")).records
    assert [one["role"] for one in known] == ["signs", "encrypts", "decrypts", "decrypts"]
    assert known[1]["key"] == done["encrypts"]["key"]
    assert key in {one["key"] for one in known[2:]}
    await program.ok("verify", "web", "--all", *own)
    ran = await program.run("keys", "forget", key, *own)
    assert ran.code == 3


@pytest.mark.timeout(300)
async def test_copies_of_disks_too(program: Program, qemu72: Path) -> None:
    config = program.dir / "qmpsnap.toml"
    config.write_text(f'''local = "{program.local}"
store = "{program.store}"
allow_local_store = true
ram_images = 0
encrypt = "all"

[vm.web]
socket = "{program.dir}/qmp"
''')
    own = ["--config", config]
    words = ["create", "web", "--ram", "none", *LONG, *own]
    async with powered(program, qemu72):
        made = shaped("create", (await program.ok(*words, "--compress", "--json")).record)
        key = made["encryption"]
        assert {one["encryption"] for one in made["disks"].values()} == {key}
        dry = (await program.ok(*words, "--dry-run", "--json")).record
        disks = shaped("create-dry-run", dry)["disks"]
        assert {(one["level"], one["encrypted"]) for one in disks} == {("inc", True)}
        ran = await program.run(*words, "--level", "inc", "--encrypt", "store")
        assert (ran.code, "is encrypted, and this one is not to be" in ran.err) == (3, True)
        known = (await program.ok("info", "web", *own, "--json")).record
        assert {one["level"] for one in shaped("info", known)["disks"]} == {"inc"}
        ran = await program.ok("refresh", "web", "--max-pause", "20s", *own)
        assert f"with the key {key}" in ran.out
    entry = (await program.ok("list", "web", *own, "--json")).record
    assert (shaped("list", entry)["encryption"], entry["disk_keys"]) == (key, [key])
    assert f"disks encrypted ({key})" in (await program.ok("list", "web", *own)).out
    assert f"encrypted with the key {key}" in (await program.ok("show", "web", *own)).out
    checked = shaped("verify", (await program.ok("verify", "web", *own, "--json")).record)
    assert (checked["disk_keys"], checked["missing_keys"]) == ([key], [])
    assert (
        f"disks are encrypted with the key {key}" in (await program.ok("verify", "web", *own)).out
    )

    file = program.dir / "vd0.qcow2"
    ran = await program.run("export", "web", "latest", "vd0", *own, "--json")
    assert (ran.code, ran.error["code"]) == (3, "blocked")
    assert "export --to FILE" in ran.error["hint"]
    ran = await program.run(
        "export", "web", "latest", "vd0", "--to", file, "--socket-path", "x", *own
    )
    assert (ran.code, "nothing is served" in ran.err) == (2, True)
    told = (await program.ok("export", "web", "latest", "vd0", "--to", file, *own, "--json")).record
    assert (shaped("export-to", told)["image"], told["revision"]) == (str(file), 1)
    ran = await program.run("export", "web", "latest", "vd0", "--to", file, *own)
    assert (ran.code, "is there already" in ran.err) == (2, True)

    (program.local / ".keys/encryption.json").rename(program.dir / "away")
    ran = await program.run("export", "web", "latest", "vd0", "--to", f"{file}.2", *own, "--json")
    assert (ran.code, ran.error["code"]) == (3, "key-missing")
    assert key in ran.error["message"]
    told = (await program.ok("verify", "web", *own)).out
    assert f"{key} is not here: those were not decrypted" in told
