"""What control groups leave for a snapshot."""

from __future__ import annotations

from qmpsnap.engine.allowance import GroupInfo, Needed, groups
from qmpsnap.host.bounds import Bound
from qmpsnap.host.headroom import Ceiling
from qmpsnap.host.limits import GroupLimits

MIB = 1 << 20


def only(limits: GroupLimits, *, tasks: int | None = 5, left: int | None = None) -> GroupInfo:
    ceilings = [] if left is None else [Ceiling("/g", 100 * MIB, 100 * MIB - left)]
    above = [Bound("/g", limits, tasks), Bound("/", GroupLimits(cpu_weight=100, cpus=[0]), 5)]
    (one,) = groups(above, ceilings, Needed(20 * MIB, 2), cpus=2)
    assert one.folder == "/g"
    assert one.limits == limits
    return one


def test_only_groups_that_limit() -> None:
    usual = GroupLimits(cpu_weight=100, cpu_shares=1024, cpus=[0, 1], memory_nodes=[0])
    assert groups([Bound("/g", usual, 5), Bound("/", GroupLimits())], [], Needed(1, 1), 1) == []


def test_memory() -> None:
    limits = GroupLimits(memory_max_bytes=100 * MIB)
    one = only(limits, left=20 * MIB)
    assert (one.memory_left_bytes, one.enough, one.why) == (20 * MIB, True, "")
    one = only(limits, left=20 * MIB - 1)
    assert not one.enough
    assert "a snapshot takes up to 20.0 MiB" in one.why


def test_tasks() -> None:
    one = only(GroupLimits(pids_max_count=7))
    assert (one.tasks_left_count, one.enough) == (2, True)
    one = only(GroupLimits(pids_max_count=6))
    assert (one.tasks_left_count, one.enough) == (1, False)
    assert "QEMU ends when it cannot start one" in one.why
    assert only(GroupLimits(pids_max_count=2)).tasks_left_count == 0
    assert only(GroupLimits(pids_max_count=2), tasks=None).tasks_left_count is None


def test_cpu_time() -> None:
    assert only(GroupLimits(cpu_max_count=3.0)).why == ""
    one = only(GroupLimits(cpu_max_count=2.5))
    assert one.enough
    assert "shares its CPU time" in one.why
