"""What is left of memory, under control groups of either kind."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from qmpsnap.host.headroom import Ceiling, ceilings, interfaces, look, node_trouble, tap_trouble

PID = 4711
V1_NONE = 9223372036854771712


def hosted(top: Path, kind: str, group: str) -> tuple[Path, Path]:
    """A /proc in which process PID is in *group* of a hierarchy, and where that lies."""
    proc, point = top / "proc", top / "cgroup"
    (proc / str(PID)).mkdir(parents=True)
    (proc / "self").mkdir()
    names = "0::" if kind == "cgroup2" else "4:memory:"
    (proc / str(PID) / "cgroup").write_text(f"{names}{group}\n")
    options = "rw" if kind == "cgroup2" else "rw,memory"
    mount = f"30 20 0:26 / {point} rw - {kind} {kind} {options}\n"
    (proc / "self/mountinfo").write_text(f"20 1 8:1 / / rw - ext4 /dev/sda rw\n{mount}")
    return proc, point


def group(folder: Path, **figures: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup.procs").touch()
    for name, value in figures.items():
        (folder / f"memory.{name.replace('__', '.')}").write_text(f"{value}\n")


def test_the_second_kind(tmp_path: Path) -> None:
    proc, point = hosted(tmp_path, "cgroup2", "/vms/web/inner")
    group(point)  # the root has no limits to set
    group(point / "vms", max=1000, current=300, stat="anon 100\ninactive_file 60\nactive_file 40")
    group(point / "vms/web", max="max", current=200)
    group(point / "vms/web/inner", max=500, current=200, swap__max=90, swap__current=20)
    assert ceilings(PID, proc=proc) == (
        Ceiling(str(point / "vms/web/inner"), 500, 200, 70),
        Ceiling(str(point / "vms"), 1000, 200),
    )


def test_the_first_kind(tmp_path: Path) -> None:
    proc, point = hosted(tmp_path, "cgroup", "/vms/web")
    group(point, limit_in_bytes=V1_NONE, usage_in_bytes=900)
    group(point / "vms", limit_in_bytes=1000, usage_in_bytes=300)
    figures = "inactive_file 5\ntotal_inactive_file 60\ntotal_active_file 40"
    group(point / "vms/web", limit_in_bytes=500, usage_in_bytes=200, stat=figures)
    assert ceilings(PID, proc=proc) == (
        Ceiling(str(point / "vms/web"), 500, 100),
        Ceiling(str(point / "vms"), 1000, 300),
    )


def test_a_group_that_is_not_mounted_here(tmp_path: Path) -> None:
    proc, _ = hosted(tmp_path, "cgroup2", "/../other")
    assert ceilings(PID, proc=proc) == ()
    (proc / "self/mountinfo").write_text("20 1 8:1 / / rw - ext4 /dev/sda rw\n")
    assert ceilings(PID, proc=proc) == ()


def test_this_host() -> None:
    found = look()
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert found.memory_total_bytes == int(told["MemTotal"].split()[0]) * 1024
    assert 0 < found.memory_free_bytes <= found.memory_total_bytes
    assert found.cpu_count == os.cpu_count()
    assert "lo" in interfaces()


def test_nodes(tmp_path: Path) -> None:
    node = tmp_path / "node"
    assert node_trouble(node) == f"there is no {node}"
    node.touch()
    assert node_trouble(node) == ""
    assert node_trouble(tmp_path) == f"{tmp_path}: Is a directory"
    assert node_trouble(Path("/dev/null")) == ""
    tun = Path("/dev/net/tun")
    if not tun.exists():
        assert tap_trouble() == f"there is no {tun}"
    elif os.geteuid() == 0 and not node_trouble(tun):
        assert stat.S_ISCHR(tun.stat().st_mode)
        assert tap_trouble() in ("", "making a tap interface takes CAP_NET_ADMIN")


def test_interfaces(tmp_path: Path) -> None:
    assert interfaces(tmp_path) == frozenset()
    (tmp_path / "class/net/br0").mkdir(parents=True)
    assert interfaces(tmp_path) == {"br0"}


@pytest.mark.parametrize("text", ["max", str(V1_NONE)])
def test_no_limit_is_no_ceiling(tmp_path: Path, text: str) -> None:
    proc, point = hosted(tmp_path, "cgroup2", "/vms")
    group(point / "vms", max=text, current=1)
    assert ceilings(PID, proc=proc) == ()
