"""The most that a VM used over some of its snapshots: the only place that takes these maxima."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec

from qmpsnap.engine.sample import Sample
from qmpsnap.engine.usage import Usage

N = TypeVar("N", int, float)


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Maxima over *snapshot_count* snapshots; None: not known.

    *cpu_share* (1.5 is one and a half CPUs) and the rates are the highest means of an interval
    between two snapshots; without one, the share is that since QEMU's start. Memory is that of
    the process, *memory_bytes* with its swap; *hugetlb_bytes* are not part of it.
    """

    snapshot_count: int
    cpu_share: float | None = None
    memory_bytes: int | None = None
    swap_bytes: int | None = None
    hugetlb_bytes: int | None = None
    thread_count: int | None = None
    read_bytes_per_second: float | None = None
    write_bytes_per_second: float | None = None


def measured(usages: Sequence[Usage]) -> Measured:
    """What *usages*, of one VM, have at most."""
    samples = [one for each in usages for one in (each.before, each.after) if one is not None]
    over = [each.since_last for each in usages if each.since_last is not None]
    processes = [one.process for one in samples if one.process is not None]
    memories = [one.memory for one in samples if one.memory is not None]
    return Measured(
        snapshot_count=len(usages),
        cpu_share=_most([
            *(one.cpu_share for one in over),
            *(one.cpu_share_since_start for one in processes),
        ]),
        memory_bytes=_most(map(_held, samples)),
        swap_bytes=_most(one.swap_bytes for one in memories),
        hugetlb_bytes=_most(one.hugetlb_bytes for one in memories),
        thread_count=_most(one.thread_count for one in processes),
        read_bytes_per_second=_most(one.read_bytes_per_second for one in over),
        write_bytes_per_second=_most(one.write_bytes_per_second for one in over),
    )  # fmt: skip


def _held(sample: Sample) -> int | None:
    memory = sample.memory
    if memory is None or memory.rss_bytes is None:
        return None
    return max(memory.rss_bytes + (memory.swap_bytes or 0), memory.rss_peak_bytes or 0)


def _most(several: Iterable[N | None]) -> N | None:
    return max((one for one in several if one is not None), default=None)
