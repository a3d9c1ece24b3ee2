"""Figures in the words that people read."""

from __future__ import annotations

_MOST = 1 << 90  # more than there is: a file may say anything, and a float has its limits


def in_bytes(count: int | None) -> str:
    """A size for people: `64.0 MiB`."""
    if count is None:
        return "-"
    size, unit = float(min(count, _MOST)), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
