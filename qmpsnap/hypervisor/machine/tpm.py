"""The only place that knows over which socket QEMU speaks with the TPM's emulator."""

from __future__ import annotations

from pathlib import Path

from qmpsnap.hypervisor.machine.cmdline import CommandLine
from qmpsnap.hypervisor.machine.options import Chardev, fields_of


def emulator(line: CommandLine, cwd: Path) -> tuple[str, Path | None] | None:
    """The id of the emulated TPM of *line*, started in *cwd*, and the socket of its emulator.

    None without one; QEMU takes no second TPM. The socket is None when QEMU connects to no path.
    """
    for option in line.all("tpmdev"):
        fields = fields_of(option)
        if fields.get("type") != "emulator":
            continue
        views = (Chardev.of(one) for one in line.all("chardev"))
        chardev = next((one for one in views if one.id == fields.get("chardev")), None)
        reached = chardev is not None and chardev.backend == "socket" and not chardev.server
        path = chardev.path if chardev is not None and reached else None
        return fields.get("id") or "tpm", cwd / path if path else None
    return None
