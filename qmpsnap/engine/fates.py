"""What becomes of each snapshot and of its images, with the reasons: pure, for dry runs too."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Literal

import msgspec

from qmpsnap.engine import retention, runs
from qmpsnap.engine.retention import Policy
from qmpsnap.store.catalogue import Entry
from qmpsnap.store.points import Points

GONE = "deleted"
"""The state of what `list` shows no more, and whose images are still here."""

_CUT_OFF = "its deletion was cut off"
_EXPIRED = "no rule keeps it"
_UNNEEDED = "nothing stands on its images any more"


class Fate(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one snapshot, and why.

    `keep`: nothing changes. `remove`: both halves and all images go. `images`: it is no snapshot
    any more, but its images stay, for others stand on them. *state* is as `list` says it, or
    `deleted` for one that was deleted earlier, and whose images had to stay.
    """

    vm: str
    id: str
    taken_at: str | None
    state: str
    decision: Literal["keep", "remove", "images"]
    reasons: list[str]


def decided(
    entries: Sequence[Entry],
    policy: Policy,
    now: datetime,
    protected: Collection[str],
    hindered: Mapping[str, str],
    cut: Collection[str],
) -> list[Fate]:
    """What becomes of each of *entries*. *protected*, *cut* (whose deletion was cut off): IDs;
    *hindered*: why a snapshot must not go now, by its ID.

    Only pairs are counted: a snapshot that is not whole must not take the place of one that is.
    """
    pairs = [
        (entry.id, datetime.fromisoformat(entry.taken_at))
        for entry in entries
        if entry.state == "paired" and entry.taken_at is not None and entry.id not in cut
    ]
    kept = {one.id: one for one in retention.decide(pairs, policy, now, set(protected))}
    fates = []
    for entry in entries:
        decision: Literal["keep", "remove"] = "keep"
        if entry.id in cut and entry.id in hindered:
            reasons = [hindered[entry.id]]
        elif entry.id in cut:
            decision, reasons = "remove", [_CUT_OFF]
        elif entry.id not in kept:
            reasons = [f"{entry.state}: {entry.why}"]
        elif kept[entry.id].keep:
            reasons = [*kept[entry.id].reasons]
        elif entry.id in hindered:
            reasons = [hindered[entry.id]]
        else:
            decision, reasons = "remove", [_EXPIRED]
        fates.append(_fate(entry, decision, reasons))
    return fates


def _fate(entry: Entry, decision: Literal["keep", "remove"], reasons: list[str]) -> Fate:
    return Fate(
        vm=entry.vm,
        id=entry.id,
        taken_at=entry.taken_at,
        state=entry.state,
        decision=decision,
        reasons=reasons,
    )


def outcome(
    there: Points,
    fates: list[Fate],
    expired: Collection[str],
    plan: runs.Plan,
    failed: Mapping[str, str],
    *,
    merging: bool,
) -> list[Fate]:
    """*fates* with what becomes of the images of the *expired* points, earlier ones among them.

    *failed*: the points that nothing could be merged into, and why.
    """
    needed = there.needed({one.name for one in there if one.name not in expired})
    reasons: dict[str, list[str]] = {}
    stay: set[str] = set()
    for point in there:
        if point.name not in expired or point.name not in needed | plan.stuck.keys():
            continue
        into = plan.into(point.name) if merging else []
        trouble = [
            f"could not be merged into {top}: {failed[top]}" for top in into if top in failed
        ]
        if into and not trouble:
            why = f"images merged into {', '.join(into)}"
        else:
            stay.add(point.storage.id)
            above = ", ".join(one.name for one in there.standing_on(point.name))
            why = "; ".join(trouble) or plan.stuck.get(point.name) or f"{above} stands on it"
        reasons.setdefault(point.storage.id, []).append(why)
    found = []
    for fate in fates:
        if fate.decision == "remove":
            decision: Literal["remove", "images"] = "images" if fate.id in stay else "remove"
            words = [*fate.reasons, *dict.fromkeys(reasons.get(fate.id, []))] or [_UNNEEDED]
            fate = msgspec.structs.replace(fate, decision=decision, reasons=words)
        found.append(fate)
    return found


def with_earlier(there: Points, fates: list[Fate]) -> list[Fate]:
    """*fates*, and those of what was deleted earlier."""
    earlier = {
        point.storage.id: Fate(
            vm=there.vm,
            id=point.storage.id,
            taken_at=point.storage.taken_at,
            state=GONE,
            decision="remove",
            reasons=[],
        )
        for point in reversed(list(there))
        if point.kept
    }
    known = earlier | {fate.id: fate for fate in fates}
    return sorted(known.values(), key=lambda fate: fate.id)
