"""What was found out about a restore: the rows, whether it can be, and what would be started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import msgspec

from qmpsnap.engine.blueprint import Blueprint
from qmpsnap.engine.half import Pair
from qmpsnap.engine.limiting import Limit
from qmpsnap.engine.restoration import Ready, Restoration
from qmpsnap.engine.verdict import Row
from qmpsnap.errors import Blocked, DamagedData, LocalFailed, Refused, SnapError, UsageError


class Fitness(msgspec.Struct, frozen=True, kw_only=True):
    """What `restore --check` says. *fits*: nothing blocks. *notices*: what the restored machine
    will not have as the captured one had it. *qemu*: the binary that would be started. *limits*:
    those that were captured, or that are suggested, and which of them would be set.
    """

    id: str
    vm: str
    revision: int
    cold: bool
    standalone: bool
    to: str
    qemu: str | None
    fits: bool
    rows: list[Row]
    notices: list[str]
    limits: list[Limit] = []


@dataclass(slots=True)
class Assessed:
    """The rows, and what raised those that were refusals of their own.

    *made*: the machine, as far as it could be; others like it are of the *blueprint*.
    """

    pair: Pair
    wish: Restoration
    rows: list[Row] = field(default_factory=list)
    errors: list[SnapError] = field(default_factory=list)
    made: Ready | None = None
    blueprint: Blueprint | None = None

    def shown(self) -> Fitness:
        ready = self.made
        return Fitness(
            id=self.pair.id,
            vm=self.pair.vm,
            revision=self.pair.storage.revision,
            cold=self.wish.cold,
            standalone=self.wish.standalone,
            to=str(self.wish.to),
            qemu=ready.relocated.cmdline.binary if ready else None,
            fits=not self.blocking,
            rows=self.rows,
            notices=ready.notices if ready else [],
            limits=ready.limits if ready else [],
        )

    def ready(self) -> Ready:
        """What may be started. Raises the first error, or Blocked with all that blocks."""
        if self.errors:
            raise self.errors[0]
        if self.blocking or self.made is None:
            told = "; ".join(f"{row.what}: {row.why}" for row in self.blocking)
            raise Blocked(
                f"{self.pair.vm} {self.pair.id} cannot come back here: {told}",
                hint="`qmpsnap restore --check` shows all that was compared",
            )
        warnings = [f"{row.what}: {row.why}" for row in self.rows if row.verdict == "differs"]
        return replace(self.made, warnings=warnings)

    def another(self, wish: Restoration) -> Ready:
        """What may be started besides, in the folder of *wish*, which is as the first one else.

        Page images that the first one has to make are there by then. Raises as `ready` does.
        """
        first = self.ready()
        assert self.blueprint is not None
        ready = self.blueprint.another(wish)
        return replace(ready, warnings=first.warnings, limits=first.limits, site=first.site)

    @property
    def blocking(self) -> list[Row]:
        return [row for row in self.rows if row.verdict == "blocks"]

    @contextmanager
    def row(self, what: str, captured: str, here: str = "as it was") -> Iterator[None]:
        """A row that is ok, or blocks with what the body raises."""
        try:
            yield
        except (Refused, DamagedData, LocalFailed, UsageError) as odd:
            self.errors.append(odd)
            blocked = Row(what=what, captured=captured, here="-", verdict="blocks", why=str(odd))
            self.rows.append(blocked)
        else:
            self.rows.append(Row(what=what, captured=captured, here=here, verdict="ok"))

    def differs(self, what: str, why: str) -> None:
        self.rows.append(Row(what=what, captured="-", here="-", verdict="differs", why=why))
