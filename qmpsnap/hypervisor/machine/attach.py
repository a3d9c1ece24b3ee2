"""The only place that reads what a running QEMU tells by its command line alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.hypervisor.machine import character, readconfig
from qmpsnap.hypervisor.machine.cmdline import CommandLine, parse
from qmpsnap.hypervisor.machine.options import (
    Chardev,
    Device,
    applied_sets,
    fields_of,
    guest_name,
)

AGENT_PORT = "org.qemu.guest_agent.0"


@dataclass(frozen=True, slots=True)
class Attached:
    """A running QEMU as its command line has it; paths are absolute."""

    line: CommandLine
    cwd: Path
    name: str | None
    qmp: tuple[Path, ...]
    agent: Path | None


def facts(argv: Sequence[str], cwd: Path, *, started: float | None = None) -> Attached:
    """What *argv*, started in *cwd*, says: both as /proc has them.

    *started*: when, in seconds since the epoch; a file of -readconfig that was changed later is
    not what QEMU has read. Raises UsageError or Blocked, as `cmdline.parse` and
    `readconfig.included` do.
    """
    line = applied_sets(readconfig.included(parse(argv), cwd, started=started))
    return Attached(line, cwd, guest_name(line), tuple(_qmp(line, cwd)), agent_socket(line, cwd))


def agent_chardev(line: CommandLine) -> str | None:
    """The id of the chardev behind the guest agent's port."""
    for option in line.all("device"):
        device = Device.of(option)
        if device.fields.get("name") == AGENT_PORT:
            return device.fields.get("chardev")
    return None


def agent_socket(line: CommandLine, cwd: Path) -> Path | None:
    """Where the guest agent is reached, if QEMU listens for it on a unix socket."""
    wanted = agent_chardev(line)
    for option in line.all("chardev"):
        chardev = Chardev.of(option)
        if chardev.id == wanted and chardev.path and chardev.server:
            return cwd / chardev.path
    return None


def control_chardevs(line: CommandLine) -> set[str]:
    """The ids of the chardevs on which QMP is spoken."""
    found = set()
    for option in line.all("mon", "object"):
        fields = fields_of(option)
        control = fields.get("mode") == "control" or fields.get("qom-type") == "monitor-qmp"
        if control and (chardev := fields.get("chardev")):
            found.add(chardev)
    return found


def _qmp(line: CommandLine, cwd: Path) -> list[Path]:
    control = control_chardevs(line)
    chardevs = [Chardev.of(option) for option in line.all("chardev")]
    words = [character.parse(option.value or "") for option in line.all("qmp", "qmp-pretty")]
    fields = [chardev.fields for chardev in chardevs if chardev.id in control]
    fields += [chardev.fields for chardev in chardevs if chardev.id in {w.chardev for w in words}]
    fields += [word.fields for word in words if word.chardev is None]
    paths = [one.get("path") for one in fields if one.get("backend") == "socket"]
    return [cwd / path for path in paths if path]
