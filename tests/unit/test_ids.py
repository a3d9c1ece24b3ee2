"""IDs sort as time does; labels and node names fit QEMU."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpsnap.ids import SnapshotId, disk_labels, is_snapshot_id, is_vm_name

moments = st.datetimes(
    datetime(1970, 1, 2),  # noqa: DTZ001 (hypothesis adds the zone)
    datetime(9999, 12, 30),  # noqa: DTZ001
    timezones=st.sampled_from([UTC, timezone(timedelta(hours=-9, minutes=-30))]),
)
_NODE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,30}")


@given(moments, moments)
def test_text_order_is_time_order(one: datetime, other: datetime) -> None:
    first, second = sorted([one, other])
    assert SnapshotId.of(first) <= SnapshotId.of(second)
    assert SnapshotId.of(first).text <= SnapshotId.of(second).text


@given(moments)
def test_an_id_spells_its_moment_to_the_millisecond(moment: datetime) -> None:
    id = SnapshotId.of(moment)
    assert len(id.text) == 19
    assert timedelta(0) <= moment - id.taken() < timedelta(milliseconds=1)
    assert SnapshotId.of(id.taken()) == id
    assert is_snapshot_id(id.text)


@given(moments, moments)
def test_a_clock_that_jumps_back_gives_no_id_twice(last: datetime, now: datetime) -> None:
    before = SnapshotId.of(last)
    after = SnapshotId.after(before, now)
    assert after > before
    assert after == SnapshotId.of(now) or after.taken() - before.taken() == timedelta(
        milliseconds=1
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "20261122T165057123",
        "20261322T165057123Z",
        "20261122T250057123Z",
        "2026112aT165057123Z",
        "20261122T165057123Z\n",
        " 20261122T165057123Z",
        "\u06620261122T165057123Z",  # a digit, but none of ours
    ],
)
def test_what_is_no_id_is_refused(text: str) -> None:
    assert not is_snapshot_id(text)
    with pytest.raises(ValueError, match=r"id|time data|day|unconverted"):
        SnapshotId(text)


@given(st.text(min_size=1, max_size=60), moments)
def test_a_label_makes_a_node_name_that_qemu_takes(name: str, moment: datetime) -> None:
    (label,) = disk_labels([name])
    assert re.fullmatch(r"[a-z][a-z0-9_]{0,10}", label)
    assert _NODE.fullmatch(SnapshotId.of(moment).overlay_of(label))


@given(st.lists(st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True), unique=True, max_size=8))
def test_names_that_fit_are_their_own_labels(names: list[str]) -> None:
    clean = [name for name in names if not name.endswith("_") and "__" not in name]
    assert disk_labels(clean) == clean


@given(st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=30))
def test_a_label_depends_on_its_name_alone(name: str, neighbour: str) -> None:
    assert disk_labels([name])[0] == disk_labels([neighbour, name])[1]


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "a" * 65, "20261122T165057123Z", "ä"])
def test_what_could_not_be_a_folder_names_no_vm(name: str) -> None:
    assert not is_vm_name(name)
