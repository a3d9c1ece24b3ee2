"""What the groups above allow: the only place that looks up from a group, and compares limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.host import limits
from qmpsnap.host.limits import Folders, GroupLimits, IoLimits, either


@dataclass(frozen=True, slots=True)
class Bound:
    """One group, in one hierarchy: its *folder*, its own limits, and how many tasks it has."""

    folder: str
    limits: GroupLimits
    pids_count: int | None = None


def bounds(folders: Folders) -> list[Bound]:
    """The groups in *folders* (by v1 controller, or "" for v2), then those above, upwards."""
    together: dict[Path, list[str]] = {}
    for name, folder in folders.items():
        together.setdefault(folder, []).append(name)
    found = []
    for folder, names in together.items():
        for one in [folder, *folder.parents]:
            if not (one / "cgroup.procs").exists():
                break  # above the top of the hierarchy
            own = dict.fromkeys(names, one)
            pids = either(own, "pids", "pids.current", "pids.current")
            found.append(Bound(str(one), limits.limits(own), pids))
    return found


def exceeded(wanted: GroupLimits, above: Sequence[Bound]) -> Iterator[tuple[str, str]]:
    """Each limit of *wanted* that a group above does not allow: its field and why."""
    for bound in above:
        for field, most in _largest(bound.limits).items():
            value = _largest(wanted).get(field)
            if value is not None and value > most:
                yield field, f"{value:.12g} is above the {most:.12g} of {bound.folder}"
        for field in ("cpus", "memory_nodes"):
            missing = sorted(_missing(getattr(wanted, field), getattr(bound.limits, field)))
            if missing:
                told = ", ".join(map(str, missing))
                yield field, f"{told}: not among those of {bound.folder}"


def _missing(wanted: Sequence[int] | None, there: Sequence[int] | None) -> set[int]:
    return set(wanted or ()) - set(there) if there is not None else set()


def _largest(of: GroupLimits) -> Mapping[str, float]:
    """What may not be larger than the same of a group above."""
    plain = {
        "cpu_max_count": of.cpu_max_count,
        "memory_high_bytes": of.memory_high_bytes,
        "memory_max_bytes": of.memory_max_bytes,
        "swap_max_bytes": of.swap_max_bytes,
        "memory_and_swap_max_bytes": of.memory_and_swap_max_bytes,
        "pids_max_count": of.pids_max_count,
    }
    found: dict[str, float] = {name: most for name, most in plain.items() if most is not None}
    for size, most in (of.hugetlb_max_bytes or {}).items():
        found[f"hugetlb_max_bytes.{size}"] = most
    for device, one in (of.io_max or {}).items():
        for rate in IoLimits.__struct_fields__:
            if (most := getattr(one, rate)) is not None:
                found[f"io_max.{device}.{rate}"] = most
    return found
