"""The wire is cut all along a copy: the guest runs on, and the next increment lacks nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpsnap.engine.wishes import Level, RamChoice
from qmpsnap.errors import GuestNeedsHelp, Refused, SnapError
from tests.faults.bench import Bench, bench, wishes
from tests.rig.qemu import binary
from tests.rig.wire import Fault

_UNTOUCHED = [["d0.qcow2"], ["d1.raw"]]


async def _run(it: Bench, verb: str) -> None:
    if verb == "refresh":
        await it.engine().refresh(it.wired, max_pause=20)
    else:
        await it.engine().create(it.wired, wishes(RamChoice.NONE, level=Level(verb)))


async def _cut(it: Bench, verb: str, fault: Fault | None, cluster: int) -> bool:
    """One copy with *fault*; whether the fault happened. All promises hold after it.

    The guest writes *cluster* before it, and the next one after: each is written only once, so
    that no later copy hides that this one has lost it.
    """
    before = set(it.points())
    it.guest_writes(cluster)
    then = it.disks_now()
    it.wire.arm(fault)
    failure: SnapError | None = None
    try:
        await _run(it, verb)
    except SnapError as failed:
        failure = failed
    happened = it.wire.happened.is_set()
    where = f"{fault} after {it.wire.names[-8:]}: {failure!r}"
    assert happened or failure is None, where
    assert not isinstance(failure, GuestNeedsHelp), where
    if isinstance(failure, Refused):
        assert "transaction" not in it.wire.names, where
    it.guest_is_free()
    try:
        it.guest_writes(cluster + 1)
        if it.owes():
            assert happened, where
            await it.engine().recover(it.clean)
        await it.all_is_well()
        new = set(it.points()) - before
        assert len(new) == (0 if failure else 1), where
        for point in new:
            assert it.holds(point) == then
        assert it.chains() == _UNTOUCHED
    except (AssertionError, SnapError) as broken:
        raise AssertionError(where) from broken
    return happened


def _places(names: list[str], *, sample: int) -> list[int]:
    """Where to cut: at each command that comes in new company, from the first change on."""
    begun = names.index("blockdev-add")
    seen: set[tuple[str, ...]] = set()
    found = []
    for at in range(begun, len(names)):
        company = tuple(names[at - 1 : at + 1])
        if company not in seen:
            seen.add(company)
            found.append(at + 1)
    return found[::sample]


@pytest.mark.parametrize(
    ("version", "verb", "sample"),
    [
        ("7.2", "full", 4),
        ("7.2", "inc", 1),
        ("7.2", "refresh", 4),
        ("10.0", "inc", 6),
        ("11.1", "inc", 6),
    ],
)
async def test_a_copy_is_whole_or_absent_wherever_the_wire_is_cut(
    version: str, verb: str, sample: int, short: Path, store: Path
) -> None:
    async with bench(binary(version), short, store) as it:
        it.guest_writes(1, 2, 3)
        await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.FULL))
        assert not await _cut(it, verb, None, 4)  # the control
        names = list(it.wire.names)
        assert {"blockdev-add", "transaction", "block-commit", "job-dismiss"} <= set(names)
        if verb != "full":
            assert {"nbd-server-start", "block-export-add", "block-export-del"} <= set(names)
        cluster, cuts = 6, 0
        for at in _places(names, sample=sample):
            asks = names[at - 1].startswith(("query-", "x-debug"))
            for delivered in (False,) if asks else (False, True):
                cuts += await _cut(it, verb, Fault(at, delivered=delivered), cluster)
                cluster += 2
        assert cuts >= 30 // sample
        # what failed on the way has cost nothing
        last = await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.INC))
        assert it.levels(last.id) == {"inc"}
        assert it.holds(last.id) == it.disks_now()
        assert last.id in await it.all_is_well()
