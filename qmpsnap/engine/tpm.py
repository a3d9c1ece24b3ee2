"""The TPM of a machine: `tpm.json` and its state on disk, taken along and brought back.

What it holds at the instant is in the stream of the RAM, permanent state too; the files are for a
boot from the disks (docs/decisions/0015).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from qmpsnap import private, spelling
from qmpsnap.dialect import schema
from qmpsnap.engine.survey import Survey
from qmpsnap.errors import LocalFailed
from qmpsnap.host import tpmstate
from qmpsnap.hypervisor.machine import tpm
from qmpsnap.store import files

log = logging.getLogger(__name__)
NAME = "tpm.json"
FOLDER = "tpm"


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """A key that swtpm was given: the name of its option, and that option's value.

    The key itself is never read: the value names a file, or a descriptor that nobody can give.
    """

    option: str
    value: str

    @property
    def file(self) -> str | None:
        fields = dict(word.partition("=")[::2] for word in self.value.split(","))
        return fields.get("file") or fields.get("pwdfile")


class Tpm(msgspec.Struct, frozen=True, kw_only=True):
    """`tpm.json`: the emulated TPM *id*, whose swtpm listened on *socket* of the captured host.

    *files* lie in `tpm/`; they are of the very *instant*, or were written *around* it, from shortly
    before the guest was held until it ran again. None with *trouble*: why there are none.
    """

    format: Literal["qmpsnap-tpm"] = "qmpsnap-tpm"
    version: int = 1
    id: str
    socket: str | None
    tpm: Literal["1.2", "2"]
    backend: Literal["dir", "file"]
    files: list[str]
    moment: Literal["instant", "around"] | None
    keys: list[Key]
    trouble: str


@dataclass(frozen=True, slots=True)
class Held:
    """The state as it was before the guest was held; *swtpm* is None when it was not found."""

    facts: Tpm
    swtpm: tpmstate.Swtpm | None
    state: tpmstate.State | None


async def looked(facts: Survey) -> Held | None:
    """The TPM of a VM that is about to be held; None if it has none of its own.

    What cannot be had is told, and no reason to have no snapshot: the RAM's stream has it all.
    """
    if facts.attached is None:
        return None
    found = tpm.emulator(facts.attached.line, facts.attached.cwd)
    return None if found is None else await asyncio.to_thread(_looked, *found)


async def settled(held: Held | None) -> Held | None:
    """What *held* became, now that the guest runs again: read once more where it was written."""
    return None if held is None else await asyncio.to_thread(_settled, held)


def write(folder: Path, held: Held) -> list[str]:
    """`tpm.json` and the state, into the spool *folder*; the names. Raises LocalFailed."""
    content = held.state.content if held.state is not None else {}
    private.folders(folder / FOLDER)
    for name, data in content.items():
        files.publish(folder / FOLDER / name, data, side=LocalFailed)
    files.publish(folder / NAME, spelling.encode(held.facts), side=LocalFailed)
    return [NAME, *(f"{FOLDER}/{name}" for name in content)]


def schemas() -> dict[str, dict[str, object]]:
    """The JSON Schema of `tpm.json`, by the word that its file is named for."""
    return {"qmpsnap-tpm": schema(Tpm)}


def nothing(id: str, trouble: str, socket: Path | None = None) -> Tpm:
    """A TPM of which no more is known than that it is there."""
    return Tpm(
        id=id, socket=str(socket) if socket else None, tpm="2", backend="dir", files=[],
        moment=None, keys=[], trouble=trouble,
    )  # fmt: skip


def _looked(id: str, socket: Path | None) -> Held:
    if socket is None:
        return _without(nothing(id, "its chardev connects to no unix socket"), None)
    facts = nothing(id, "", socket)
    try:
        known = tpmstate.behind(socket)
    except LocalFailed as failed:
        return _without(msgspec.structs.replace(facts, trouble=str(failed)), None)
    facts = msgspec.structs.replace(
        facts,
        tpm="2" if known.tpm2 else "1.2",
        backend=known.backend,
        keys=[Key(option=option, value=value) for option, value in known.keys],
    )
    try:
        state = tpmstate.read(known)
    except LocalFailed as failed:
        return _without(msgspec.structs.replace(facts, trouble=str(failed)), known)
    return Held(_with(facts, state, "instant"), known, state)


def _settled(held: Held) -> Held:
    if held.swtpm is None or held.state is None:
        return held
    try:
        if tpmstate.stamps(held.swtpm) == held.state.stamps:
            return held
        state = tpmstate.read(held.swtpm)
    except (OSError, LocalFailed) as failed:
        log.warning("the state of the TPM %s was read before only: %s", held.facts.id, failed)
        return Held(_with(held.facts, held.state, "around"), held.swtpm, held.state)
    if state.content == held.state.content:
        return held  # QEMU asks for the state with the RAM, and swtpm writes it down once more
    # what the guest has written to its disks by the instant, it may have told the TPM before
    return Held(_with(held.facts, state, "around"), held.swtpm, state)


def _with(facts: Tpm, state: tpmstate.State, moment: Literal["instant", "around"]) -> Tpm:
    if not state.content:
        return msgspec.structs.replace(facts, trouble="it has no state on disk")
    return msgspec.structs.replace(facts, files=sorted(state.content), moment=moment)


def _without(facts: Tpm, known: tpmstate.Swtpm | None) -> Held:
    log.warning(
        "the state of the TPM %s on disk is not taken along: %s; it comes back with the RAM only",
        facts.id,
        facts.trouble,
    )
    return Held(facts, known, None)
