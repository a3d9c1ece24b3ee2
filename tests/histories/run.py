"""Long runs of random histories, and replays of one: what `scripts/histories` starts."""

from __future__ import annotations

import argparse
import asyncio
import collections
import concurrent.futures
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.histories.history import history, shorter
from tests.histories.world import Wrong, carried_out
from tests.rig.qemu import VERSIONS, binaries


def outcome(told: dict[str, Any], version: str, folder: str) -> tuple[str, dict[str, int], float]:
    """What went wrong with the history *told*, empty if nothing; what happened, and seconds."""
    began = time.monotonic()
    try:
        counts = asyncio.run(carried_out(told, binaries()[version], Path(folder)))
    except Wrong as wrong:
        return str(wrong), {}, time.monotonic() - began
    return "", dict(counts), time.monotonic() - began


def main() -> int:
    asked = _asked()
    logging.basicConfig(level=logging.DEBUG if asked.verbose else logging.CRITICAL + 1)
    os.nice(asked.nice)
    if asked.replay is not None:
        return _replayed(asked)
    seeds = range(asked.seed, asked.seed + asked.count)
    plan = [(seed, asked.qemu[seed % len(asked.qemu)]) for seed in seeds]
    total: collections.Counter[str] = collections.Counter()
    failed: list[int] = []
    began = time.monotonic()
    with concurrent.futures.ProcessPoolExecutor(asked.jobs) as pool:
        waiting = [
            (seed, version, pool.submit(outcome, history(seed), version, asked.folder))
            for seed, version in plan
        ]
        for seed, version, future in waiting:
            wrong, counts, seconds = future.result()
            total.update(counts)
            print(f"seed {seed} on {version}: {wrong or 'exact'} ({seconds:.1f} s)", flush=True)
            if wrong:
                failed.append(seed)
                _shown(history(seed), version, asked)
    minutes = (time.monotonic() - began) / 60
    print(
        f"{len(plan) - len(failed)} of {len(plan)} histories exact, seeds {seeds.start} to "
        f"{seeds.stop - 1}, QEMU {' '.join(asked.qemu)}, {minutes:.0f} minutes; failed: {failed}"
    )
    print(json.dumps(dict(sorted(total.items()))))
    return bool(failed)


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="histories", description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="how many, from the seed on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--qemu", nargs="+", default=["7.2"], choices=VERSIONS, help="in turn")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--folder", default="/dev/shm", help="where their disks and roots lie")
    parser.add_argument(
        "--shorten", action="store_true", help="leave out what a failure can do without"
    )
    parser.add_argument("--replay", help="a history in JSON that a run has printed, or @FILE")
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args()


def _shown(told: dict[str, Any], version: str, asked: argparse.Namespace) -> None:
    if asked.shorten:
        told = shorter(told, lambda one: bool(outcome(one, version, asked.folder)[0]))
    print(f"  --qemu {version} --replay '{json.dumps(told)}'", flush=True)


def _replayed(asked: argparse.Namespace) -> int:
    text = Path(asked.replay[1:]).read_text() if asked.replay.startswith("@") else asked.replay
    told = json.loads(text)
    wrong, counts, seconds = outcome(told, asked.qemu[0], asked.folder)
    print(f"{wrong or 'exact'} ({seconds:.1f} s) {json.dumps(counts)}")
    if wrong and asked.shorten:
        _shown(told, asked.qemu[0], asked)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
