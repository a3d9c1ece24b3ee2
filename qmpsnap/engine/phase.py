"""The phases of `create`, in the words of the journal, and every move between them."""

from __future__ import annotations

from enum import StrEnum

from qmpsnap.errors import IllegalMove


class Phase(StrEnum):
    PLANNED = "planned"  # overlays are being made; QEMU was asked, not touched
    HOLDING = "holding"  # freeze, stop or migrate may be sent from here on
    CAPTURED = "captured"  # the guest runs on its overlays; disks and RAM are on local disk
    COPIED = "copied"  # the copies are whole, and the overlays of the copied disks folded back
    SEALED = "sealed"  # the local half is sealed, the store half whole in the spool
    PAIRED = "paired"  # both halves are sealed and name each other
    UNDONE = "undone"  # given up: the overlays were folded back


MOVES: dict[Phase, frozenset[Phase]] = {
    Phase.PLANNED: frozenset({Phase.HOLDING, Phase.UNDONE}),
    Phase.HOLDING: frozenset({Phase.CAPTURED, Phase.UNDONE}),
    Phase.CAPTURED: frozenset({Phase.COPIED, Phase.SEALED, Phase.UNDONE}),
    Phase.COPIED: frozenset({Phase.SEALED, Phase.UNDONE}),
    Phase.SEALED: frozenset({Phase.PAIRED}),
    Phase.PAIRED: frozenset(),
    Phase.UNDONE: frozenset(),
}


def move(now: Phase, to: Phase) -> Phase:
    """*to*, if it may follow *now*. Raises IllegalMove: that is a bug of ours."""
    if to not in MOVES[now]:
        raise IllegalMove(f"from {now} to {to}")
    return to
