"""The only place that fits our monitor into a command line that somebody else wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.errors import UsageError
from qmpsnap.hypervisor.machine import readconfig
from qmpsnap.hypervisor.machine.attach import agent_socket
from qmpsnap.hypervisor.machine.cmdline import parse
from qmpsnap.hypervisor.machine.options import applied_sets, guest_name
from qmpsnap.hypervisor.machine.relocate import QMP_ID, control
from qmpsnap.ids import is_vm_name

_NOT_WITH_US = ("daemonize", "chroot", "runas")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What to launch, under which name, and where it will answer."""

    name: str
    argv: list[str]
    qmp: Path
    agent: Path | None


def prepared(argv: Sequence[str], *, name: str | None, directory: Path) -> Prepared:
    """The QEMU of *argv*, to be started here, with our QMP monitor in *directory* added.

    Its name is *name*, or the guest's (-name). Its own monitors stay as they are.

    Raises UsageError for a command line without a name, or one that would escape us; Blocked as
    `cmdline.parse` and `readconfig.included` do: what we cannot read now cannot be taken later.
    """
    line = parse(argv)
    whole = readconfig.included(line, Path.cwd())
    if any(f"id={QMP_ID}" in (option.value or "") for option in whole.all("chardev")):
        raise UsageError(f"the command line has a chardev {QMP_ID} already")
    for odd in line.all(*_NOT_WITH_US):
        raise UsageError(f"{odd}: QEMU would leave our hands", hint="leave it out")
    chosen = name or guest_name(whole)
    if chosen is None:
        raise UsageError("the machine has no name", hint="give --name, or -name to QEMU")
    if not is_vm_name(chosen):
        raise UsageError(f"not a name for a VM: {chosen!r}")
    qmp = directory / "qmp.sock"
    agent = agent_socket(applied_sets(whole), Path.cwd())
    return Prepared(chosen, line.append(*control(qmp)).argv(), qmp, agent)
