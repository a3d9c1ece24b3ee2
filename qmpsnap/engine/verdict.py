"""One row of the comparison of a captured machine with this host."""

from __future__ import annotations

from typing import Literal

import msgspec

Verdict = Literal["ok", "differs", "blocks"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that a restore needs: as it was captured, as it is here, and what follows.

    *differs*: the restore goes on, and *why* should be known. *blocks*: it is refused.
    """

    what: str
    captured: str
    here: str
    verdict: Verdict
    why: str = ""


def row(
    what: str, captured: str | None, here: str | None, *, blocks: str = "", differs: str = ""
) -> Row:
    """A row with the verdict that the reasons make; without one it is ok."""
    verdict: Verdict = "blocks" if blocks else "differs" if differs else "ok"
    return Row(
        what=what,
        captured=captured or "-",
        here=here or "-",
        verdict=verdict,
        why=blocks or differs,
    )
