"""The wire is cut at every command of `create`: the guest runs on, and nothing is half there."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpsnap.engine.wishes import RamChoice
from qmpsnap.errors import GuestNeedsHelp, Refused, SnapError
from tests.faults.bench import Bench, bench, wishes
from tests.rig.qemu import binary
from tests.rig.wire import Fault

ASKED = ("query-", "qom-get", "qom-list", "device-list-properties", "human-monitor-command")


async def _cut(it: Bench, ram: RamChoice, fault: Fault | None) -> bool:
    """One `create` with *fault*; whether the fault happened. All promises hold after it."""
    before, chains = it.halves(), it.chains()
    it.wire.arm(fault)
    failure: SnapError | None = None
    try:
        await it.engine().create(it.wired, wishes(ram))
    except SnapError as failed:
        failure = failed
    happened = it.wire.happened.is_set()
    where = f"{fault} after {it.wire.names[-8:]}: {failure!r}"
    assert happened or failure is None, where
    assert not isinstance(failure, GuestNeedsHelp), where
    if isinstance(failure, Refused):
        assert "transaction" not in it.wire.names, where
    it.guest_is_free()
    owed = it.owes()
    if owed:
        assert failure is not None, where
        made = await it.engine().create(it.clean, wishes(RamChoice.NONE))
        before.add(made.id)
    try:
        new = await it.all_is_well() - before
    except AssertionError as broken:
        raise AssertionError(where) from broken
    assert len(new) == (0 if failure else 1), where
    if failure is not None and not owed:
        assert it.chains() == chains, where
    return happened


@pytest.mark.parametrize("delivered", [False, True], ids=["unseen", "delivered"])
@pytest.mark.parametrize(
    ("version", "ram"),
    [
        ("7.2", RamChoice.NONE),
        ("7.2", RamChoice.LIVE),
        ("7.2", RamChoice.PAUSED),
        ("10.0", RamChoice.BACKGROUND),
    ],
)
async def test_the_guest_runs_on_wherever_the_wire_is_cut(
    version: str, ram: RamChoice, delivered: bool, short: Path, store: Path
) -> None:
    async with bench(binary(version), short, store) as it:
        assert not await _cut(it, ram, None)
        names = list(it.wire.names)
        assert {"blockdev-add", "transaction"} <= set(names)
        # up to there every RAM mode does the same
        begun = names.index("blockdev-add")
        at = 1 if ram is RamChoice.NONE else begun + 1
        while await _cut(it, ram, Fault(at, delivered=delivered)):
            at += 1
            # nothing has been done yet: the same question asked again is no other place to cut;
            # what sets something, as the probe of a capability does, is one each time
            while at < begun and names[at - 1] == names[at - 2] and names[at - 1].startswith(ASKED):
                at += 1
        # how often a migration is asked for its state differs: one past the end is found, not known
        assert it.wire.seen < at
        assert at >= len(set(names))
