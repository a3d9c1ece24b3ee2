"""Guests under a random schedule of snapshots and faults, for hours: what `scripts/soak` starts."""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.rig.qemu import VERSIONS, binaries
from tests.soak import faults
from tests.soak.faults import struck
from tests.soak.plot import VM, Plot, Ran, plot
from tests.soak.promises import Broken, Promises

_VERBS = {"create": 58, "refresh": 10, "delete": 8, "prune": 8, "verify": 4, "restore": 12}
_STRIKABLE = {"create", "refresh", "delete", "prune"}
_KEPT = 6


@dataclass
class Tally:
    """What happened, of all guests of a soak."""

    verbs: collections.Counter[str] = field(default_factory=collections.Counter)
    tried: collections.Counter[str] = field(default_factory=collections.Counter)
    felt: collections.Counter[str] = field(default_factory=collections.Counter)
    codes: collections.Counter[str] = field(default_factory=collections.Counter)
    restored: int = 0
    left: int = 0
    """How often `recover` left it to a person which of two files has a guest's last writes."""
    broken: list[str] = field(default_factory=list)
    silence: dict[str, float] = field(default_factory=dict)
    """The longest silence of a guest, in seconds, by the fault; `none` without one."""

    def heard(self, fault: str, seconds: float) -> None:
        self.silence[fault] = max(self.silence.get(fault, 0.0), seconds)


