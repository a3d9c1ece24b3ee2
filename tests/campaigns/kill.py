"""SIGKILL of an engine at every place where it waits: `python -m tests.campaigns.kill`.

Counts the positions of each kind of snapshot first, then strikes at each of them, in an order
that the seed gives, so that a campaign that is ended early is a sample of the whole.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from qmpsnap.engine.wishes import Level, RamChoice
from tests.campaigns.awaits import Strike
from tests.campaigns.killing import Case, Verdict, strikes, world

_AT_ONCE = 12  # strikes over one VM
_TRIES = 3  # for a position that a run did not come to


def cases(
    versions: Sequence[str], verbs: Sequence[str], ram: Sequence[str], levels: Sequence[str]
) -> list[Case]:
    """Every kind of snapshot that is asked for."""
    found = [
        Case(version, "create", RamChoice(mode), Level(level))
        for version, mode, level in itertools.product(versions, ram, levels)
        if "create" in verbs
    ]
    if "refresh" in verbs:
        found += [Case(version, "refresh", RamChoice.NONE, Level.AUTO) for version in versions]
    return found


def counted(case: Case) -> tuple[list[tuple[str, int]], int]:
    """The positions of *case*, and how often a task waited in all."""

    async def count(folder: Path, store: Path) -> tuple[list[tuple[str, int]], int]:
        async with world(case, folder, store) as one:
            return one.counted()

    with _Folders() as (folder, store):
        return asyncio.run(count(folder, store))


def struck(case: Case, some: Sequence[Strike]) -> list[Verdict]:
    """What comes of *some* strikes over one VM, or over another one after a broken promise."""
    found: list[Verdict] = []

    async def strike(folder: Path, store: Path) -> None:
        async with world(case, folder, store) as one:
            while len(found) < len(some):
                at = some[len(found)]
                how = one.hung if at.number == signal.SIGSTOP else one.struck
                # which way a migration takes is also a matter of chance
                for _ in range(_TRIES):
                    verdict = await how(at)
                    if verdict.struck or verdict.wrong:
                        break
                found.append(verdict)
                if verdict.wrong:
                    return

    while len(found) < len(some):
        with _Folders() as (folder, store):
            before = len(found)
            try:
                asyncio.run(strike(folder, store))
            except Exception as odd:  # noqa: BLE001 - the campaign goes on with the next
                if len(found) == before:
                    found.append(Verdict(case, some[before], [f"the campaign's own: {odd!r}"]))
    return found


def _owing(positions: Sequence[tuple[str, int]]) -> str:
    """The first position from which on something is owed, or about to be."""
    return next(at for at, _ in positions if "engine/debt.py" in at)


_Key = tuple[str, str, str, str, str, int]


def _key(case: Case, strike: Strike) -> _Key:
    """What a strike has in common with one at another level."""
    return (case.version, case.verb, case.ram, strike.position, strike.moment, strike.visit)


def _read(path: Path) -> set[_Key]:
    """What an earlier campaign has struck, by its `--out`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        (one["case"]["version"], one["case"]["verb"], one["case"]["ram"],
         one["strike"]["position"], one["strike"]["moment"], one["strike"]["visit"])
        for one in rows if one["struck"]
    }  # fmt: skip


