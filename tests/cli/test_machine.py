"""`show --machine`, and a machine with a secret: it is in no file, and a restore asks for it."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

from qmpsnap.cli import shapes
from qmpsnap.engine import configuration
from tests.cli.conftest import Program, Ran, machine
from tests.rig.qemu import running
from tests.rig.schema import wrong

HUSH = "correct-horse-battery-staple"
NIC = "virtio-net-pci,netdev=n0,id=nic0,mac=52:54:00:11:22:33"


def _holding(folder: Path, word: str) -> list[Path]:
    return [
        path for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()
    ]


def _argv(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


async def test_a_machine_with_a_secret(program: Program, qemu72: Path) -> None:
    words = [
        *machine(program.dir / "d0.qcow2"),
        *("-object", f"secret,id=key0,data={HUSH}", "-iscsi", f"user=me,password={HUSH}"),
        *("-netdev", "user,id=n0", "-device", NIC, "-smp", "2,maxcpus=4"),
    ]
    async with running(qemu72, *words, directory=program.dir) as vm:
        await program.ok("create", "web", "--socket", vm.qmp, *program.roots, "--max-pause", "30s")
    for folder in (program.local, program.store):
        assert _holding(folder, HUSH) == []
        assert _holding(folder, "key0") or folder == program.local

    shown = await program.ok("show", "web", *program.roots, "--machine")
    facts = dict(re.findall(r"^(\S.*?)  +(.+)$", shown.out.partition("\n\n")[0], re.M))
    assert facts["machine type"] == "pc-i440fx-7.2"
    assert facts["CPUs"] == "2 of 4: 1 socket, 4 cores, 1 thread"
    assert facts["secrets"] == "key0 (given on the command line)"
    assert facts["left out"] == "-object key0 data, -iscsi password"
    lines = [line.split() for line in shown.out.splitlines()]
    assert ["nic0", "virtio-net-pci", "52:54:00:11:22:33", "1", "n0", "user", "-"] in lines
    assert any(line[:4] == ["vd0", "virtio-blk-pci", "pci.0", "02.0"] for line in lines)
    assert any(line[:1] == ["bios-256k.bin"] for line in lines)
    record = (await program.ok("show", "web", *program.roots, "--machine", "--json")).record
    assert wrong(record, configuration.schemas()["qmpsnap-machine"]) == []
    (path,) = program.store.glob("web/*/machine.json")
    assert record == json.loads(path.read_bytes())
    state = (await program.ok("show", "web", *program.roots, "--vmstate", "--json")).record
    assert wrong(state, shapes.schemas()["cli-show-vmstate"]) == []
    assert (state["machine"], state["vm"]) == ("pc-i440fx-7.2", "web")
    (whole,) = program.store.glob("web/*/manifest.json")
    ram = json.loads(whole.read_bytes())["ram"]
    assert state["stream_bytes"] == ram["raw_bytes"]
    apart = {image["block"]: image["stored_pages"] for image in ram.get("images", [])}
    for block in state["blocks"]:
        assert (block["place"] == "packs") == (block["name"] in apart)
        assert block["stored_pages"] == apart.get(block["name"], block["stored_pages"])
        assert (block["stored_pages"] + block["zero_pages"]) * 4096 == block["bytes"]
    memory = next(block for block in state["blocks"] if block["name"] == "pc.ram")
    assert memory["place"] == "packs"
    assert 100 < memory["stored_pages"] < memory["bytes"] >> 13
    names = [section["name"] for section in state["sections"]]
    assert [name for name in names if name.endswith("/virtio-net")] != []
    text = (await program.ok("show", "web", *program.roots, "--vmstate")).out
    lines = [line.split() for line in text.splitlines()]
    assert ["machine", "type", "pc-i440fx-7.2"] in lines
    assert [line[:1] for line in lines[-len(names) :]] == [name.split()[:1] for name in names]
    both = await program.run("show", "web", *program.roots, "--machine", "--usage")
    assert both.code == 2

    restore = ["restore", "web", "--to", "back", *program.roots]
    refused: Ran = await program.run(*restore, "--json")
    assert refused.code == 3
    assert "object key0" in refused.error["message"]
    assert "--secret key0=FILE" in refused.error["hint"]
    for odd in ("key0", "=x", "key9=x"):
        ran = await program.run(*restore, "--secret", odd)
        assert (ran.code, "secret" in ran.err) == (2, True)
    key = program.dir / "key"
    gone = await program.run(*restore, "--secret", f"key0={key}", "--check")
    assert gone.code == 3
    assert str(key) in gone.out
    key.write_text(HUSH)
    back = await program.ok(*restore, "--secret", f"key0={key}", "--detach", "--json")
    try:
        assert "-iscsi password: is in no snapshot" in back.record["notices"]
        assert f"secret,id=key0,file={key}" in _argv(back.record["pid"])
    finally:
        os.kill(back.record["pid"], signal.SIGKILL)
