"""One VM as the caller names it: a name for its folders, and the sockets that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qmpsnap.errors import UsageError, VmUnknown
from qmpsnap.ids import is_vm_name


@dataclass(frozen=True, slots=True)
class Machine:
    """A VM. *qmp* is its QMP socket, *agent* that of its guest agent, if it has one.

    Without *qmp* only what is on the two roots can be worked with. Raises UsageError for a name
    that cannot be a folder: letters, digits, `.`, `_` and `-`, at most 64.
    """

    name: str
    qmp: Path | None = None
    agent: Path | None = None

    def __post_init__(self) -> None:
        if not is_vm_name(self.name):
            raise UsageError(f"not a name for a VM: {self.name!r}")

    @property
    def socket(self) -> Path:
        """The QMP socket. Raises VmUnknown without one."""
        if self.qmp is None:
            raise VmUnknown(f"no QMP socket is known for the VM {self.name}")
        return self.qmp
