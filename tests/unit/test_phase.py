"""Every move of a snapshot, and none besides."""

from __future__ import annotations

import itertools

import pytest

from qmpsnap.engine.phase import MOVES, Phase, move
from qmpsnap.errors import IllegalMove


def test_every_phase_has_its_moves() -> None:
    assert set(MOVES) == set(Phase)


@pytest.mark.parametrize(("now", "to"), list(itertools.product(Phase, Phase)))
def test_only_the_moves_of_the_table_are_legal(now: Phase, to: Phase) -> None:
    if to in MOVES[now]:
        assert move(now, to) is to
    else:
        with pytest.raises(IllegalMove, match=f"from {now} to {to}"):
            move(now, to)


def test_what_is_sealed_is_never_undone() -> None:
    assert Phase.UNDONE not in MOVES[Phase.SEALED] | MOVES[Phase.PAIRED]
