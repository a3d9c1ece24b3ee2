"""An engine or a QEMU ends during a copy: no write of the guest is lost, and no increment."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.engine.wishes import Copying, Level, RamChoice
from qmpsnap.errors import Failed, LocalFailed
from tests.cli.conftest import Program, ended
from tests.faults import child
from tests.faults.bench import Bench, bench, options, wishes
from tests.rig.qemu import binary, running
from tests.rig.wire import Fault

_DATA = range(64, 128)
_SLOW = 1 << 20  # bytes a second: the copy of _DATA takes four seconds a disk
_PHASES = [
    "after planned",
    "after holding",
    "before captured",
    "after captured",
    "before copied",
    "after copied",
    "after sealed",
    "before closed",
    "after closed",
]
_COMMANDS = [  # and whether QEMU has carried it out when the engine dies
    ("transaction", False),
    ("transaction", True),
    ("nbd-server-start", True),
    ("block-export-add", True),
    ("block-commit", False),
    ("block-commit", True),
    ("job-complete", False),
    ("job-complete", True),
    ("job-dismiss", True),
    ("blockdev-del", False),
    ("blockdev-del", True),
    ("block-dirty-bitmap-remove", False),
]


def _scratch(it: Bench) -> dict[Path, bytes]:
    """The overlays beside the disks."""
    return {path: path.read_bytes() for path in sorted(it.local.parent.glob(".qmpsnap-*"))}


def _engine(it: Bench, level: Level, **other: Any) -> Any:
    return child.engine(
        qmp=it.wire.path, local=it.local, store=it.store, ram=RamChoice.NONE, level=level,
        sockets=it.local.parent, **other,
    )  # fmt: skip


async def _full(it: Bench) -> None:
    it.guest_writes(1, 2, *_DATA)
    await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.FULL))


async def _an_inc_lacks_nothing(it: Bench) -> None:
    """What is owed is settled, nothing is left; then an increment holds what the guest wrote."""
    it.witness.until_running(within=5)
    await it.engine().recover(it.clean)
    await it.all_is_well()
    assert it.chains() == [["d0.qcow2"], ["d1.raw"]]
    assert [*it.local.parent.glob("qmpsnap-*")] == []  # folders of sockets
    made = await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.INC))
    assert it.levels(made.id) == {"inc"}
    assert it.holds(made.id) == it.disks_now()
    await it.all_is_well()


async def test_a_kill_at_a_note_of_the_journal(qemu72: Path, short: Path, store: Path) -> None:
    async with bench(qemu72, short, store) as it:
        await _full(it)
        for cluster, die in enumerate(_PHASES, start=10):
            before = set(it.points())
            with _engine(it, Level.INC, die=die) as process:
                assert await child.outcome(process) == {}, die
            assert process.returncode == -signal.SIGKILL
            it.guest_writes(cluster)
            whole = die in {"before sealed", "after sealed", "before closed", "after closed"}
            assert len(set(it.points()) - before) == whole, die
            if whole:  # its store half is still in the spool
                await it.engine().ship("vm")
            await _an_inc_lacks_nothing(it)
        with _engine(it, Level.INC) as process:  # the control
            assert (await child.outcome(process))["id"] in await it.all_is_well()


async def test_a_kill_at_a_command(qemu72: Path, short: Path, store: Path) -> None:
    async with bench(qemu72, short, store) as it:
        await _full(it)
        for cluster, (command, delivered) in enumerate(_COMMANDS, start=10):
            with _engine(it, Level.INC) as process:
                it.wire.arm(Fault(command, delivered=delivered, then=process.kill))
                assert await child.outcome(process) == {}, command
            assert it.wire.happened.is_set()
            it.guest_writes(cluster)
            if command == "block-dirty-bitmap-remove":  # that is after the seal
                await it.engine().ship("vm")
            await _an_inc_lacks_nothing(it)
        with _engine(it, Level.INC) as process:  # the control
            it.wire.arm(None)
            assert (await child.outcome(process))["id"] in await it.all_is_well()
        assert {command for command, _ in _COMMANDS} <= set(it.wire.names)


async def test_a_kill_in_the_middle_of_a_copy(qemu72: Path, short: Path, store: Path) -> None:
    async with bench(qemu72, short, store) as it:
        await _full(it)
        it.guest_writes(*_DATA)
        for cluster, level in enumerate((Level.FULL, Level.INC), start=10):
            with _engine(it, level, limit=_SLOW) as process:
                await it.copying()
                process.kill()
                assert await child.outcome(process) == {}
            it.guest_writes(cluster)
            assert len(it.owes()) == 1
            await _an_inc_lacks_nothing(it)
            it.guest_writes(*_DATA)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_signal_in_the_middle_of_a_copy_ends_it_soon(
    number: signal.Signals, code: int, qemu72: Path, short: Path, store: Path
) -> None:
    program = Program(short, store)
    async with bench(qemu72, short, store) as it:
        await _full(it)
        process = await program.start(
            *("create", "vm", "--socket", it.qemu.qmp, *program.roots),
            *("--ram", "none", "-l", "full", "--speed-limit", str(_SLOW // 4)),
        )  # 16 s a disk
        await it.copying()
        it.guest_writes(10)
        begun = time.monotonic()
        process.send_signal(number)
        ran = await ended(process)
        assert time.monotonic() - begun < 6
        assert ran.code == code
        assert f"interrupted by {number.name}" in ran.err
        assert it.owes() == []
        await _an_inc_lacks_nothing(it)


async def test_a_guest_runs_on_while_the_engine_stands_still(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        await _full(it)
        with _engine(it, Level.FULL, limit=_SLOW) as process:
            path = await it.copying()
            process.send_signal(signal.SIGSTOP)
            it.witness.until(lambda: _state(process) == "T", within=5)
            so_far, longest = path.stat().st_size, 0.0
            for cluster in range(10, 40):
                begun = time.monotonic()
                it.guest_writes(cluster)
                longest = max(longest, time.monotonic() - begun)
            assert longest < 1
            it.guest_is_free()
            assert path.stat().st_size == so_far  # it did stand still
            process.send_signal(signal.SIGCONT)
            made = await child.outcome(process)
        assert it.levels(made["id"]) == {"full"}
        await _an_inc_lacks_nothing(it)


def _state(process: subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def _on_disk(it: Bench) -> dict[str, bytes]:
    found = {}
    for path in it.disks:
        flat = path.with_suffix(".flat")
        convert = ["qemu-img", "convert", "-f", path.suffix[1:], "-O", "raw", path, flat]
        subprocess.run(convert, check=True)
        found[f"v{path.stem}"] = flat.read_bytes()
        flat.unlink()
    return found


def _write_past(it: Bench) -> None:
    """What a QEMU without the overlays does."""
    for path in it.disks:
        change = ["qemu-io", "-f", path.suffix[1:], "-c", "write -q -P 255 0 64k", path]
        subprocess.run(change, check=True)


@pytest.mark.parametrize("version", ["7.2", "11.1"])
async def test_what_a_guest_wrote_is_in_its_disks_when_qemu_ends_during_a_copy(
    version: str, short: Path, store: Path
) -> None:
    async with bench(binary(version), short, store) as it:
        await _full(it)
        slow = wishes(RamChoice.NONE, level=Level.FULL, copying=Copying(limit=_SLOW))
        making = asyncio.create_task(it.engine().create(it.clean, slow))
        await it.copying()
        it.guest_writes(10, 11, 64)
        assert _scratch(it)  # that is where they are now
        it.qemu.kill()
        begun = time.monotonic()
        with pytest.raises(Failed, match="QEMU went away") as failed:
            await making
        assert time.monotonic() - begun < 3  # the copy would have gone on for eight seconds
        assert failed.value.exit_code == 4
        assert it.owes() == []
        assert _scratch(it) == {}
        assert _on_disk(it) == it.disks_now()
    line, _ = options(short, images=False)
    async with running(binary(version), *line, directory=short):
        # a frozen qcow2 had its bitmap on disk, and the commit went into it; raw has none
        made = await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.AUTO))
        became = {disk["device"]: disk for disk in it.points()[made.id]["disks"]}
        assert (became["vd0"]["level"], became["vd1"]["level"]) == ("inc", "full")
        assert "bitmap" in became["vd1"]["reason"]
        assert it.holds(made.id) == it.disks_now()
        await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.INC))


@contextmanager
def _both_dead(it: Bench, process: subprocess.Popen[bytes]) -> Iterator[None]:
    process.kill()
    process.wait()
    it.guest_writes(10, 11, 64)
    it.qemu.kill()
    it.witness.close()
    yield


async def test_recover_without_qemu_gives_the_disks_what_the_guest_wrote(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        await _full(it)
        with _engine(it, Level.FULL, limit=_SLOW) as process:
            await it.copying()
            with _both_dead(it, process):
                assert _on_disk(it) != it.disks_now()
    (settled,) = await it.engine().recover(it.clean)
    assert "committed" in " ".join(settled.did)
    assert it.owes() == []
    assert _scratch(it) == {}
    assert _on_disk(it) == it.disks_now()


async def test_a_disk_that_was_written_past_its_overlay_is_left_to_a_person(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        await _full(it)
        with _engine(it, Level.FULL, limit=_SLOW) as process:
            await it.copying()
            with _both_dead(it, process):
                overlays = _scratch(it)
    assert len(overlays) == 2
    _write_past(it)
    disks = _on_disk(it)
    for _ in range(2):
        with pytest.raises(LocalFailed) as left:
            await it.engine().recover(it.clean)
        assert str(it.disks[0]) in str(left.value)
        assert ".qmpsnap-" in str(left.value)
        assert len(it.owes()) == 1
        assert _scratch(it) == overlays
        assert _on_disk(it) == disks


async def test_a_disk_whose_qemu_runs_past_its_overlay_keeps_both_files(
    qemu72: Path, short: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench(qemu72, short, store) as it:
        await _full(it)
        with _engine(it, Level.FULL, limit=_SLOW) as process:
            await it.copying()
            with _both_dead(it, process):
                pass
    line, _ = options(short, images=False)
    async with running(qemu72, *line, directory=short):
        (settled,) = await it.engine().recover(it.clean)
        overlays = list(_scratch(it))
        assert len(overlays) == 2
        for path in overlays:
            assert str(path) in " ".join(settled.did)
            assert f"{path} is kept" in caplog.text


async def test_an_nbd_server_of_somebody_else_makes_auto_a_full(
    qemu72: Path, short: Path, store: Path
) -> None:
    async with bench(qemu72, short, store) as it:
        await _full(it)
        it.guest_writes(10)
        address = {"type": "unix", "data": {"path": str(short / "nbd")}}
        it.witness.ask("nbd-server-start", addr=address)
        with pytest.raises(Failed, match="NBD server") as busy:
            await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.INC))
        assert busy.value.exit_code == 4
        assert it.owes() == []
        assert it.chains() == [["d0.qcow2"], ["d1.raw"]]
        made = await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.AUTO))
        assert made.level == "full"
        for disk in it.points()[made.id]["disks"]:
            assert (disk["level"], disk["parent"]) == ("full", None)
            assert "NBD server" in disk["reason"]
        assert it.holds(made.id) == it.disks_now()
        it.witness.ask("nbd-server-stop")  # it has left that one alone
        await it.all_is_well()
        assert (await it.engine().verify("vm", made.id)).findings == []
        it.guest_writes(11)
        again = await it.engine().create(it.clean, wishes(RamChoice.NONE, level=Level.AUTO))
        assert it.levels(again.id) == {"inc"}  # the control
        assert it.holds(again.id) == it.disks_now()
