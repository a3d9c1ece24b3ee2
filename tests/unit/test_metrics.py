"""Metrics are what Prometheus reads, and its conventions of names and units are kept."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qmpsnap.engine.metrics import Run, text, write
from qmpsnap.errors import LocalFailed
from qmpsnap.store.catalogue import Entry
from tests.rig.halves import names


def entry(state: str, taken_at: str | None, **other: object) -> Entry:
    facts: dict[str, object] = {
        "id": "20261122T165057123Z",
        "vm": "web",
        "taken_at": taken_at,
        "level": "full",
        "ram": "live",
        "pause_ms": 12.5,
        "note": "",
        "why": "",
        "local": True,
        "spool": False,
        "host": None,
    }
    return Entry(state=state, **facts | other)  # type: ignore[arg-type]


def samples(content: str) -> dict[tuple[str, ...], float]:
    """Value by name and label values, in the order of the labels' names."""
    found = {}
    for family in text_string_to_metric_families(content):
        assert family.type == "gauge"
        assert family.documentation.endswith(".")
        for one in family.samples:
            labels = tuple(value for _, value in sorted(one.labels.items()))
            key = (one.name, *labels)
            assert key not in found
            found[key] = one.value
    return found


def test_a_good_run() -> None:
    there = [
        entry("paired", "2026-11-22T16:50:57.123Z", protected=True),
        entry("paired", "2026-11-22T17:50:57.500Z"),
        entry("shipping", "2026-11-22T18:50:57.500Z"),
    ]
    written = {"disks": 3 << 30, "vmstate": 1 << 20, "shipped": 1 << 19}
    run = Run("web", "create", 1795367000.25, 2.5, 0, 12.5, None, written)
    assert samples(text(run, there)) == {
        ("qmpsnap_snapshots", "paired", "web"): 2,
        ("qmpsnap_snapshots", "shipping", "web"): 1,
        ("qmpsnap_snapshots", "untrusted", "web"): 0,
        ("qmpsnap_snapshots", "local only", "web"): 0,
        ("qmpsnap_snapshots", "store only", "web"): 0,
        ("qmpsnap_snapshots", "damaged", "web"): 0,
        ("qmpsnap_snapshots_protected", "web"): 1,
        ("qmpsnap_last_success_timestamp_seconds", "web"): 1795369857.5,
        ("qmpsnap_last_run_timestamp_seconds", "create", "web"): 1795367000.25,
        ("qmpsnap_last_run_duration_seconds", "create", "web"): 2.5,
        ("qmpsnap_last_run_exit_code", "create", "web"): 0,
        ("qmpsnap_last_run_pause_seconds", "create", "web"): 0.0125,
        ("qmpsnap_last_run_written_bytes", "disks", "create", "web"): 3 << 30,
        ("qmpsnap_last_run_written_bytes", "vmstate", "create", "web"): 1 << 20,
        ("qmpsnap_last_run_written_bytes", "shipped", "create", "web"): 1 << 19,
    }


def test_what_was_not_measured_is_absent() -> None:
    found = samples(text(Run("web", "refresh", 1.0, 2.0, exit_code=4), []))
    assert found["qmpsnap_last_run_exit_code", "refresh", "web"] == 4
    absent = {"pause_seconds", "frozen_seconds", "written_bytes", "success_timestamp_seconds"}
    assert not [name for name, *_ in found if any(name.endswith(one) for one in absent)]


def test_names_that_need_quoting() -> None:
    found = samples(text(Run('a"b\\c\nd', "create", 1.0), []))
    assert ("qmpsnap_snapshots", "paired", 'a"b\\c\nd') in found


def test_the_file_is_replaced_at_once_and_read_by_others(tmp_path: Path) -> None:
    path = tmp_path / "web.prom"
    for content in ("one\n", "two\n"):
        write(path, content)
        assert path.read_text() == content
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert names(tmp_path) == ["web.prom"]
    path.unlink()
    path.mkdir()
    with pytest.raises(LocalFailed, match=r"web\.prom: the metrics cannot be written: "):
        write(path, "three\n")
    assert names(tmp_path) == ["web.prom"]
    with pytest.raises(LocalFailed, match="absent"):
        write(tmp_path / "absent/web.prom", "")
