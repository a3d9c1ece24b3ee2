"""The files of -readconfig, read as QEMU reads them, or refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qmpsnap.errors import Blocked
from qmpsnap.hypervisor.machine import readconfig, records
from qmpsnap.hypervisor.machine.cmdline import Option, parse
from qmpsnap.hypervisor.machine.options import Device, applied_sets

_FILE = """\
# a comment
[machine]
  type = "q35"
  accel = "tcg"

[smp-opts]
cpus =\t"2" behind the quote
[memory]
  size = "96M"
[drive "d0"]
  file = "a,b.qcow2"
  if = "none"
[device "vd0"]
  driver = "virtio-blk-pci"
  drive = "d0"
  serial = ""
[global]
  driver = "isa-serial"
  property = "index"
  value = "1.5"
"""


def given(tmp_path: Path, text: str) -> list[Option]:
    (tmp_path / "q.cfg").write_text(text)
    line = parse(["qemu", "-S", "-readconfig", "q.cfg", "-set", "device.vd0.serial=x", "-m", "64"])
    return list(readconfig.included(line, tmp_path).options)


def test_groups_are_options_in_the_place_of_the_file(tmp_path):
    found = given(tmp_path, _FILE)
    assert [str(one) for one in found] == [
        "-S",
        "-machine q35,accel=tcg",
        "-smp 2",
        "-m 96M",
        "-drive id=d0,file=a,,b.qcow2,if=none",
        "-device virtio-blk-pci,id=vd0,drive=d0,serial=",
        "-global driver=isa-serial,property=index,value=1.5",
        "-set device.vd0.serial=x",
        "-m 64",
    ]


def test_they_are_options_like_all_others(tmp_path):
    (tmp_path / "q.cfg").write_text(_FILE)
    argv = ["qemu", "-readconfig", "q.cfg", "-set", "device.vd0.serial=x"]
    line = applied_sets(readconfig.included(parse(argv), tmp_path))
    assert Device.of(line.all("device")[0]).fields.get("serial") == "x"
    assert records.from_json("qemu", records.as_json(line)) == line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[smbios]\n  type = "1"\n', "line 1.*group smbios"),
        ('  type = "q35"\n', "line 1"),
        ("[machine]\n  type = q35\n", "line 2"),
        ('[machine]\n  type="q35"\n', "line 2"),
        ("[machine]\n \n", "line 2"),
        ('[machine]\n  type = "q35\n', "line 2"),
        (f'[machine]\n  type = "{"x" * 1100}"\n', "line 2 is longer"),
        (f'[device "{"x" * 64}"]\n', "line 1"),
    ],
)
def test_what_qemu_would_read_otherwise_is_refused_by_name(tmp_path, text, told):
    with pytest.raises(Blocked, match=f"q.cfg: {told}"):
        given(tmp_path, text)


def test_a_file_that_is_not_what_qemu_has_read_is_refused_by_name(tmp_path):
    file = tmp_path / "q.cfg"
    line = parse(["qemu", "-readconfig", "q.cfg"])
    with pytest.raises(Blocked, match=r"q\.cfg: No such file"):
        readconfig.included(line, tmp_path)
    file.write_text(_FILE)
    os.utime(file, (1000, 1000))
    changed = file.stat().st_ctime  # which nobody can set back
    assert len(readconfig.included(line, tmp_path, started=changed + 1).options) == 6
    with pytest.raises(Blocked, match=r"q\.cfg was changed after QEMU had read it"):
        readconfig.included(line, tmp_path, started=changed - 5)
    for odd in ("/dev/fd/5", str(tmp_path)):
        with pytest.raises(Blocked, match=f"-readconfig {odd}"):
            readconfig.included(parse(["qemu", "-readconfig", odd]), tmp_path)
