"""Transactions: a list of values that QEMU carries out all together or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qmpsnap.hypervisor.block.bitmap import GRANULARITY
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


@dataclass(frozen=True, slots=True)
class AddBitmap:
    """block-dirty-bitmap-add: from here on the bitmap *name* records the writes of *node*.

    Before a Snapshot of the same node it stands empty while that node is frozen. *persistent*:
    only qcow2 can keep it (version 3, writable). *granularity* in bytes.
    """

    node: NodeName
    name: str
    persistent: bool
    granularity: int = GRANULARITY

    def wire(self) -> dict[str, object]:
        return {
            "type": "block-dirty-bitmap-add",
            "data": {
                "node": self.node,
                "name": self.name,
                "persistent": self.persistent,
                "granularity": self.granularity,
            },
        }


@dataclass(frozen=True, slots=True)
class MergeBitmap:
    """block-dirty-bitmap-merge: what *name* on *source* says, *name* on *node* then says too."""

    node: NodeName
    name: str
    source: NodeName

    def wire(self) -> dict[str, object]:
        return {
            "type": "block-dirty-bitmap-merge",
            "data": {
                "node": self.node,
                "target": self.name,
                "bitmaps": [{"node": self.source, "name": self.name}],
            },
        }


Action = Snapshot | AddBitmap | MergeBitmap


def wire(actions: Sequence[Action]) -> dict[str, object]:
    """The arguments of the QMP command `transaction`."""
    return {"actions": [action.wire() for action in actions]}


async def commit(monitor: Monitor, actions: Sequence[Action]) -> None:
    """Carry out all of *actions* at one instant, or none (CommandRefused).

    QEMU drains and flushes every node first (blockdev.c, qmp_transaction). No actions, no command.
    """
    if actions:
        await monitor.execute("transaction", wire(actions))
