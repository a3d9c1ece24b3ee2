"""Paired snapshots of running QEMU virtual machines: storage here, state on the store, one ID."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmpsnap.engine.engine import Engine
    from qmpsnap.engine.machine import Machine

__all__ = ["Engine", "Machine", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # lazily, so that `qmpsnap --help` does not load the engine
    if name == "Engine":
        from qmpsnap.engine.engine import Engine

        return Engine
    if name == "Machine":
        from qmpsnap.engine.machine import Machine

        return Machine
    raise AttributeError(name)
