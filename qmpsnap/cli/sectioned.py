"""What `show --vmstate` prints: the RAM blocks and the devices' sections of an execution state."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmpsnap.cli.render import Output
    from qmpsnap.engine.execution import ExecutionState


def show(out: Output, state: ExecutionState) -> None:
    """Print *state*: its facts, then a table of blocks and one of sections, in their order."""
    from qmpsnap.cli.render import in_bytes

    out.facts([
        ("snapshot", f"{state.id} of {state.vm}"),
        ("RAM", state.mode),
        ("machine type", state.machine),
        ("stream", in_bytes(state.stream_bytes)),
        ("RAM in it", in_bytes(state.ram_bytes)),
        ("devices", in_bytes(sum(one.bytes for one in state.sections))),
    ])  # fmt: skip
    out.line()
    out.table(
        ("RAM BLOCK", "BYTES", "STORED PAGES", "ZERO PAGES", "WHERE"),
        [
            [one.name, in_bytes(one.bytes), str(one.stored_pages), str(one.zero_pages), one.place]
            for one in state.blocks
        ],
    )
    out.line()
    out.table(
        ("SECTION", "INSTANCE", "VERSION", "BYTES"),
        [[one.name, str(one.instance), str(one.version), str(one.bytes)] for one in state.sections],
    )
