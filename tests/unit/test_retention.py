from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpsnap.engine.retention import Decision, Policy, decide
from qmpsnap.errors import UsageError
from qmpsnap.ids import SnapshotId

NOW = datetime(2026, 11, 22, 23, 30, tzinfo=UTC)
RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
Snapshots = list[tuple[str, datetime]]


def taken(*moments: datetime) -> Snapshots:
    return [(str(SnapshotId.of(moment)), moment) for moment in moments]


def kept(snapshots: Snapshots, policy: Policy, protected: set[str] | None = None) -> set[str]:
    return {one.id for one in decide(snapshots, policy, NOW, protected or set()) if one.keep}


def days(*numbers: int) -> Snapshots:
    """Snapshots of noon so many days ago."""
    noon = NOW.replace(hour=12, minute=0)
    return taken(*(noon - timedelta(days=number) for number in numbers))


# what falls together in one period, and what does not: close moments, and far ones
steps = st.one_of(
    st.integers(1, 7200), st.integers(3600, 40 * 86400), st.integers(86400, 500 * 86400)
)


@st.composite
def histories(draw: st.DrawFn) -> Snapshots:
    moment, found = NOW - timedelta(seconds=draw(st.integers(0, 86400))), []
    for step in draw(st.lists(steps, min_size=1, max_size=30)):
        found.append(moment)
        moment -= timedelta(seconds=step)
    return draw(st.permutations(taken(*found)))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    counts = {rule: draw(st.integers(0, 5)) for rule in RULES}
    within = draw(st.none() | st.integers(0, 400 * 86400))
    if within is None and not any(counts.values()):
        counts["last"] = 1
    return Policy(**counts, within=within)


@st.composite
def more_generous(draw: st.DrawFn) -> tuple[Policy, Policy]:
    policy = draw(policies())
    counts = {rule: count + draw(st.integers(0, 2)) for rule, count in policy.counts().items()}
    within = policy.within
    if within is not None or draw(st.booleans()):
        within = (within or 0) + draw(st.integers(0, 86400))
    return policy, Policy(**counts, within=within)


@given(histories(), more_generous(), st.data())
def test_a_more_generous_policy_keeps_all_that_the_other_keeps(
    history: Snapshots, pair: tuple[Policy, Policy], data: st.DataObject
) -> None:
    mean, generous = pair
    protected = data.draw(st.sets(st.sampled_from([id for id, _ in history])))
    assert kept(history, mean, protected) <= kept(history, generous, protected)


@given(histories(), policies())
def test_the_newest_is_always_kept(history: Snapshots, policy: Policy) -> None:
    newest = max(history, key=lambda one: one[1])
    assert newest[0] in kept(history, policy)


@given(histories(), policies(), st.data())
def test_applied_once_more_it_keeps_all(
    history: Snapshots, policy: Policy, data: st.DataObject
) -> None:
    protected = data.draw(st.sets(st.sampled_from([id for id, _ in history])))
    there = kept(history, policy, protected)
    survivors = [one for one in history if one[0] in there]
    assert kept(survivors, policy, protected) == there


@given(histories(), policies())
def test_no_rule_keeps_more_than_its_number_and_the_order_does_not_matter(
    history: Snapshots, policy: Policy
) -> None:
    decisions = decide(history, policy, NOW, set())
    for rule, count in policy.counts().items():
        held = sum(any(reason.split()[0] == rule for reason in one.reasons) for one in decisions)
        assert held <= count
    assert [one.id for one in decisions] == [id for id, _ in history]
    assert kept(sorted(history), policy) == {one.id for one in decisions if one.keep}
    assert all(one.keep == bool(one.reasons) for one in decisions)


@given(histories(), st.integers(1, 5))
def test_last_is_exactly_the_newest_ones(history: Snapshots, count: int) -> None:
    newest = sorted(history, key=lambda one: one[1])[-count:]
    assert kept(history, Policy(last=count)) == {id for id, _ in newest}


def test_the_newest_of_each_of_the_newest_periods() -> None:
    at = [
        datetime(2026, 11, 22, 23, 10, tzinfo=UTC),
        datetime(2026, 11, 22, 23, 5, tzinfo=UTC),
        datetime(2026, 11, 22, 9, 0, tzinfo=UTC),
        datetime(2026, 11, 20, 9, 0, tzinfo=UTC),
        datetime(2026, 10, 31, 9, 0, tzinfo=UTC),
        datetime(2025, 12, 31, 9, 0, tzinfo=UTC),
    ]
    history = taken(*at)
    id = [one for one, _ in history]
    # an hour or a day without a snapshot does not count
    assert kept(history, Policy(hourly=3)) == {id[0], id[2], id[3]}
    assert kept(history, Policy(daily=2)) == {id[0], id[3]}
    assert kept(history, Policy(monthly=2)) == {id[0], id[4]}
    assert kept(history, Policy(yearly=2)) == {id[0], id[5]}
    assert kept(history, Policy(within=24 * 3600)) == {id[0], id[1], id[2]}
    told = decide(history, Policy(last=1, hourly=1, weekly=1, within=0), NOW, {id[5]})
    reasons = ("last", "hourly 2026-11-22 23h", "weekly 2026-W47", "within")
    assert told[0] == Decision(id[0], True, reasons)
    assert told[1] == Decision(id[1], False, ())
    assert told[5] == Decision(id[5], True, ("protected",))


def test_weeks_begin_on_monday_and_belong_to_the_year_of_their_thursday() -> None:
    sunday = datetime(2026, 11, 22, 0, 1, tzinfo=UTC)
    monday, before = sunday - timedelta(days=6), sunday - timedelta(days=7)
    history = taken(sunday, monday, before)
    assert kept(history, Policy(weekly=2)) == {history[0][0], history[2][0]}
    # Thursday, 31 December 2020, and Friday, 1 January 2021: one week, two years
    across = taken(datetime(2020, 12, 31, tzinfo=UTC), datetime(2021, 1, 1, tzinfo=UTC))
    assert kept(across, Policy(weekly=9)) == {across[1][0]}
    assert kept(across, Policy(yearly=9)) == {id for id, _ in across}


def test_days_are_those_of_utc() -> None:
    there = datetime.fromisoformat("2026-11-21T23:30:00-02:00")  # the 22nd in UTC
    history = taken(NOW, there)
    assert kept(history, Policy(daily=9)) == {history[0][0]}


def test_within_counts_from_the_newest_not_from_now() -> None:
    history = days(300, 301, 310)
    assert kept(history, Policy(within=86400)) == {id for id, _ in history[:2]}


def test_a_clock_that_was_ahead_costs_nothing() -> None:
    history = days(-3650, 1, 2, 3)
    ids = [id for id, _ in history]
    assert kept(history, Policy(last=1)) == {ids[0], ids[1]}
    assert kept(history, Policy(within=86400)) == {ids[0], ids[1], ids[2]}


def test_a_policy_without_a_rule_is_refused() -> None:
    for protected in (set(), {days(1)[0][0]}):
        with pytest.raises(UsageError, match="no rule"):
            decide(days(1, 2), Policy(), NOW, protected)


@pytest.mark.parametrize("wrong", [{"last": -1}, {"yearly": -1}, {"within": -1.0}])
def test_less_than_none_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="less than no"):
        Policy(**wrong)
