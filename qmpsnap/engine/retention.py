"""Which snapshots a policy keeps: a pure function from their times to decisions with reasons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from qmpsnap.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How many of the newest snapshots to keep, and of how many periods the newest one.

    *within*: all that were taken at most so many seconds before the newest one. Periods are those
    of UTC, so that neither a time zone nor the clock's change in spring moves a snapshot into
    another day; weeks are ISO 8601's, Monday to Sunday. Raises UsageError for a negative number.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: float | None = None

    def __post_init__(self) -> None:
        for name, count in self.counts().items():
            if count < 0:
                raise UsageError(f"keep-{name}: less than none: {count}")
        if self.within is not None and self.within < 0:
            raise UsageError(f"keep-within: less than no time: {self.within}")

    def counts(self) -> dict[str, int]:
        """How many each rule keeps, by the rule's name."""
        return {"last": self.last} | {name: int(getattr(self, name)) for name in _PERIODS}

    def refuse_empty(self) -> None:
        """Raises UsageError when there is no rule: nothing would be kept."""
        if self.within is None and not any(self.counts().values()):
            raise UsageError(
                "no rule says what is to be kept",
                hint="say one, such as --keep-last 7 --keep-weekly 4",
            )


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one snapshot; *reasons* are the rules that keep it, none if none does."""

    id: str
    keep: bool
    reasons: tuple[str, ...]


# the word that names the period of a moment: two moments are in one period if it is the same
_PERIODS: dict[str, Callable[[datetime], str]] = {
    "hourly": lambda when: f"{when:%Y-%m-%d %H}h",
    "daily": lambda when: f"{when:%Y-%m-%d}",
    "weekly": lambda when: "{}-W{:02d}".format(*when.isocalendar()[:2]),
    "monthly": lambda when: f"{when:%Y-%m}",
    "yearly": lambda when: f"{when:%Y}",
}


def decide(
    snapshots: Sequence[tuple[str, datetime]],
    policy: Policy,
    now: datetime,
    protected: set[str],
) -> list[Decision]:
    """What *policy* keeps of *snapshots* (ID, aware moment), in the order in which they come.

    Of each of the newest N periods that have a snapshot at all, the newest one is kept; one
    snapshot may be the newest of several periods. What was taken after *now* is kept and not
    counted: a clock was wrong then, or is now. *protected* ones are kept, and counted.

    Raises UsageError for a policy without a rule.
    """
    policy.refuse_empty()
    reasons: dict[str, list[str]] = {id: [] for id, _ in snapshots}
    past = []
    for id, taken in snapshots:
        if taken > now:
            reasons[id].append("taken in the future")
        else:
            past.append((taken.astimezone(UTC), id))
    past.sort(reverse=True)
    for _, id in past[: policy.last]:
        reasons[id].append("last")
    for rule, period in _PERIODS.items():
        newest: dict[str, str] = {}
        for taken, id in past:
            newest.setdefault(period(taken), id)
        for named, id in list(newest.items())[: policy.counts()[rule]]:
            reasons[id].append(f"{rule} {named}")
    if policy.within is not None:
        for taken, id in past:
            if (past[0][0] - taken).total_seconds() <= policy.within:
                reasons[id].append("within")
    for id in reasons.keys() & protected:
        reasons[id].append("protected")
    return [Decision(id, bool(reasons[id]), tuple(reasons[id])) for id, _ in snapshots]
