"""The only place that says as an option which disk a device was plugged with at run time."""

from __future__ import annotations

from dataclasses import dataclass

from qmpsnap.errors import Blocked
from qmpsnap.hypervisor.block.graph import Disk
from qmpsnap.hypervisor.machine.cmdline import Option
from qmpsnap.hypervisor.machine.keyval import Fields, Pair
from qmpsnap.hypervisor.machine.options import option_of

_BACKEND = "/virtio-backend"


@dataclass(frozen=True, slots=True)
class Image:
    """A disk by its name on a command line, *origin*, and its file there: "" if it is in none."""

    disk: Disk
    origin: str
    path: str

    def of(self, path: str, ident: str | None) -> bool:
        """Whether the device at the QOM *path*, or one that it made for itself, shows it."""
        qdev = self.disk.qdev.removesuffix(_BACKEND)
        # QEMU 7.2 gives the bare id of some
        return qdev == path or qdev.startswith(f"{path}/") or (ident is not None and qdev == ident)

    def option(self) -> Option:
        """Its -blockdev, or its -drive if it is one that has a name of its own.

        Raises Blocked for one that is only read, and in no file, or only a part of one.
        """
        disk, top = self.disk, self.disk.top
        if disk.trouble:
            raise Blocked(f"disk {disk.name}: {disk.trouble}")
        if disk.read_only and not self.path:
            raise Blocked(f"disk {disk.name}: its file cannot be told")
        if disk.device:
            pairs: list[Pair] = [("if", "none"), ("id", disk.device), ("file", self.path)]
            pairs += [("format", top.driver), ("cache.direct", _word(top.cache_direct))]
            pairs += [("cache.no-flush", _word(top.cache_no_flush))]
            pairs += [("detect-zeroes", top.detect_zeroes), ("readonly", _word(disk.read_only))]
            return option_of("drive", Fields(tuple(pairs)))
        protocol = "host_device" if self.path.startswith("/dev/") else "file"
        pairs = [("driver", top.driver), ("node-name", self.origin)]
        pairs += [("read-only", _word(disk.read_only)), ("detect-zeroes", top.detect_zeroes)]
        pairs += [("cache.direct", _word(top.cache_direct))]
        pairs += [("cache.no-flush", _word(top.cache_no_flush))]
        pairs += [("file.driver", protocol), ("file.filename", self.path)]
        return option_of("blockdev", Fields(tuple(pairs)))


def _word(on: bool) -> str:
    return "on" if on else "off"
