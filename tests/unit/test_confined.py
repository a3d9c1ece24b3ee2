"""The group that a machine would be started in, against what the VM used."""

from __future__ import annotations

from qmpsnap.engine.comparison import Row
from qmpsnap.engine.confined import Confined, rows
from qmpsnap.engine.measured import Measured
from qmpsnap.host.bounds import Bound
from qmpsnap.host.limits import GroupLimits
from qmpsnap.host.site import Site
from tests.unit.test_comparison import machine

USED = Measured(snapshot_count=1, cpu_share=1.2, thread_count=20)
NOTHING = Measured(snapshot_count=0)


def found(
    limits: GroupLimits, used: Measured = USED, *, pids: int | None = 5, cpus: int = 4
) -> dict[str, Row]:
    confined = Confined(used, [], None, [Bound("/g", limits, pids), Bound("/", GroupLimits())])
    several = [*rows(confined, machine(), cpus)]  # of two vCPUs
    assert len({row.what for row in several}) == len(several)
    return {row.what: row for row in several}


def test_no_limits_no_rows() -> None:
    assert found(GroupLimits()) == {}


def test_cpu_time() -> None:
    assert found(GroupLimits(cpu_max_count=1.2))["CPU limit of /g"].verdict == "ok"
    row = found(GroupLimits(cpu_max_count=0.5))["CPU limit of /g"]
    assert (row.verdict, row.captured, row.here) == ("differs", "1.20 used", "0.5 CPUs")
    assert "less than the VM used" in row.why
    assert found(GroupLimits(cpu_max_count=0.5), NOTHING)["CPU limit of /g"].verdict == "ok"


def test_tasks() -> None:
    what = "task limit of /g"
    assert found(GroupLimits(pids_max_count=25))[what].verdict == "ok"
    row = found(GroupLimits(pids_max_count=24))[what]
    assert (row.verdict, row.here) == ("differs", "19 left of 24")
    assert "fewer than the VM had" in row.why
    # two vCPUs and QEMU's own four
    assert found(GroupLimits(pids_max_count=11))[what].verdict == "differs"
    row = found(GroupLimits(pids_max_count=10))[what]
    assert (row.verdict, row.why) == ("blocks", "QEMU has 6 threads at the least")
    assert found(GroupLimits(pids_max_count=9), NOTHING, pids=None)[what].verdict == "ok"


def test_cpusets() -> None:
    what = "cpuset of /g"
    assert found(GroupLimits(cpus=[0, 1, 2, 3])) == {}  # all there are
    assert found(GroupLimits(cpus=[0, 3]))[what].verdict == "ok"
    row = found(GroupLimits(cpus=[3]), NOTHING)[what]
    assert (row.verdict, row.here, row.captured) == ("differs", "1 CPUs: 3", "2 vCPUs")
    assert row.why.startswith("fewer than the guest has")
    assert found(GroupLimits(cpus=[3]))[what].why.startswith("fewer than the VM used")


def test_a_new_group_that_cannot_be_made() -> None:
    site = Site({}, {}, (), (), (), ("cpu: /g/cgroup.controllers: no", "io: no"))
    (row,) = rows(Confined(USED, [], site), machine(), 4)
    assert (row.what, row.verdict) == ("control group", "blocks")
    assert row.why == "cpu: /g/cgroup.controllers: no; io: no"
