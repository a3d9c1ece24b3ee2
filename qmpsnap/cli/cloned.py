"""What `restore --clones` does and prints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmpsnap.cli.render import Output
    from qmpsnap.engine.clones import Clone, Planned
    from qmpsnap.engine.engine import Engine
    from qmpsnap.engine.restore import Ready, Restoration


@dataclass(frozen=True, slots=True)
class Asked:
    """How many, and what becomes of them."""

    count: int
    keep_macs: bool
    start: bool
    detach: bool


async def restore(
    engine: Engine,
    out: Output,
    vm: str,
    wish: Restoration,
    word: str,
    asked: Asked,
    show_command: Callable[[Ready, int], None],
) -> None:
    """Several machines of one snapshot, until all have ended; *show_command* when none starts."""
    from qmpsnap.cli import limited

    planned = await engine.prepare_clones(vm, wish, asked.count, word, keep_macs=asked.keep_macs)
    _tell(out, planned)
    if not out.json:
        limited.show(out, planned[0].ready.limits)
    if not asked.start:
        for one in planned:
            show_command(one.ready, one.number)
        return
    async with engine.cloned(planned, detach=asked.detach) as clones:
        _show(out, clones)
        if not asked.detach:
            out.notice("the machines run; Ctrl-C ends them")
            await asyncio.gather(*(one.restored.process.exited() for one in clones))
            out.notice("the machines have ended")


def _tell(out: Output, planned: Sequence[Planned]) -> None:
    """What holds for several of them is told once."""
    warnings = [warning for one in planned for warning in one.ready.warnings]
    for warning in dict.fromkeys(warnings):
        out.aside("warning", warning)
    for notice in dict.fromkeys(notice for one in planned for notice in one.ready.notices):
        out.notice(notice)


def _show(out: Output, clones: Sequence[Clone]) -> None:
    import msgspec

    from qmpsnap.cli import shapes

    shown = [one.shown() for one in clones]
    if out.json:
        for one in shown:
            out.record(msgspec.convert(one, shapes.Restored))
    else:
        head = ("CLONE", "PROCESS", "RAM", "CLOCK", "MAC", "QMP", "AGENT")
        rows = [
            [
                str(one["clone"]),
                str(one["pid"]),
                one["ram"] or "-",
                one["clock"],
                ", ".join(one["macs"].values()) or "-",
                one["qmp"],
                one["agent"] or "-",
            ]
            for one in shown
        ]
        out.table(head, rows)
    for clone in clones:
        for notice in clone.notices:
            out.notice(f"clone {clone.number}: {notice}")
    out.flush()
