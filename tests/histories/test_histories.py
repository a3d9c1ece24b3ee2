"""Whatever happened to a VM, each snapshot and revision restores to the bytes of its instant."""

from __future__ import annotations

import collections
import logging
from pathlib import Path

import pytest

from tests.histories.history import history
from tests.histories.world import carried_out
from tests.rig.qemu import binary

_SHM = Path("/dev/shm")
_SEEDS = [("7.2", range(15)), ("10.0", range(20, 25)), ("11.1", range(40, 45))]


@pytest.mark.parametrize(
    ("version", "seed"), [(version, seed) for version, seeds in _SEEDS for seed in seeds]
)
async def test_each_point_restores_to_the_bytes_of_its_instant(
    version: str, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    # a QEMU that is killed is news to the library that speaks to it
    caplog.set_level(logging.CRITICAL + 1, logger="qemu.qmp")
    counts = await carried_out(history(seed), binary(version), _SHM)
    assert counts["check"] >= 2


def test_the_seeds_meet_every_kind_of_thing() -> None:
    """The control of the above: what a history may contain is in those that are run."""
    met: collections.Counter[str] = collections.Counter()
    for _, seeds in _SEEDS:
        for seed in seeds:
            for word, *more in history(seed)["operations"]:
                met[word] += 1
                if word == "fault":
                    met[more[1]["how"]] += 1
                if word == "create":
                    met[more[0]["level"]] += 1
    words = {"write", "create", "refresh", "delete", "prune", "restart", "kill", "resize"}
    levels = {"auto", "inc", "diff", "full", "overlay"}
    faults = {"cut", "qemu", "engine at command", "engine at call", "engine at note"}
    assert words | levels | faults <= set(met)
