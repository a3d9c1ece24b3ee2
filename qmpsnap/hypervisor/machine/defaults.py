"""The only place that keeps a changed command line's default devices as they were."""

from __future__ import annotations

from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.drives import slots
from qmpsnap.hypervisor.machine.options import Device

# vl.c: default_list. With one of them QEMU adds no CD-ROM drive of its own.
_FOR_CDROM = frozenset({"ide-cd", "ide-hd", "scsi-cd", "scsi-hd"})
_CDROM = Option("drive", "index=2,media=cdrom")
# a -global counts as a device there; this one changes nothing
_NO_CDROM = Option("global", "scsi-cd.port_index=0")


def kept(before: CommandLine, after: CommandLine) -> CommandLine:
    """*after*, which QEMU gives the same unspoken CD-ROM drive and network card as *before*.

    Screens and serial lines are none of those that come or go at run time.
    """
    if before.has("nodefaults"):
        return after
    if _has_network(before) and not _has_network(after):
        after = after.append(Option("net", "none"))
    elif _has_network(after) and not _has_network(before):
        after = after.append(Option("net", "nic"), Option("net", "user"))
    if _has_cdrom(before) and not _has_cdrom(after):
        return after if _taken(after) else after.append(_CDROM)
    if _has_cdrom(after) and not _has_cdrom(before):
        return after.append(_NO_CDROM)
    return after


def _has_network(line: CommandLine) -> bool:
    """Whether QEMU takes the line's word for its network."""
    return line.has("netdev", "nic", "net")


def _has_cdrom(line: CommandLine) -> bool:
    """Whether QEMU adds a CD-ROM drive, where there is room for it."""
    devices = (Device.of(option).driver or "" for option in line.all("device"))
    spoken = ((option.value or "") for option in line.all("global"))
    return _FOR_CDROM.isdisjoint(devices) and not any(
        text.partition(".")[0] in _FOR_CDROM or f"driver={name}," in f"{text},"
        for text in spoken
        for name in _FOR_CDROM
    )


def _taken(line: CommandLine) -> bool:
    *others, ours = slots(line.append(_CDROM))
    return any(one.backend.replace("-hd", "-cd") == ours.backend for one in others)
