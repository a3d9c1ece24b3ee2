"""Transactions: a list of values that QEMU carries out all together or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qmpsnap.hypervisor.monitor import Monitor
from qmpsnap.ids import NodeName


@dataclass(frozen=True, slots=True)
class Snapshot:
    """blockdev-snapshot: from here on *overlay* takes the writes of *node*, its new backing."""

    node: NodeName
    overlay: NodeName

    def wire(self) -> dict[str, object]:
        return {
            "type": "blockdev-snapshot",
            "data": {"node": self.node, "overlay": self.overlay},
        }


def wire(actions: Sequence[Snapshot]) -> dict[str, object]:
    """The arguments of the QMP command `transaction`."""
    return {"actions": [action.wire() for action in actions]}


async def commit(monitor: Monitor, actions: Sequence[Snapshot]) -> None:
    """Carry out all of *actions* at one instant, or none (CommandRefused).

    QEMU drains and flushes every node first (blockdev.c, qmp_transaction). No actions, no command.
    """
    if actions:
        await monitor.execute("transaction", wire(actions))
