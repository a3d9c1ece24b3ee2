"""A machine that is made of a snapshot more than once: the only place that makes the others."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qmpsnap.engine import companion, ramback, restoration
from qmpsnap.engine.configuration import Configuration
from qmpsnap.engine.half import Glanced
from qmpsnap.engine.restoration import Ready, Restoration
from qmpsnap.store.manifest import Shared


@dataclass(frozen=True, slots=True)
class Blueprint:
    """All that *first* was made of, for a QEMU of this *version*."""

    machine: Configuration
    fetched: tuple[Shared, ...]
    seen: Glanced
    version: str
    first: Ready

    def another(self, wish: Restoration) -> Ready:
        """The same machine in the folder of *wish*, on the page images of the first one.

        Raises Blocked, HalfMissing, UsageError for one that cannot be.
        """
        made = restoration.ready(self.first.pair, wish, self.machine, self.fetched)
        ready, _ = companion.with_tpm(made, self.seen)
        if wish.cold:
            return ready
        there = replace(self.first.memory, lacking="")
        return with_memory(ready, there, self.machine, self.version)


def with_memory(
    ready: Ready, memory: ramback.Memory, machine: Configuration, version: str
) -> Ready:
    """*ready*, its RAM from the images of *memory* as far as QEMU *version* can map them."""
    backends = (machine.details.memory_backends if machine.details else None) or []
    memory, line, notices = ramback.given(
        memory,
        ready.pair,
        ready.relocated.cmdline,
        version=version,
        huge={one.id for one in backends if one.id and one.huge_page_bytes is not None},
    )
    relocated = replace(ready.relocated, cmdline=line, notices=[*ready.relocated.notices, *notices])
    return replace(ready, memory=memory, relocated=relocated)
