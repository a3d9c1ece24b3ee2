"""QEMU ends while a copy's overlay goes back into its disk: the disk has every write all the same.

The wire stands at one command of the fold while the guest writes and QEMU is killed.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qmpsnap.engine import folds
from qmpsnap.engine.wishes import Copying, Level, RamChoice
from qmpsnap.errors import Failed, LocalFailed
from qmpsnap.host import journal
from tests.faults import child
from tests.faults.bench import Bench, bench, wishes
from tests.faults.test_copies_kill import _on_disk, _scratch, _write_past
from tests.rig.qemu import binary
from tests.rig.wire import Fault

_DATA = range(64, 128)


async def _begun(it: Bench) -> None:
    it.guest_writes(1, 2, *_DATA)
    await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.FULL))


def _newer(it: Bench) -> bool:
    overlay = it.chains()[0][0]
    found = it.disks[0].with_name(overlay)
    return it.disks[0].stat().st_mtime_ns > found.stat().st_mtime_ns


def _folding(it: Bench) -> None:
    """The guest writes until the first disk is newer than its overlay, as the fold goes on."""
    it.guest_writes(*_DATA)
    while not _newer(it):
        it.guest_writes(10)
        it.witness.until(lambda: _ready(it), within=20)


def _ready(it: Bench) -> bool:
    jobs = it.witness.ask("query-block-jobs")
    return all(job["status"] == "ready" and job["offset"] == job["len"] for job in jobs)


def _strike(it: Bench, at: str, *, delivered: bool, first: Callable[[Bench], None]) -> None:
    def then() -> None:
        first(it)
        it.qemu.kill()
        it.witness.close()

    it.wire.arm(Fault(at, delivered=delivered, then=then))


def _writes(it: Bench) -> None:
    it.guest_writes(10, 64)


async def _created(it: Bench) -> None:
    """A full copy, whose overlays the guest has written to when it is done; QEMU dies in it."""
    slow = wishes(RamChoice.NONE, level=Level.FULL, copying=Copying(limit=4 << 20))
    making = asyncio.create_task(it.engine().create(it.wired, slow))
    await it.copying()
    it.guest_writes(11, 64, 70)
    with pytest.raises(Failed, match=r"connection lost|QEMU"):
        await making


@pytest.mark.parametrize("version", ["7.2", "10.0", "11.1"])
@pytest.mark.parametrize(
    ("at", "delivered", "first"),
    [
        ("block-commit", True, _folding),  # the overlay has all, and the disk is newer
        ("job-complete", False, _folding),  # both have all
        ("blockdev-del", False, _writes),  # the disk has all, and the overlay is old
    ],
)
async def test_qemu_dies_at_a_command_of_the_fold(
    at: str,
    delivered: bool,
    first: Callable[[Bench], None],
    version: str,
    short: Path,
    store: Path,
) -> None:
    async with bench(binary(version), short, store) as it:
        await _begun(it)
        _strike(it, at, delivered=delivered, first=first)
        await _created(it)
        assert it.wire.happened.is_set()
        assert it.owes() == []
        assert _scratch(it) == {}
        assert _on_disk(it) == it.disks_now()


async def test_who_took_the_last_write_cannot_be_told_at_the_pivot(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        await _begun(it)
        _strike(it, "job-dismiss", delivered=False, first=_writes)
        await _created(it)
        kept = _scratch(it)
        assert len(kept) == 2
        before = _on_disk(it)
        with pytest.raises(LocalFailed, match="cannot be told"):
            await it.engine().recover(it.clean, not_restarted=True)
        assert _scratch(it) == kept
        assert _on_disk(it) == before
        assert len(it.owes()) == 1
        # it was the disk: whoever knows that removes the overlay, and the rest goes by itself
        first = next(path for path in kept if "vd0" in path.name)
        first.unlink()
        await it.engine().recover(it.clean)
        assert _scratch(it) == {}
        assert _on_disk(it) == it.disks_now()


async def _both_died(it: Bench) -> None:
    """Engine and QEMU, with the first disk newer than its overlay, which has all."""
    await _begun(it)
    with child.engine(
        qmp=it.wire.path, local=it.local, store=it.store, ram=RamChoice.NONE, level=Level.FULL,
        sockets=it.local.parent,
    ) as process:  # fmt: skip

        def first(it: Bench) -> None:
            _folding(it)
            process.kill()

        _strike(it, "block-commit", delivered=True, first=first)
        assert await child.outcome(process) == {}
    assert len(_scratch(it)) == 2
    assert len(it.owes()) == 1


async def test_where_nobody_saw_qemu_end_somebody_has_to_vouch(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        await _both_died(it)
        kept = _scratch(it)
        for _ in range(2):
            with pytest.raises(LocalFailed, match="was being folded") as left:
                await it.engine().recover(it.clean)
            assert "--not-restarted" in str(left.value.hint)
            assert _scratch(it) == kept
        await it.engine().recover(it.clean, not_restarted=True)
        assert it.owes() == []
        assert _scratch(it) == {}
        assert _on_disk(it) == it.disks_now()


@pytest.mark.parametrize("written", [False, True])
async def test_a_disk_that_was_written_to_after_qemu_was_seen_to_end_is_left(
    written: bool, qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        await _both_died(it)
        (id,) = it.owes()
        await folds.ended(journal.Journal(it.local / "vm/journal").reopen(id))
        if not written:
            await it.engine().recover(it.clean)
            assert _scratch(it) == {}
            assert _on_disk(it) == it.disks_now()
            return
        _write_past(it)
        disks, kept = _on_disk(it), _scratch(it)
        with pytest.raises(LocalFailed, match="was being folded"):
            await it.engine().recover(it.clean)
        assert _scratch(it) == kept
        assert _on_disk(it) == disks


async def test_vouching_does_not_go_over_a_disk_that_was_written_past_its_overlay(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        await _both_died(it)
        second = it.disks[1]  # its fold had not begun
        change = ["qemu-io", "-f", "raw", "-c", "write -q -P 255 0 64k", second]
        await asyncio.to_thread(subprocess.run, change, check=True)
        with pytest.raises(LocalFailed, match="started again without it"):
            await it.engine().recover(it.clean, not_restarted=True)
        assert len(_scratch(it)) == 1
