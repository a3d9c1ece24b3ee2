"""Whether a live save will get to its end: judged from its passes, with nothing but numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from qmpsnap.hypervisor.vmstate.migration import Ram

_PASSES = 6  # passes over the dirty pages that it gets before it is judged
_SECONDS = 3.0  # and at least so long after its first pass


class Verdict(StrEnum):
    GOING = "going"
    STUCK = "will not converge"


@dataclass(slots=True)
class Convergence:
    """Fed with `ram` of query-migrate and the seconds since the start.

    The first pass takes as long as it takes: all RAM once. After it each pass is over what the
    guest dirtied during the one before, so what remains at the start of a pass must shrink. Over
    *budget* seconds after the first pass, or when _PASSES passes did not halve it, it is stuck.
    """

    budget: float
    first_pass: float | None = None
    remains: list[int] = field(default_factory=list)
    _passes: int = 0

    def judge(self, ram: Ram, seconds: float) -> Verdict:
        passes = ram.dirty_sync_count
        if passes < 2:  # 1: the first pass is under way
            return Verdict.GOING
        if self.first_pass is None:
            self.first_pass = seconds
        if passes != self._passes:
            self._passes = passes
            self.remains.append(ram.remaining)
        since = seconds - self.first_pass
        if since > max(self.budget, self.first_pass):
            return Verdict.STUCK
        if since > _SECONDS and len(self.remains) > _PASSES:
            recent = min(self.remains[-_PASSES:])
            if recent > min(self.remains[:-_PASSES]) / 2:
                return Verdict.STUCK
        return Verdict.GOING
