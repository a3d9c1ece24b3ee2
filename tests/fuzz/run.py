"""Fuzzing by hand: `scripts/fuzz --target all --count 100000 --seed 1`."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from pathlib import Path

from tests.fuzz.guard import guarded
from tests.fuzz.shrink import smallest
from tests.fuzz.surface import Finding, Surface, judged
from tests.fuzz.surfaces import SURFACES


def tried(
    surface: Surface, seed: int, first: int, last: int
) -> tuple[int, dict[str, tuple[int, Finding, str]]]:
    """Inputs *first* to *last*: how many failed, and of each kind of fault the first, shrunk."""
    failed, found = 0, dict[str, tuple[int, Finding, str]]()
    surface.good()
    with guarded() as scratch:
        for number in range(first, last):
            given = surface.input(seed, number)
            one = judged(surface, given, scratch)
            if one is None:
                continue
            failed += 1
            if one.kind in found:
                continue
            found[one.kind] = number, one, _spelled(_shrunk(surface, given, one, scratch))
    return failed, found


def _spelled(given: object) -> str:
    try:
        return repr(given)
    except RecursionError:
        return "..., nested too deep to be told"


def _shrunk(surface: Surface, given: object, one: Finding, scratch: Path) -> object:
    if one.kind.startswith("takes long"):
        return given

    def fails(other: object) -> bool:
        again = judged(surface, other, scratch)
        return again is not None and again.kind == one.kind

    return smallest(given, fails)


def _job(work: tuple[str, int, int, int]) -> tuple[int, dict[str, tuple[int, Finding, str]]]:
    logging.disable()  # what is wrong is told by whoever asked
    name, seed, first, last = work
    return tried(SURFACES[name], seed, first, last)


def main() -> int:
    words = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    words.add_argument("--target", default="all", help="all, or names apart by commas")
    words.add_argument("--count", type=int, default=10000, help="inputs of each target")
    words.add_argument("--slow-count", type=int, help="of those targets that are slow")
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--jobs", type=int, default=1)
    words.add_argument("--nice", type=int, default=10)
    words.add_argument("--list", action="store_true", help="the names of the targets")
    given = words.parse_args()
    if given.list:
        print("\n".join(SURFACES))
        return 0
    names = list(SURFACES) if given.target == "all" else given.target.split(",")
    if unknown := [name for name in names if name not in SURFACES]:
        words.error(f"no such target: {', '.join(unknown)}")
    os.nice(given.nice)
    whole, bad = 0, 0
    with multiprocessing.get_context("forkserver").Pool(given.jobs, maxtasksperchild=1) as pool:
        for name in names:
            surface = SURFACES[name]
            count = given.slow_count if surface.slow and given.slow_count else given.count
            step = -(-count // given.jobs)
            parts = [(name, given.seed, at, min(count, at + step)) for at in range(0, count, step)]
            began = time.monotonic()
            done = pool.map(_job, parts, chunksize=1)
            took = time.monotonic() - began
            failed = sum(one[0] for one in done)
            print(f"{name}: {count} inputs, {count / took:.0f}/s, {failed} failed", flush=True)
            found = {kind: what for one in done for kind, what in one[1].items()}
            for kind, (number, finding, smaller) in found.items():
                bad += 1
                print(f"  {kind}: {finding.told}")
                print(f"  input {number} of seed {given.seed}, smallest:")
                print(f'  CASES["{name}"] += [{smaller:.1500}]', flush=True)
            whole += count
    print(f"{whole} inputs, {bad} kinds of findings")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
