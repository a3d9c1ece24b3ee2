"""Whether a live save will come to its end, told from its numbers."""

from __future__ import annotations

import pytest

from qmpsnap.hypervisor.vmstate.convergence import Convergence, Verdict
from qmpsnap.hypervisor.vmstate.migration import Ram


def _judged(outlook: Convergence, passes: int, remaining: int, seconds: float) -> Verdict:
    return outlook.judge(Ram(dirty_sync_count=passes, remaining=remaining), seconds)


def test_the_first_pass_may_take_as_long_as_it_takes() -> None:
    outlook = Convergence(budget=1)
    assert _judged(outlook, 1, 1 << 40, 10_000) is Verdict.GOING


def test_passes_that_shrink_are_let_go_on() -> None:
    outlook = Convergence(budget=60)
    for number in range(2, 14):
        verdict = _judged(outlook, number, 1 << (40 - 2 * number), 4.0 + number)
        assert verdict is Verdict.GOING


@pytest.mark.parametrize(("seconds", "verdict"), [(2.9, Verdict.GOING), (40.0, Verdict.STUCK)])
def test_passes_that_do_not_shrink_are_stuck_after_a_while(
    seconds: float, verdict: Verdict
) -> None:
    outlook = Convergence(budget=60)
    for number in range(2, 12):
        _judged(outlook, number, 100 << 20, 1.0)
    assert _judged(outlook, 12, 100 << 20, 1.0 + seconds) is verdict


@pytest.mark.parametrize(("budget", "first"), [(5.0, 1.0), (1.0, 5.0)])
def test_the_budget_is_at_least_the_first_pass(budget: float, first: float) -> None:
    outlook = Convergence(budget)
    assert _judged(outlook, 2, 10, first) is Verdict.GOING
    assert _judged(outlook, 3, 5, first + 4.9) is Verdict.GOING
    assert _judged(outlook, 3, 5, first + 5.1) is Verdict.STUCK


def test_looks_within_one_pass_count_once() -> None:
    outlook = Convergence(budget=60)
    for _ in range(50):
        assert _judged(outlook, 2, 100 << 20, 20.0) is Verdict.GOING
    assert len(outlook.remains) == 1
