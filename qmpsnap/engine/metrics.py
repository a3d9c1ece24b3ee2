"""Figures of a run for Prometheus: the only place that writes its text format.

For the textfile collector of node_exporter, which reads whole files ending in `.prom`. Names and
units as Prometheus' conventions have them: seconds and bytes, `_timestamp_seconds` for moments.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import get_args

from qmpsnap.errors import LocalFailed
from qmpsnap.store.catalogue import Entry, State

Labels = Mapping[str, str]


@dataclass(slots=True)
class Run:
    """One run of a verb, as far as it has come. Moments are seconds since 1970.

    *exit_code* as the command line's; what was not measured, or did not happen, stays None.
    """

    vm: str
    verb: str
    began: float
    seconds: float = 0.0
    exit_code: int = 0
    pause_ms: float | None = None
    frozen_ms: float | None = None
    bytes: dict[str, int] = field(default_factory=dict)
    """By what was written: `disks`, `vmstate`, `shipped`."""


@dataclass(frozen=True, slots=True)
class _Family:
    name: str
    help: str
    samples: list[tuple[Labels, float]]


def text(run: Run, entries: Iterable[Entry]) -> str:
    """*run*, and the states of all snapshots of its VM, in the text exposition format 0.0.4."""
    return "".join(
        line
        for family in _families(run, list(entries))
        if family.samples
        for line in _lines(family)
    )


def write(path: Path, content: str) -> None:
    """Put *content* in the place of *path*, at once and readable to all. Raises LocalFailed."""
    try:
        # another name than *.prom: the collector may look at any time
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                os.fchmod(handle, 0o644)
                file.write(content)
            Path(name).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as failed:
        raise LocalFailed(f"{path}: the metrics cannot be written: {failed.strerror}") from failed


def _families(run: Run, entries: list[Entry]) -> Iterator[_Family]:
    vm = {"vm": run.vm}
    of_run = {**vm, "verb": run.verb}
    states = Counter(one.state for one in entries)
    yield _Family(
        "qmpsnap_snapshots",
        "Snapshots of the VM by their state.",
        [({**vm, "state": state}, states[state]) for state in get_args(State)],
    )
    yield _Family(
        "qmpsnap_snapshots_protected",
        "Snapshots of the VM that are protected from prune and delete.",
        [(vm, sum(one.protected for one in entries))],
    )
    taken = [one.taken_at for one in entries if one.state == "paired" and one.taken_at]
    yield _Family(
        "qmpsnap_last_success_timestamp_seconds",
        "When the newest snapshot that is whole on both sides was taken.",
        [(vm, datetime.fromisoformat(moment).timestamp()) for moment in sorted(taken)[-1:]],
    )
    yield _Family(
        "qmpsnap_last_run_timestamp_seconds",
        "When the last run of the verb began.",
        [(of_run, run.began)],
    )
    yield _Family(
        "qmpsnap_last_run_duration_seconds",
        "How long the last run of the verb took.",
        [(of_run, run.seconds)],
    )
    yield _Family(
        "qmpsnap_last_run_exit_code",
        "How the last run of the verb ended: 0 is well, see the table of exit codes.",
        [(of_run, run.exit_code)],
    )
    for name, milliseconds, what in (
        ("pause", run.pause_ms, "stood still"),
        ("frozen", run.frozen_ms, "had its file systems frozen"),
    ):
        yield _Family(
            f"qmpsnap_last_run_{name}_seconds",
            f"How long the guest {what} in the last run of the verb.",
            [] if milliseconds is None else [(of_run, milliseconds / 1000)],
        )
    yield _Family(
        "qmpsnap_last_run_written_bytes",
        "Bytes that the last run of the verb wrote, by kind.",
        [({**of_run, "kind": kind}, count) for kind, count in run.bytes.items()],
    )


def _lines(family: _Family) -> Iterator[str]:
    yield f"# HELP {family.name} {family.help}\n"
    yield f"# TYPE {family.name} gauge\n"
    for labels, value in family.samples:
        told = ",".join(f'{name}="{_quoted(word)}"' for name, word in labels.items())
        yield f"{family.name}{{{told}}} {value!r}\n"


def _quoted(word: str) -> str:
    return word.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
