"""The swtpm that a restored machine gets: which one, with what state, and what hinders it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from qmpsnap.engine.half import Glanced, Pair
from qmpsnap.engine.restoration import Ready
from qmpsnap.engine.tpm import FOLDER, NAME, Key, Tpm, nothing
from qmpsnap.engine.verdict import Row, Verdict
from qmpsnap.errors import HalfMissing, LocalFailed, SnapError
from qmpsnap.host import swtpm
from qmpsnap.host.swtpm import Wanted
from qmpsnap.hypervisor.machine import tpm
from qmpsnap.store.head import readable, version_of


def with_tpm(ready: Ready, seen: Glanced) -> tuple[Ready, list[Row]]:
    """*ready* with the swtpm that its machine needs, and what there is to say of that."""
    found = tpm.emulator(ready.relocated.cmdline, ready.wish.to)
    if found is None:
        return ready, []
    pair, cold = ready.pair, ready.wish.cold
    try:
        facts, unread = _facts(pair, seen), ""
    except SnapError as odd:
        # what is loaded says all but this, and a TPM 1.2 has become rare
        facts, unread = nothing(found[0], str(odd)), str(odd)
    listed = [f"{FOLDER}/{name}" for name in facts.files]
    names = listed if cold else []
    damaged = [str(seen.wrong[name]) for name in listed if name in seen.wrong]
    keys = [key for key in facts.keys if key.file]
    verdict, why = _verdict(facts, cold, unread, seen, damaged, found[1])
    told = f"TPM {facts.tpm}" + (f", state of {facts.moment}" if facts.moment else ", no state")
    row = Row(what=f"TPM {facts.id}", captured=told, here="a swtpm", verdict=verdict, why=why)
    if found[1] is None or verdict == "blocks":
        return ready, [row]
    wanted = Wanted(
        socket=found[1],
        tpm2=facts.tpm == "2",
        backend=facts.backend if names else "dir",
        place=_place(ready, facts, bool(names)),
        keys=[(key.option, key.value) for key in keys],
    )
    return replace(ready, tpm=wanted, tpm_files=tuple(names)), [row]


async def placed(ready: Ready) -> None:
    """The state is where its swtpm will look for it.

    Raises DamagedData, StoreError, LocalFailed.
    """
    if ready.tpm is None:
        return
    folder = ready.wish.to / FOLDER
    try:
        await asyncio.to_thread(folder.mkdir, 0o700)
    except OSError as failed:
        raise LocalFailed(f"{folder}: {failed.strerror}") from failed
    for name in ready.tpm_files:
        if (entry := ready.pair.manifest.entry(name)) is None:
            raise HalfMissing(f"the manifest lists no {name}")
        await ready.pair.fetch(entry, ready.wish.to / name)


def _facts(pair: Pair, seen: Glanced) -> Tpm:
    text, path = seen.text(NAME), f"{pair.vm}/{pair.id}/{NAME}"
    version_of(text, "qmpsnap-tpm", 1, path)
    with readable(text, path):
        return msgspec.json.decode(text, type=Tpm)


def _place(ready: Ready, facts: Tpm, stored: bool) -> Path:
    folder = ready.wish.to / FOLDER
    return folder / facts.files[0] if stored and facts.backend == "file" else folder


def _verdict(
    facts: Tpm,
    cold: bool,
    unread: str,
    seen: Glanced,
    damaged: Sequence[str],
    socket: Path | None,
) -> tuple[Verdict, str]:
    loose = [key for key in facts.keys if not key.file]
    blocking = [
        *([swtpm.missing()] if swtpm.missing() else []),
        *(["its chardev connects to no unix socket"] if socket is None else []),
        *_unreadable(facts.keys),
        *([unread] if cold and unread and NAME in seen.wrong else []),
        *(damaged if cold else []),
        *(
            f"its state is encrypted with a key that nobody can give: {key.value}"
            for key in loose
            if cold or key.option == "migration-key"
        ),
    ]
    if blocking:
        return "blocks", "; ".join(blocking)
    if damaged:
        return "differs", f"the RAM has it all, a boot would not: {'; '.join(damaged)}"
    if cold and not facts.files:
        return "differs", f"a new TPM, which knows nothing of the old one: {facts.trouble}"
    if cold and facts.moment == "around":
        return "differs", "its state was written while the snapshot was taken"
    if unread:
        return "differs", f"taken for a TPM 2: {unread}"
    if loose:
        return "differs", "its state on disk was encrypted, and is not any more"
    return "ok", ""


def _unreadable(keys: Sequence[Key]) -> Iterator[str]:
    for path in (Path(key.file) for key in keys if key.file):
        try:
            path.open("rb").close()
        except OSError as failed:
            yield f"the key of its state, {path}: {failed.strerror}"
