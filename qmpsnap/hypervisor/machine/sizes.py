"""The only place that reads a size as QEMU's options have it."""

from __future__ import annotations

import re

_UNITS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_LONGEST = 64  # characters: no more than a float can hold
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([bkmgtpe]?)", re.IGNORECASE)


def in_bytes(text: str | None, *, bare: str = "") -> int | None:
    """Bytes of `64M` or `1.5g`; a number alone is of the unit *bare*. None for what is no size."""
    found = _SIZE.fullmatch(text or "")
    if found is None or len(text or "") > _LONGEST:
        return None
    return int(float(found[1]) * (1 << _UNITS[(found[2] or bare).lower()]))
