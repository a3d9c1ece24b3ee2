"""Kernel, initrd and device tree of a direct boot: taken along, and found again for a restore.

A guest that goes on with its RAM has its kernel there; it needs the file when it is started again.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qmpsnap.engine.half import Glanced, Pair
from qmpsnap.engine.roots import Roots
from qmpsnap.engine.survey import Survey
from qmpsnap.errors import DamagedData, LocalFailed
from qmpsnap.host import process
from qmpsnap.host.priority import in_background
from qmpsnap.hypervisor.machine import direct
from qmpsnap.spelling import spelled
from qmpsnap.store import files, shared
from qmpsnap.store.manifest import Plain, Shared
from qmpsnap.store.secret import Secret

log = logging.getLogger(__name__)
_SLACK = 0.5  # seconds: clocks are read one after the other, and /proc counts in hundredths


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a restore takes *file* from: the host's own, or the copy of the snapshot.

    *host* and *copy* say why that one will not do; empty if it does.
    """

    file: Shared
    host: str
    copy: str

    @property
    def fetched(self) -> bool:
        """Whether it has to be the copy."""
        return bool(self.host)

    @property
    def trouble(self) -> str:
        """Why neither will do; empty if one does."""
        return f"{self.file.path} {self.host}, and {self.copy}" if self.host and self.copy else ""

    @property
    def remark(self) -> str:
        """What should be known, although the restore goes on; empty if there is nothing."""
        if self.copy:
            return f"{self.copy}; the host's {self.file.path} is the same file"
        if self.host:
            return f"{self.file.path} {self.host}: the copy of the snapshot takes its place"
        if not self.file.as_started:
            return f"{self.file.path} was changed after QEMU had read it: a reboot starts another"
        return ""


async def differing(pair: Pair) -> dict[str, str]:
    """Why a file of this host is not the one that the snapshot shares, by its path."""
    return await in_background(_differing, pair.manifest.shared)


def choices(pair: Pair, differing: Mapping[str, str], seen: Glanced) -> list[Choice]:
    """Where each file comes from; *seen* tells what is wrong with the copies."""
    return [
        Choice(one, differing.get(one.path, ""), str(seen.wrong.get(one.entry.name, "")))
        for one in pair.manifest.shared
    ]


async def taken(roots: Roots, facts: Survey, secret: Secret | None = None) -> list[Shared]:
    """What is to be listed in the manifest; a copy of each is on the local root afterwards.

    With a *secret* they are encrypted with it.

    Reads what has changed since the last snapshot: not while the guest is held. What cannot be
    had is told, and is no reason to have no snapshot.
    """
    if facts.attached is None or facts.process is None:
        return []
    wanted = direct.files(facts.attached.line, facts.attached.cwd)
    vm = facts.machine.name
    try:
        started = await asyncio.to_thread(process.started, facts.process.pid)
        found, troubles = await in_background(shared.keep, roots.local, vm, wanted.values(), secret)
    except LocalFailed as failed:
        found, troubles = {}, dict.fromkeys(wanted.values(), str(failed))
        started = 0.0
    for path, why in troubles.items():
        log.warning("%s is not taken along: %s", spelled(path), spelled(why))
    listed = []
    for option, path in wanted.items():
        if (note := found.get(path)) is None:
            continue
        as_started = max(note.mtime_ns, note.ctime_ns) / 1e9 <= started + _SLACK
        if not as_started:
            log.warning(
                "%s was changed after QEMU had read it: taken along as it is now", spelled(path)
            )
        copy = note.entry
        one = {"option": option, "path": spelled(path), "bytes": copy.bytes, "blake3": copy.blake3}
        file = msgspec.convert(one | {"as_started": as_started}, Shared)
        if secret is not None:
            plain = Plain(bytes=note.bytes, blake3=note.blake3)
            file = msgspec.structs.replace(file, plain=plain)
        listed.append(file)
    return listed


def _differing(listed: list[Shared]) -> dict[str, str]:
    found = {}
    for one in listed:
        path = Path(os.path.realpath(one.path))
        try:
            files.expect(path, one.content, side=LocalFailed)
        except DamagedData:
            found[one.path] = "has another content by now"
        except LocalFailed as failed:
            gone = isinstance(failed.__cause__, FileNotFoundError | NotADirectoryError)
            found[one.path] = "is missing" if gone else "cannot be read"
    return found
