"""Which limits a restored machine gets, from what was captured and what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from qmpsnap.engine import captured
from qmpsnap.engine.captured import Held
from qmpsnap.engine.limiting import Case, Choice, Limit, decided, limits_of
from qmpsnap.engine.measured import Measured
from qmpsnap.errors import Blocked
from qmpsnap.host.bounds import Bound
from qmpsnap.host.cgroup import Ancestor, CgroupUsage
from qmpsnap.host.counters import GroupFigures
from qmpsnap.host.limits import GroupLimits, IoLimits

GIB, MIB = 1 << 30, 1 << 20


def groups(own: GroupLimits, *above: tuple[str, GroupLimits]) -> CgroupUsage:
    return CgroupUsage(
        version="v2",
        groups={"": "/vms/web"},
        limits=own,
        figures=GroupFigures(),
        ancestors=[Ancestor(hierarchy="", path=path, limits=one) for path, one in above],
    )


def case(own: GroupLimits | None = None, **other: Any) -> Case:
    most = Measured(snapshot_count=3, cpu_share=0.8, memory_bytes=GIB, swap_bytes=0, thread_count=9)
    given: dict[str, Any] = {
        "held": captured.held(groups(own), 8) if own is not None else None,
        "measured": most,
        "ram_bytes": 4 * GIB,
        "vcpu_count": 2,
        "iothread_count": 1,
        "same_host": True,
        "device": "8:0",
        "devices": {"8:0", "8:16"},
    }
    return Case(**(given | other))


def table(choice: Choice, of: Case, *above: Bound) -> dict[str, Limit]:
    return {one.limit: one for one in decided(choice, of, above)}


def test_what_held_is_the_tightest_of_the_group_and_those_above() -> None:
    own = GroupLimits(cpu_max_count=2.0, memory_max_bytes=5, cpu_weight=300, cpus=[0, 1])
    slice = GroupLimits(cpu_max_count=1.0, memory_max_bytes=9, cpu_weight=50, pids_max_count=7)
    root = GroupLimits(cpu_max_count=1.5, cpus=[0, 1, 2, 3])
    held = captured.held(groups(own, ("/vms", slice), ("/", root)), 4)
    assert held == {
        "cpu_max_count": Held(1.0, "/vms"),
        "memory_max_bytes": Held(5),
        "pids_max_count": Held(7, "/vms"),
        "cpu_weight": Held(300),
        "cpus": Held([0, 1]),
    }


def test_what_is_usual_limits_nothing() -> None:
    own = GroupLimits(cpu_weight=100, cpu_shares=1024, cpus=[0, 1], memory_nodes=[0])
    above = GroupLimits(cpu_weight=30, memory_nodes=[0])
    assert captured.held(groups(own, ("/", above)), 2) == {}
    assert set(captured.held(groups(own, ("/", GroupLimits(memory_nodes=[0, 1]))), 2)) == {
        "memory_nodes"
    }


def test_the_struct_of_all_values() -> None:
    whole = GroupLimits(
        cpu_max_count=1.5,
        cpu_weight=7,
        cpus=[1],
        memory_nodes=[0],
        memory_high_bytes=1,
        memory_max_bytes=2,
        memory_soft_max_bytes=3,
        swap_max_bytes=0,
        memory_and_swap_max_bytes=5,
        io_max={"8:0": IoLimits(read_bytes_per_second=1, write_count_per_second=2)},
        pids_max_count=6,
        hugetlb_max_bytes={"2MB": 0, "1GB": GIB},
        cpu_shares=9,
    )
    assert captured.as_limits({
        name: one.value for name, one in captured.held(
            groups(whole, ("/", GroupLimits(memory_nodes=[0, 1]))), 2
        ).items()
    }) == whole  # fmt: skip


def test_same() -> None:
    own = GroupLimits(
        cpu_max_count=0.5, memory_max_bytes=GIB, pids_max_count=50, cpus=[2, 3],
        io_max={"8:16": IoLimits(read_bytes_per_second=4096)}, hugetlb_max_bytes={"2MB": 0},
    )  # fmt: skip
    rows = table(Choice.SAME, case(own))
    assert limits_of([*rows.values()]) == own
    cpus = rows["cpu_max_count"]
    assert (cpus.captured, cpus.measured, cpus.suggested, cpus.chosen) == (0.5, 0.8, None, 0.5)
    assert rows["io_max.8:16.read_bytes_per_second"].measured is None
    above = captured.held(groups(GroupLimits(), ("/vms", own)), 8)
    assert table(Choice.SAME, case(held=above))["pids_max_count"].why == "of /vms, above its group"


def test_same_where_nothing_held_or_nothing_is_known() -> None:
    assert decided(Choice.SAME, case(GroupLimits())) == []
    with pytest.raises(Blocked, match="not known"):
        decided(Choice.SAME, case())


def test_disks_of_this_host_and_of_another() -> None:
    rate = IoLimits(write_bytes_per_second=9)
    one = GroupLimits(io_max={"8:16": rate})
    two = GroupLimits(io_max={"8:0": rate, "8:16": rate})
    with pytest.raises(Blocked, match=r"no disk 8:16 any more"):
        decided(Choice.SAME, case(one, devices={"8:0"}))
    (row,) = decided(Choice.SAME, case(one, same_host=False, device="254:0"))
    assert (row.limit, row.chosen) == ("io_max.254:0.write_bytes_per_second", 9)
    with pytest.raises(Blocked, match=r"8:0, 8:16 of another host"):
        decided(Choice.SAME, case(two, same_host=False))
    with pytest.raises(Blocked, match="on no disk"):
        decided(Choice.SAME, case(one, same_host=False, device=None))
    # what was captured is shown, and not set
    shown = table(Choice.SUGGEST, case(two, same_host=False, device=None))
    assert shown["io_max.8:0.write_bytes_per_second"].chosen is None


def test_suggest() -> None:
    rows = table(Choice.SUGGEST, case(GroupLimits(pids_max_count=20, cpu_weight=300)))
    assert limits_of([*rows.values()]) == GroupLimits(
        cpu_max_count=2.0,  # twice 0.8, in halves
        memory_max_bytes=4 * GIB + 256 * MIB,
        pids_max_count=9 + 2 * 64 + 16,
    )
    assert (rows["pids_max_count"].captured, rows["pids_max_count"].suggested) == (20, 153)
    assert (rows["cpu_weight"].captured, rows["cpu_weight"].chosen) == (300, None)
    assert all(one.why for one in rows.values())


@pytest.mark.parametrize(
    ("share", "cpus"), [(0.01, 1.0), (0.5, 1.0), (0.51, 1.5), (1.0, 2.0), (1.4, 3.0), (9.0, 3.0)]
)
def test_suggested_cpus(share: float, cpus: float) -> None:
    most = Measured(snapshot_count=1, cpu_share=share)
    assert table(Choice.SUGGEST, case(measured=most))["cpu_max_count"].chosen == cpus


def test_suggested_memory_is_never_below_the_ram() -> None:
    def memory(ram: int | None, used: int | None) -> object:
        most = Measured(snapshot_count=1, memory_bytes=used)
        return table(Choice.SUGGEST, case(measured=most, ram_bytes=ram))["memory_max_bytes"].chosen

    assert memory(GIB, 10 * MIB) == GIB + 256 * MIB
    assert memory(64 * GIB, 10 * MIB) == 68 * GIB
    assert memory(GIB, 2 * GIB) == 3 * GIB  # QEMU took as much again: twice that beside the RAM
    assert memory(GIB, None) == GIB + 256 * MIB
    assert memory(None, GIB) is None


def test_what_is_not_known_is_not_suggested() -> None:
    rows = table(Choice.SUGGEST, case(measured=Measured(snapshot_count=0), ram_bytes=None))
    assert {one.chosen for one in rows.values()} == {None}
    assert {one.why for one in rows.values()} == {
        "its use of CPUs is not known",
        "how much RAM it has is not known",
        "its threads were not counted",
    }


def test_a_suggestion_stays_below_what_is_above() -> None:
    above = Bound("/sys/vms", GroupLimits(memory_max_bytes=3 * GIB, pids_max_count=1000))
    rows = table(Choice.SUGGEST, case(), above)
    assert rows["memory_max_bytes"].chosen == 3 * GIB
    assert rows["memory_max_bytes"].why.startswith("no more than /sys/vms allows")
    assert rows["pids_max_count"].chosen == 153