class Soak:
    """One guest's schedule."""

    def __init__(self, plot: Plot, dice: random.Random, tally: Tally, *, verbose: bool) -> None:
        self._plot, self._dice, self._tally, self._verbose = plot, dice, tally, verbose
        self._promises = Promises(plot)
        self._lasts = collections.defaultdict(lambda: 2.5)
        self._ids: list[str] = []
        # with each change of what its disks are copied to, a series begins anew
        self._encrypt = dice.choice([["none", "store"], ["all"]])

    async def until(self, end: float, steps: int | None = None) -> None:
        """Step after step until the moment *end* (monotonic), then restore all there is."""
        nonce = await self._promises.the_guest_is_sound()
        done = 0
        while time.monotonic() < end and (steps is None or done < steps):
            nonce = await self._step(nonce)
            done += 1
        for id in self._ids:
            await self._promises.verifies(id)
            await self._promises.restores(id)
            self._tally.restored += 1

    async def _step(self, nonce: str) -> str:
        dice = self._dice
        verb = dice.choices(list(_VERBS), list(_VERBS.values()))[0]
        if verb != "create" and not self._ids:
            verb = "create"
        if len(self._ids) >= _KEPT and verb == "create":
            verb = dice.choice(["delete", "prune"])
        self._tally.verbs[verb] += 1
        match verb:
            case "verify":
                await self._looked_at(dice.choice(self._ids))
            case "restore":
                await self._promises.restores(dice.choice(self._ids))
                self._tally.restored += 1
            case _:
                nonce = await self._changed(self._words(verb), nonce)
        return nonce

    def _words(self, verb: str) -> list[str]:
        dice = self._dice
        match verb:
            case "create":
                level = dice.choice(["auto", "auto", "inc", "full", "overlay"])
                if not self._ids and level == "inc":
                    level = "auto"
                ram = dice.choice(["auto", "live", "background", "paused", "none", "none"])
                how = dice.choice(["auto", "agent", "none"])
                encrypt = dice.choice(self._encrypt)
                words = ["create", VM, "--level", level, "--ram", ram, "--quiesce", how]
                return [*words, "--encrypt", encrypt, "--max-pause", "5s"]
            case "refresh":
                return ["refresh", VM, dice.choice(self._ids), "--max-pause", "5s"]
            case "delete":
                return ["delete", VM, dice.choice(self._ids)]
        return ["prune", VM, "--keep-last", str(dice.randint(1, 4))]

    async def _looked_at(self, id: str) -> None:
        """A snapshot is verified, and then once more with a byte of it changed."""
        await self._promises.verifies(id)
        folders = [self._plot.content / VM / id, self._plot.local / VM / id]
        files = [
            path
            for folder in folders
            for path in sorted(folder.iterdir())
            if path.is_file() and path.stat().st_size and path.suffix != ".json"
        ]
        if files:
            path = self._dice.choice(files)
            at = self._dice.randrange(path.stat().st_size)
            await self._promises.damage_is_found(id, path, at)
            self._tally.tried["a byte changed"] += 1
            self._tally.felt["a byte changed"] += 1

    async def _changed(self, words: list[str], nonce: str) -> str:
        """A verb that changes something, as a rule with a fault in it, and all that must hold."""
        plot, dice, tally = self._plot, self._dice, self._tally
        name = dice.choice(faults.names()) if dice.random() < 0.85 else "none"
        ids, of = set(self._ids), nonce
        with plot.hearing() as heart:
            began = heart.mark()
            if name == "none":
                ran = await plot.run(*words)
                allowed, gone, tops = frozenset({0}), False, {}
            else:
                ran, allowed, gone, tops = await self._struck(name, words)
            if not gone:
                await self._promises.the_guest_runs(f"{name}: {ran.told}")
                tally.heard(name, heart.silence(began, heart.mark()))
        tally.codes[str(ran.code)] += 1
        if self._verbose:
            print(f"{plot.home.name} {name}: {ran.told}", file=sys.stderr, flush=True)
        if "Traceback" in ran.err + ran.out:
            raise Broken(f"{name}: a traceback: {ran.err}")
        if ran.code not in allowed and not _meant(words, ran):
            raise Broken(f"{name}: {ran.told}")
        if gone:
            nonce = await self._power_lost(tops)
        await self._promises.nothing_is_owed()
        await self._promises.the_guest_runs()
        if await self._promises.the_guest_is_sound() != nonce:
            raise Broken(f"{name}: the guest has booted anew: {ran.told}")
        self._ids = await self._promises.snapshots()
        for id in set(self._ids) - ids:
            self._promises.came(id, of)  # also of a QEMU that was killed afterwards
        if words[0] in {"create", "refresh"} and not ids <= set(self._ids):
            raise Broken(f"{name}: `{' '.join(words)}`: {ids - set(self._ids)} went")
        return nonce

    async def _struck(
        self, name: str, words: list[str]
    ) -> tuple[Ran, frozenset[int], bool, dict[str, list[Path]]]:
        plot, tally = self._plot, self._tally
        async with struck(name, plot, self._dice, self._lasts[words[0]]) as (blow, strike):
            process = await plot.start(*words, before=blow.before)
            began = time.monotonic()
            strike(process)
            try:
                ran = await plot.ended(process, words)
            except TimeoutError as hung:
                raise Broken(f"{name}: {hung}") from hung
            if ran.code == 0:
                lasted = time.monotonic() - began
                self._lasts[words[0]] += (lasted - self._lasts[words[0]]) / 8
            if blow.until is not None:
                await blow.until()
            tally.tried[name] += 1
            tally.felt[name] += bool(blow.felt(ran))
        return ran, blow.codes | {0}, blow.quit, blow.tops

    async def _power_lost(self, tops: dict[str, list[Path]]) -> str:
        """QEMU was killed: what is owed is settled without it, then it starts where it was."""
        plot = self._plot
        await plot.power_off()
        ran = await plot.run("recover", VM)
        if ran.code == 4 and "cannot be told" in ran.err:
            self._tally.left += 1
            await asyncio.to_thread(_kept_by_hand, tops)
            ran = await plot.run("recover", VM)
        if ran.code not in {0, 3}:  # 3: nothing was owed any more, and there is no VM
            raise Broken(f"QEMU killed: {ran.told}")
        for name, files in tops.items():
            plot.tops[name] = next(path for path in files if path.exists())
        await plot.boot()
        return await self._promises.the_guest_is_sound()


