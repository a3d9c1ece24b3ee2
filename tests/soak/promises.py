"""What must hold of a guest and its snapshots after every step of a soak, whatever happened."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from tests.rig.console import Console
from tests.rig.graph import ask, status, untouched
from tests.soak.faults import Process
from tests.soak.plot import VM, Plot, records

_FREE = 17.0 + 2.0  # seconds until a guest runs again, whatever died


class Broken(AssertionError):
    """A promise that was not kept."""


class Promises:
    """The promises of one plot; it knows the snapshots that have been there."""

    def __init__(self, plot: Plot) -> None:
        self._plot = plot
        self._sealed: dict[str, dict[str, str]] = {}
        self._nonces: dict[str, str] = {}
        """The guest's boot that a snapshot's RAM is of."""
        self.held = 0.0
        """The longest time in seconds that a guest was found not to run after a step."""

    async def the_guest_runs(self, after: str = "") -> None:
        """Within the watchdog's deadline, by a monitor that the engine knows nothing of."""
        began = time.monotonic()
        while (state := await status(self._plot.guest.qemu.witness)) != "running":
            if time.monotonic() - began > _FREE:
                raise Broken(f"the guest is {state} for more than {_FREE:g} s; {after}")
            await asyncio.sleep(0.05)
        self.held = max(self.held, time.monotonic() - began)

    async def the_guest_is_sound(self, within: float = _FREE) -> str:
        """It writes (so it is thawed), and finds what it wrote; its boot's nonce is returned."""
        try:
            async with self._plot.console() as console:
                await console.run("echo x >/data/0/s && echo x >/data/1/s && sync", within=within)
                found = await console.witness(within=30)
        except TimeoutError:
            raise Broken("the guest does not write: is it frozen?") from None
        if not found.ok or console.alarms:
            raise Broken(f"the guest misses what it wrote: {found} {console.alarms}")
        return found.nonce

    async def nothing_is_owed(self) -> None:
        """After `recover`: neither in the journal nor in QEMU, and no half-made file."""
        plot = self._plot
        for again in (False, True):
            ran = await plot.run("recover", VM, "--json")
            if ran.code != 0:
                raise Broken(ran.told)
            if again and ran.out:
                raise Broken(f"a second recover did something: {ran.out}")
            if not ran.out:
                break
        ran = await plot.run("ship", VM)
        if ran.code != 0:
            raise Broken(ran.told)
        await self._qemu_is_clean()
        odd = [
            path
            for path in plot.local.rglob("*")
            if ".partial" in path.name and path.name not in _WRITTEN_AGAIN
        ]
        if odd:
            raise Broken(f"left on the local root: {odd}")

    async def _qemu_is_clean(self) -> None:
        witness = self._plot.guest.qemu.witness
        try:
            await untouched(witness)
        except AssertionError as left:
            raise Broken(f"left in QEMU: {left}") from left
        on = [
            one["capability"]
            for one in await ask(witness, "query-migrate-capabilities")
            if one["state"]
        ]
        if on or (fdsets := await ask(witness, "query-fdsets")):
            raise Broken(f"left in QEMU: {on or fdsets}")

    async def snapshots(self) -> list[str]:
        """All that are listed are whole; the store half of each is what it was when first seen."""
        ran = await self._plot.run("list", VM, "--json")
        if ran.code != 0:
            raise Broken(ran.told)
        listed: list[dict[str, Any]] = records(ran)
        odd = [(one["id"], one["state"], one.get("why")) for one in listed]
        if any(state != "paired" for _, state, _ in odd):
            raise Broken(f"listed: {odd}")
        ids = [str(one["id"]) for one in listed]
        for id in ids:
            now = _digests(self._plot.content / VM / id)
            if now != self._sealed.setdefault(id, now):
                raise Broken(f"the store half of {id} is not what it was")
        return ids

    def came(self, id: str, nonce: str) -> None:
        """A snapshot that was taken while the guest's boot was *nonce*."""
        manifest = json.loads((self._plot.content / VM / id / "manifest.json").read_bytes())
        if manifest["ram"]["mode"] != "none":
            self._nonces[id] = nonce

    async def verifies(self, id: str) -> None:
        ran = await self._plot.run("verify", VM, id)
        if ran.code != 0:
            raise Broken(ran.told)

    async def damage_is_found(self, id: str, path: Path, at: int) -> None:
        """A byte that somebody changed: `verify` says so, and it is put back."""
        with path.open("r+b") as file:
            old = os.pread(file.fileno(), 1, at)
            before = os.fstat(file.fileno())
            os.pwrite(file.fileno(), bytes([old[0] ^ 0x40]), at)
            try:
                ran = await self._plot.run("verify", VM, id)
            finally:
                os.pwrite(file.fileno(), old, at)
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        if ran.code != 7:
            raise Broken(f"byte {at} of {path.name} was changed, and {ran.told}")

    async def restores(self, id: str) -> None:
        """It comes back, RAM and disks of one instant; without RAM it boots."""
        plot, to = self._plot, self._plot.home / "back"
        nonce = self._nonces.get(id)
        cold = [] if nonce else ["--cold"]
        process = await plot.start("restore", VM, id, "--to", to, *cold)
        try:
            async with contextlib.AsyncExitStack() as stack:
                console = await _answering(stack, to / "console.sock", process)
                # what is typed before it runs is lost: the state that comes has another console
                await console.until("^W ", within=120)
                found = await console.witness(within=60)
                if not found.ok or (nonce and found.nonce != nonce):
                    said = f"its console: {console.past}"
                    raise Broken(f"{id} was restored as {found}, and was of {nonce}; {said}")
        except (TimeoutError, ConnectionError) as failed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(20):  # it says why its machine has ended
                    await process.wait()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            ran = await plot.ended(process, ["restore", VM, id, *cold])
            raise Broken(f"{id} does not come back: {failed!r}; {ran.told}: {ran.err}") from failed
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            await plot.ended(process, [])
            shutil.rmtree(to, ignore_errors=True)


# of files of which each engine writes the next one: that takes the place of what was left
_WRITTEN_AGAIN = {"last.partial", "identity.json.partial", "usage.json.partial"}


async def _answering(stack: contextlib.AsyncExitStack, path: Path, process: Process) -> Console:
    """The console of what *process* starts; its socket is there before it is listened to."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await stack.enter_async_context(Console.open(path))
            except (FileNotFoundError, ConnectionRefusedError):
                if process.returncode is not None:
                    raise ConnectionError("restore has ended") from None
                await asyncio.sleep(0.02)


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
