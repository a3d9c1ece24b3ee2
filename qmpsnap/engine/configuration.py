"""`machine.json`: what a new QEMU needs to take up a captured state."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from qmpsnap.engine.survey import Survey
from qmpsnap.errors import HalfMissing, ManifestError
from qmpsnap.hypervisor.machine import inventory, records
from qmpsnap.hypervisor.machine.cmdline import CommandLine


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """The captured machine. *machine_type* is resolved: `pc` became `pc-i440fx-7.2`.

    *options* is the command line as typed options, *cwd* the folder its paths start from; both
    are None when QEMU's process could not be found (then no RAM was taken either).
    """

    format: Literal["qmpsnap-machine"] = "qmpsnap-machine"
    version: int = 1
    vm: str
    qemu_version: str
    qemu_package: str
    machine_type: str | None
    exe: str | None
    cwd: str | None
    options: list[dict[str, Any]] | None
    hotplugged: list[str]
    unplugged: list[str]
    inventory: inventory.Inventory

    def command_line(self) -> tuple[CommandLine, Path]:
        """The command line and its folder. Raises HalfMissing if it is not known."""
        if self.options is None or self.cwd is None or self.exe is None:
            raise HalfMissing(f"{self.vm}: the captured command line is not known")
        return records.from_json(self.exe, self.options), Path(self.cwd)


def of(facts: Survey) -> Configuration:
    """The configuration of a running VM."""
    line = facts.attached.line if facts.attached else None
    return Configuration(
        vm=facts.machine.name,
        qemu_version=facts.abilities.version,
        qemu_package=facts.abilities.package,
        machine_type=facts.inventory.machine,
        exe=facts.process.exe if facts.process else None,
        cwd=str(facts.attached.cwd) if facts.attached else None,
        options=records.as_json(line) if line else None,
        hotplugged=inventory.hotplugged(facts.inventory, line) if line else [],
        unplugged=inventory.unplugged(facts.inventory, line) if line else [],
        inventory=facts.inventory,
    )


def encode(configuration: Configuration) -> bytes:
    return msgspec.json.format(msgspec.json.encode(configuration), indent=2) + b"\n"


def decode(text: str | bytes, path: str) -> Configuration:
    """Raises ManifestError, naming *path* and the key."""
    try:
        configuration = msgspec.json.decode(text, type=Configuration)
    except msgspec.DecodeError as odd:
        raise ManifestError(f"{path}: {odd}") from odd
    if configuration.version != 1:
        raise ManifestError(
            f"{path}: is qmpsnap-machine version {configuration.version}; this qmpsnap knows 1"
        )
    return configuration