class _Folders:
    """A folder with a short name on disk, and one in memory for a store."""

    def __enter__(self) -> tuple[Path, Path]:
        self._both = [
            Path(tempfile.mkdtemp(prefix="qk", dir=at)) for at in ("/var/tmp", "/dev/shm")
        ]
        return self._both[0], self._both[1]

    def __exit__(self, *failure: object) -> None:
        for path in self._both:
            shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    asked = _asked()
    os.nice(asked.nice)
    began = time.monotonic()
    struck_already = _read(Path(asked.struck)) if asked.struck else set()
    chosen = cases(asked.qemu, asked.verb, asked.ram, asked.level)
    chance = random.Random(asked.seed)
    # it forks no process that has threads of its own
    method = multiprocessing.get_context("forkserver")
    with concurrent.futures.ProcessPoolExecutor(asked.jobs, mp_context=method) as pool:
        work = []
        for case, (positions, all_) in zip(chosen, pool.map(counted, chosen), strict=True):
            print(f"{case}: {len(positions)} positions, {all_} suspensions", flush=True)
            number = signal.SIGSTOP if asked.hang else signal.SIGKILL
            owing = [at for at, _ in positions].index(_owing(positions)) if asked.owing else 0
            every = [replace(one, number=number) for one in strikes(positions[owing:])]
            every = [one for one in every if asked.at in one.position]
            if asked.moment:
                every = [one for one in every if one.moment == asked.moment and one.visit == 1]
            every = [one for one in every if _key(case, one) not in struck_already]
            chance.shuffle(every)
            every = every[: asked.sample]
            starts = range(0, len(every), _AT_ONCE)
            work += [(case, every[at : at + _AT_ONCE]) for at in starts]
        chance.shuffle(work)
        tally = _Tally(Path(asked.out) if asked.out else None)
        waiting = collections.deque(work)
        running: set[concurrent.futures.Future[list[Verdict]]] = set()
        while waiting or running:
            over = asked.minutes and time.monotonic() - began > asked.minutes * 60
            while waiting and not over and len(running) < asked.jobs:
                running.add(pool.submit(struck, *waiting.popleft()))
            if not running:
                break
            done, running = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for one in done:
                tally.take(one.result())
    left = sum(len(some) for _, some in waiting)
    print(f"seed {asked.seed}, {(time.monotonic() - began) / 60:.0f} minutes, {left} not struck")
    return tally.told()


class _Tally:
    """What came of all strikes."""

    def __init__(self, out: Path | None) -> None:
        self._out = out
        self._by_case: collections.Counter[tuple[Case, str]] = collections.Counter()
        self._longest: dict[str, Verdict] = {}
        self._wrong = 0

    def take(self, verdicts: Sequence[Verdict]) -> None:
        for one in verdicts:
            counts = self._by_case
            counts[one.case, "strikes"] += 1
            counts[one.case, "struck"] += one.struck
            counts[one.case, "held or frozen then"] += one.held_s > 0
            counts[one.case, "with a snapshot"] += one.listed
            counts[one.case, "wrong"] += bool(one.wrong)
            longest = self._longest.get(one.case.verb)
            if longest is None or one.held_s > longest.held_s:
                self._longest[one.case.verb] = one
            if one.wrong:
                self._wrong += 1
                print(f"{one.case}: {one.strike}: {'; '.join(one.wrong)}", flush=True)
            if self._out is not None:
                with self._out.open("a") as file:
                    file.write(json.dumps(asdict(one)) + "\n")

    def told(self) -> int:
        total: collections.Counter[str] = collections.Counter()
        for case in sorted({case for case, _ in self._by_case}):
            mine = {kind: n for (of, kind), n in self._by_case.items() if of == case}
            total.update(mine)
            print(f"{case}: " + ", ".join(f"{n} {kind}" for kind, n in mine.items()))
        print("all: " + ", ".join(f"{n} {kind}" for kind, n in total.items()))
        for verb, one in self._longest.items():
            print(f"{verb}: longest held {one.held_s:.3f} s, {one.states}, {one.strike}")
        return int(self._wrong > 0)


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.kill", description=__doc__)
    parser.add_argument("--qemu", nargs="+", default=["7.2", "10.0"])
    parser.add_argument("--verb", nargs="+", default=["create", "refresh"])
    parser.add_argument("--ram", nargs="+", default=[mode.value for mode in RamChoice])
    parser.add_argument("--level", nargs="+", default=["overlay", "full"])
    parser.add_argument("--moment", choices=["suspended", "resumed"], help="the first visit there")
    parser.add_argument("--at", default="", help="only positions that name this: engine/capture.py")
    parser.add_argument(
        "--owing", action="store_true", help="from the journal's entry on: before, all do the same"
    )
    parser.add_argument("--hang", action="store_true", help="stand still instead of dying")
    parser.add_argument("--sample", type=int, help="strikes of each kind, of all there are")
    parser.add_argument(
        "--struck", help="an --out: positions that it has are left out, at whatever level"
    )
    parser.add_argument("--minutes", type=float, help="begin nothing after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--out", help="a line of JSON for each strike is added to this file")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