def _kept_by_hand(tops: dict[str, list[Path]]) -> None:
    """As docs/recovery.md has it, by somebody who knows which file QEMU had on top at its end."""
    for top in {files[0] for files in tops.values()}:
        for overlay in top.parent.glob(".qmpsnap-*"):
            beneath = [files for files in tops.values() if files[0] == overlay]
            if beneath:
                commit = ["qemu-img", "commit", "-q", "-d", "-f", "qcow2", overlay]
                subprocess.run(commit, check=True)
            overlay.unlink()


def _meant(words: list[str], ran: Ran) -> bool:
    """What is refused for a reason that has to do with no fault."""
    soft = ("no inc is possible", "no increment", "stand on it", "stands on it", "protected")
    return ran.code == 3 and any(word in ran.err for word in soft)


async def soaked(asked: argparse.Namespace) -> Tally:
    """All guests side by side."""
    tally = Tally()
    home = Path(tempfile.mkdtemp(prefix="soak", dir=asked.folder))
    end = time.monotonic() + asked.minutes * 60

    async def one(number: int) -> None:
        version = asked.qemu[number % len(asked.qemu)]
        dice = random.Random(f"{asked.seed} {number}")
        try:
            async with plot(binaries()[version], home / f"{number}-{version}") as ground:
                await Soak(ground, dice, tally, verbose=asked.verbose).until(end, asked.steps)
        except (Broken, TimeoutError, OSError) as broken:
            tally.broken.append(f"guest {number} on {version}: {broken!r}")
            print(tally.broken[-1], file=sys.stderr, flush=True)
            traceback.print_exception(broken)

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(asked.guests):
                group.create_task(one(number))
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(home)
    return tally


def summary(tally: Tally, asked: argparse.Namespace, minutes: float) -> str:
    """One line."""
    calm = tally.silence.get("none", 0.0)
    worst = max(tally.silence, key=lambda name: tally.silence[name], default="none")
    return (
        f"soak: {minutes:.0f} min, {asked.guests} guests on QEMU {' '.join(asked.qemu)}, seed "
        f"{asked.seed}: {sum(tally.verbs.values())} steps, {sum(tally.tried.values())} faults, "
        f"{sum(tally.felt.values())} of them felt, {tally.restored} restores; longest silence of "
        f"a guest {tally.silence.get(worst, 0.0):.2f} s ({worst}), without faults {calm:.2f} s; "
        f"left to a person: {tally.left}; "
        f"broken promises: {len(tally.broken)}"
    )


def record(tally: Tally) -> dict[str, Any]:
    return {
        "verbs": dict(tally.verbs), "tried": dict(tally.tried), "felt": dict(tally.felt),
        "codes": dict(tally.codes), "silence_s": tally.silence, "broken": tally.broken,
    }  # fmt: skip


def options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("minutes", type=float, nargs="?", default=10.0)
    parser.add_argument("--guests", type=int, default=3)
    parser.add_argument("--qemu", nargs="+", default=list(VERSIONS), choices=VERSIONS)
    parser.add_argument("--seed", type=int, default=None, help="default: the time")
    parser.add_argument("--steps", type=int, help="of each guest, at most")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="for all files")
    parser.add_argument("--json", action="store_true", help="the counts, on stdout before the line")
    parser.add_argument("--verbose", action="store_true", help="each step, on stderr")
    asked = parser.parse_args(words)
    if asked.seed is None:
        asked.seed = int(time.time())
    return asked


def main() -> int:
    asked = options()
    began = time.monotonic()
    tally = asyncio.run(soaked(asked))
    if asked.json:
        print(json.dumps(record(tally)))
    print(summary(tally, asked, (time.monotonic() - began) / 60))
    return bool(tally.broken)


if __name__ == "__main__":
    sys.exit(main())
