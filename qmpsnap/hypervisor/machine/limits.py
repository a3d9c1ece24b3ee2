"""The only place that knows the two ways in which QEMU spells the limits of a disk's I/O."""

from __future__ import annotations

from typing import Any

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes (`bps`) and operations (`iops`) a second, 0 for no limit; `max` is that of a burst,
    and `max_seconds` how long it may last. *iops_size*: bytes that count as one operation.
    """

    bps_total: int = 0
    bps_read: int = 0
    bps_write: int = 0
    iops_total: int = 0
    iops_read: int = 0
    iops_write: int = 0
    bps_total_max: int = 0
    bps_read_max: int = 0
    bps_write_max: int = 0
    iops_total_max: int = 0
    iops_read_max: int = 0
    iops_write_max: int = 0
    bps_total_max_seconds: int = 1
    bps_read_max_seconds: int = 1
    bps_write_max_seconds: int = 1
    iops_total_max_seconds: int = 1
    iops_read_max_seconds: int = 1
    iops_write_max_seconds: int = 1
    iops_size: int = 0


def of_group(limits: dict[str, Any]) -> Limits:
    """Those of a throttle-group's `limits` (qapi: ThrottleLimits)."""
    spelled = {
        key.replace("-", "_").replace("_max_length", "_max_seconds"): value
        for key, value in limits.items()
    }
    return msgspec.convert(spelled, Limits)


def of_drive(inserted: dict[str, Any]) -> Limits | None:
    """Those of a drive (qapi: BlockDeviceInfo); None where it has none at all.

    There `bps` is the total, `bps_rd` reads, and 0 also what was never set.
    """
    found: dict[str, Any] = {}
    for kind in ("bps", "iops"):
        for short, whole in (("", "total"), ("_rd", "read"), ("_wr", "write")):
            found[f"{kind}_{whole}"] = inserted.get(f"{kind}{short}", 0)
            for more, last in (("_max", "max"), ("_max_length", "max_seconds")):
                if value := inserted.get(f"{kind}{short}{more}", 0):
                    found[f"{kind}_{whole}_{last}"] = value
    found["iops_size"] = inserted.get("iops_size", 0)
    limits = msgspec.convert(found, Limits)
    return None if limits == Limits() else limits
