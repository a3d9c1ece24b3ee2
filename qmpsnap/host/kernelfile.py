"""Figures out of files of /proc, /sys and cgroups: the only place that reads their small text."""

from __future__ import annotations

from pathlib import Path

_MOST = 1 << 16  # CPUs, or nodes, of a host


def text(path: Path) -> str | None:
    """What is written there, without blanks around it; None where it is not, or not for us."""
    try:
        return path.read_text(errors="replace").strip()
    except (OSError, ValueError):  # no path has a NUL
        return None


def number(path: Path) -> int | None:
    """The one number in a file; None also where it says "max", or nothing that is a number."""
    return whole(text(path))


def whole(word: str | None) -> int | None:
    """*word* as a number, None where it is none."""
    try:
        return int(word or "")
    except ValueError:
        return None


def table(path: Path, separator: str | None = None) -> dict[str, str]:
    """Lines of a name and its value, apart by *separator* or blanks; empty without the file."""
    pairs = [line.split(separator, 1) for line in (text(path) or "").splitlines()]
    return {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}


def kilobytes(fields: dict[str, str], name: str) -> int | None:
    """The bytes of a line such as `VmRSS:  1636 kB`; None where there is no such line."""
    count = whole(fields.get(name, "").removesuffix("kB").strip())
    return None if count is None else count * 1024


def numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number, such as those of `cpu.stat`; others are left out."""
    found = {name: whole(value) for name, value in table(path).items()}
    return {name: value for name, value in found.items() if value is not None}


def cpu_list(spelled: str | None) -> list[int] | None:
    """The numbers in `0-3,8`, as cpuset(7) spells lists of CPUs and of memory nodes."""
    if not spelled:
        return None
    found: list[int] = []
    for part in spelled.split(","):
        first, _, last = part.partition("-")
        low, high = whole(first), whole(last or first)
        if low is None or high is None or not 0 <= low <= high < _MOST:
            return None
        found += range(low, high + 1)
    return found
