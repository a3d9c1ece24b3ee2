"""Figures in the words that people read."""

from __future__ import annotations


def in_bytes(count: int | None) -> str:
    """A size for people: `64.0 MiB`."""
    if count is None:
        return "-"
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
