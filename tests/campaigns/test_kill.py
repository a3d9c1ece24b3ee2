"""A small sample of the campaign that kills an engine wherever it waits, and of its instrument."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.engine.wishes import Level, RamChoice
from tests.campaigns.awaits import Eye
from tests.campaigns.kill import counted, struck
from tests.campaigns.killing import Case, strikes
from tests.faults.bench import bench, wishes
from tests.rig.qemu import binary

_CASES = [
    Case("7.2", "create", RamChoice.LIVE, Level.OVERLAY),
    Case("10.0", "create", RamChoice.BACKGROUND, Level.FULL),
    Case("7.2", "refresh", RamChoice.NONE, Level.AUTO),
]
_LEAST = 60  # positions of each


def test_every_suspension_of_every_task_is_seen(
    qemu72: Path, short: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of a task is one call by the event loop, and ends where it waits, or for good."""
    eye, steps = Eye(), 0
    plain = asyncio.Handle._run

    def run(handle: Any) -> None:
        nonlocal steps
        # the first step, and each one that a future wakes
        of = getattr(handle._callback, "__self__", None)
        first = type(handle._callback).__name__ == "TaskStepMethWrapper"
        steps += first or isinstance(of, asyncio.Task)
        plain(handle)

    async def made() -> None:
        async with bench(qemu72, short, store) as it:
            await it.engine().create(it.clean, wishes(RamChoice.LIVE, level=Level.FULL))

    monkeypatch.setattr(asyncio.Handle, "_run", run)
    with asyncio.Runner(loop_factory=eye.loop) as runner:
        runner.run(made())
    assert steps == eye.suspensions + eye.ends
    assert eye.suspensions > sum(eye.visits.values()) > len(eye.visits) >= _LEAST


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_a_kill_wherever_it_waits_leaves_the_guest_running_and_nothing_behind(case: Case) -> None:
    binary(case.version)
    positions, suspensions = counted(case)
    assert len(positions) >= _LEAST
    assert suspensions > len(positions)
    owing = next(n for n, (at, _) in enumerate(positions) if "engine/debt.py" in at)
    some = random.Random(6).sample(list(strikes(positions[owing:])), 4)
    found = struck(case, some)
    assert [one for one in found if one.wrong] == []
    assert any(one.struck for one in found)
