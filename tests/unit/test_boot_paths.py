"""Where QEMU finds what it is booted from: the same file, whatever the way to it looks like."""

from __future__ import annotations

from pathlib import Path

from qmpsnap.engine import firmware
from qmpsnap.hypervisor.machine import direct
from qmpsnap.hypervisor.machine.cmdline import parse


def test_a_folder_that_cannot_be_looked_into_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "rom").write_bytes(b"it")
    closed = tmp_path / ("x" * 300)  # the kernel refuses to look, for root too
    (found,) = firmware.examine(["rom"], [closed, tmp_path])
    assert (found.path, found.size_bytes) == (str(tmp_path / "rom"), 2)
    assert firmware.find("rom", [closed]) is None


def test_the_parent_of_a_link_is_the_parent_of_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/kernel").write_text("right")
    (tmp_path / "kernel").write_text("wrong")
    (tmp_path / "link").symlink_to(tmp_path / "deep/er")
    line = parse(["qemu", "-kernel", "link/../kernel"])
    assert Path(direct.files(line, tmp_path)["kernel"]).read_text() == "right"
    (found,) = firmware.examine(["link/../kernel"], [tmp_path])
    assert found.size_bytes == 5
    assert found.path
    assert Path(found.path).read_text() == "right"
