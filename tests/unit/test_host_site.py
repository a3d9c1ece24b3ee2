"""Where a group would be made, and why not, in trees of files as v2 and v1 lay them out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qmpsnap.errors import Blocked
from qmpsnap.host.limits import GroupLimits, IoLimits
from qmpsnap.host.site import Site, site

PID = 4711
ME = "/user.slice/session.scope"
LIMITS = GroupLimits(cpu_max_count=1.5, memory_max_bytes=1000, pids_max_count=50)


class Second:
    """A /proc and a v2 hierarchy in which process PID is in the group *own*."""

    def __init__(self, top: Path, own: str = ME) -> None:
        self.proc, self.top = top / "proc", top / "two"
        (self.proc / str(PID)).mkdir(parents=True)
        (self.proc / "self").mkdir()
        (self.proc / str(PID) / "cgroup").write_text(f"0::{own}\n")
        (self.proc / "self/mountinfo").write_text(
            f"20 1 8:1 / / rw - ext4 /dev/sda rw\n30 20 0:26 / {self.top} rw - cgroup2 none rw\n"
        )
        self.group("/", type=None, hands="cpu memory pids", procs="1 2")

    def group(self, path: str, **files: str | None) -> Path:
        """*has* and *hands*: what it may use and hands down; *procs*; dots are spelled `_`."""
        folder = self.top / path.lstrip("/")
        folder.mkdir(exist_ok=True, parents=True)
        names = {"has": "cgroup.controllers", "hands": "cgroup.subtree_control"}
        names |= {"procs": "cgroup.procs", "type": "cgroup.type"}
        given = {"has": "cpu memory pids", "hands": "", "procs": "", "type": "domain"} | files
        for name, text in given.items():
            if text is not None:
                file = names.get(name, name.replace("_", ".", 1))
                (folder / file).write_text("\n".join(text.split(";")) + ("\n" if text else ""))
        return folder

    def site(self, limits: GroupLimits = LIMITS, parent: str | None = None) -> Site:
        return site(limits, parent, pid=PID, proc=self.proc)


@pytest.fixture
def two(tmp_path: Path) -> Second:
    return Second(tmp_path)


def test_without_a_word_it_is_the_nearest_that_needs_no_change(two: Second) -> None:
    slice = two.group("/user.slice", hands="cpu memory pids")
    two.group(ME, procs=str(PID))
    found = two.site()
    assert found.parents == {"": slice}
    assert (found.enable, found.troubles) == ((), ())
    assert [one.file for one in found.settings] == ["cpu.max", "memory.max", "pids.max"]
    assert [one.folder for one in found.above] == [str(slice), str(two.top)]


def test_a_group_with_processes_hands_nothing_down_but_the_root(two: Second) -> None:
    two.group("/user.slice", procs="9")
    two.group(ME, procs=str(PID))
    assert two.site().parents == {"": two.top}


def test_nothing_of_others_is_changed_without_a_word(two: Second) -> None:
    two.group("/", type=None, hands="memory", procs="1")
    two.group("/user.slice", hands="memory")
    two.group(ME)  # has no processes, and hands nothing down
    found = two.site()
    (trouble,) = found.troubles
    assert "cpu, memory, pids" in trouble
    assert str(two.top / "user.slice/session.scope/cgroup.subtree_control") in trouble
    assert "--limits-parent" in trouble


def test_a_named_parent_gets_what_it_lacks(two: Second) -> None:
    two.group("/user.slice")
    two.group(ME, procs=str(PID))
    vms = two.group("/vms", hands="memory")
    found = two.site(parent="/vms")
    assert found.parents == {"": vms}
    assert (found.enable, found.troubles) == (("cpu", "pids"), ())


def test_a_named_parent_with_processes(two: Second) -> None:
    two.group("/user.slice")
    two.group(ME, procs=str(PID))
    vms = two.group("/vms", procs="77", hands="memory pids")
    (trouble,) = two.site(parent="/vms").troubles
    assert trouble.startswith(f"cpu: {vms / 'cgroup.subtree_control'}: ")
    assert "processes of its own" in trouble


def test_a_controller_that_is_not_there(two: Second) -> None:
    two.group("/user.slice")
    two.group(ME, procs=str(PID))
    vms = two.group("/vms", has="memory pids", hands="memory pids")
    assert two.site(parent="/vms").troubles == (f"cpu: not in {vms / 'cgroup.controllers'}",)
    io = GroupLimits(io_max={"8:0": IoLimits(read_bytes_per_second=1)})
    assert two.site(io, "/vms").troubles == (f"io: not in {vms / 'cgroup.controllers'}",)


@pytest.mark.parametrize("name", ["vms", "/no/such/group", "/vms/../user.slice"])
def test_no_such_parent(two: Second, name: str) -> None:
    two.group("/user.slice")
    two.group(ME)
    two.group("/vms")
    with pytest.raises(Blocked, match="group"):
        two.site(parent=name)


@pytest.mark.parametrize(
    ("limits", "files", "told"),
    [
        (GroupLimits(cpu_max_count=2.0), {"cpu_max": "150000 100000"}, "cpu: cpu.max: 2 is above"),
        (GroupLimits(memory_max_bytes=9), {"memory_max": "8"}, "memory: memory.max: 9 is above"),
        (GroupLimits(pids_max_count=9), {"pids_max": "8"}, "pids: pids.max: 9 is above the 8 of"),
        (
            GroupLimits(swap_max_bytes=9),
            {"memory_swap.max": "8"},
            "memory: memory.swap.max: 9 is above the 8 of",
        ),
        (
            GroupLimits(cpus=[1, 7, 8]),
            {"cpuset_cpus.effective": "0-3"},
            "cpuset: cpuset.cpus: 7, 8: not among those of",
        ),
        (
            GroupLimits(io_max={"8:0": IoLimits(read_bytes_per_second=9)}),
            {"io_max": "8:0 rbps=8 wbps=max riops=max wiops=max"},
            "io: io.max: 9 is above the 8 of",
        ),
        (
            GroupLimits(hugetlb_max_bytes={"2MB": 9}),
            {"hugetlb_2MB.max": "8"},
            "hugetlb: hugetlb: 9 is above the 8 of",
        ),
    ],
)
def test_more_than_a_group_above_allows(
    two: Second, limits: GroupLimits, files: dict[str, str], told: str
) -> None:
    every = "cpu memory pids io cpuset hugetlb"
    two.group("/user.slice")
    two.group(ME)
    vms = two.group("/vms", has=every, hands=every, **files)
    two.group("/vms/more", has=every, hands=every)
    (trouble,) = two.site(limits, "/vms/more").troubles
    assert trouble.startswith(told)
    assert trouble.endswith(str(vms))
    # as much as there is, is fine
    for name, text in files.items():
        less = text.replace("8", "9", 1).replace("150", "200").replace("0-3", "0-8")
        two.group("/vms", has=every, hands=every, **{name: less.replace("9:0", "8:0")})
    if limits.io_max is None:
        assert two.site(limits, "/vms/more").troubles == ()


def test_where_we_may_not_write(short: Path) -> None:
    short.chmod(0o755)
    two = Second(short)
    two.group("/user.slice")
    two.group(ME)
    vms = two.group("/vms")
    vms.chmod(0o555)
    (vms / "cgroup.subtree_control").chmod(0o444)
    (two.top / "cgroup.procs").chmod(0o444)
    user = os.geteuid()
    try:
        if user == 0:  # who may write anywhere
            os.seteuid(65534)
        told = "\n".join(two.site(parent="/vms").troubles)
    finally:
        os.seteuid(user)
    vms.chmod(0o755)
    assert f"{vms}: no group may be made here" in told
    assert f"{vms / 'cgroup.subtree_control'}: not permitted" in told
    assert f"{two.top / 'cgroup.procs'}: not permitted" in told


class TestFirst:
    """v1: each controller has a hierarchy of its own, and groups below any group."""

    @pytest.fixture
    def proc(self, tmp_path: Path) -> Path:
        proc = tmp_path / "proc"
        (proc / str(PID)).mkdir(parents=True)
        (proc / "self").mkdir()
        (proc / str(PID) / "cgroup").write_text("3:cpu,cpuacct:/a\n2:cpuset:/a\n1:pids:/\n0::/\n")
        points = {"cpu,cpuacct": "cpu", "cpuset": "set", "pids": "pids"}
        lines = [
            f"3{number} 1 0:2{number} / {tmp_path / point} rw - cgroup none rw,{words}\n"
            for number, (words, point) in enumerate(points.items())
        ]
        lines.append(f"40 1 0:30 / {tmp_path / 'uni'} rw - cgroup2 none rw\n")
        (proc / "self/mountinfo").write_text("".join(lines))
        for folder in ("cpu/a", "set/a", "pids", "uni", "cpu", "set"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "cgroup.procs").write_text(f"{PID}\n")
        for file, text in {"cpus": "0-3", "mems": "0"}.items():
            (tmp_path / f"set/a/cpuset.{file}").write_text(f"{text}\n")
            (tmp_path / f"set/a/cpuset.effective_{file}").write_text(f"{text}\n")
        (tmp_path / "uni/cgroup.controllers").write_text("hugetlb\n")
        (tmp_path / "uni/cgroup.subtree_control").write_text("hugetlb\n")
        return proc

    def test_below_our_own_group(self, proc: Path, tmp_path: Path) -> None:
        limits = GroupLimits(cpu_max_count=1.0, pids_max_count=9, hugetlb_max_bytes={"2MB": 0})
        found = site(limits, pid=PID, proc=proc)
        assert found.troubles == ()
        assert found.parents == {
            "": tmp_path / "uni",
            "cpu": tmp_path / "cpu/a",
            "pids": tmp_path / "pids",
        }

    def test_a_cpuset_is_filled(self, proc: Path) -> None:
        found = site(GroupLimits(cpus=[1]), pid=PID, proc=proc)
        assert {one.file: one.text for one in found.settings} == {
            "cpuset.cpus": "1",
            "cpuset.mems": "0",
        }

    def test_a_controller_that_is_not_mounted(self, proc: Path, tmp_path: Path) -> None:
        found = site(GroupLimits(memory_max_bytes=9), pid=PID, proc=proc)
        controllers = tmp_path / "uni/cgroup.controllers"
        assert found.troubles == (f"memory: not in {controllers}",)

    def test_a_parent_that_one_hierarchy_lacks(self, proc: Path) -> None:
        limits = GroupLimits(cpu_max_count=1.0, pids_max_count=9)
        found = site(limits, "/a", pid=PID, proc=proc)
        assert found.troubles == ("the v1 controller pids: no folder of /a is mounted here",)

    def test_the_limits_of_what_is_above(self, proc: Path, tmp_path: Path) -> None:
        (tmp_path / "pids/pids.max").write_text("8\n")
        found = site(GroupLimits(pids_max_count=9), pid=PID, proc=proc)
        assert found.troubles == (f"pids: pids.max: 9 is above the 8 of {tmp_path / 'pids'}",)
