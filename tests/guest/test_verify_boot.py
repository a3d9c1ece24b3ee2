"""`verify --boot`: the guest is seen to come back, on no network, and nothing of it stays."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine import dependents
from qmpsnap.engine.boot import Trial
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Level, Quiesce, RamChoice, Wishes
from qmpsnap.errors import Blocked
from qmpsnap.hypervisor.guest import quiesce
from tests.rig.graph import status
from tests.rig.guest import Guest, booted

pytestmark = pytest.mark.guest
PATIENT = Wishes(max_pause=30)  # no test of the pause
NET = ["-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,id=net0"]
_ALONE = "p=$(pidof qemu-ga); kill -9 $(cut -d' ' -f4 /proc/$p/stat) $p"


def processes(folder: Path) -> list[str]:
    """The command lines of the QEMUs that use *folder*."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if b"qemu-system" in words.split(b"\0")[0] and os.fsencode(folder) in words:
            found.append(words.decode(errors="replace"))
    return found


def nothing_left(engine: Engine, id: str) -> None:
    folder = engine.roots.local.vm("web") / "boot"
    assert not folder.exists()
    assert processes(folder) == []
    assert dependents.standing(engine.roots.local, "web", id) == []


async def taken(engine: Engine, guest: Guest, wishes: Wishes = PATIENT) -> str:
    return (await engine.create(Machine("web", guest.qmp, guest.agent), wishes)).id


async def deafened(guest: Guest) -> None:
    """The agent has opened its port, and says nothing any more."""
    async with asyncio.timeout(60):
        while await quiesce.is_answering(guest.agent):  # noqa: ASYNC110 - nobody tells us
            await asyncio.sleep(0.1)
    await guest.console.run("kill -STOP $(pidof qemu-ga)", within=30)


@pytest.mark.timeout(500)
async def test_with_and_without_ram_beside_the_original(
    qemu: Path, short: Path, store: Path
) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(qemu, short, extra=NET) as guest:
        id = await taken(engine, guest)
        before = await guest.console.witness(within=30)
        warm = await engine.verify("web", id, trial=Trial(within=60))
        assert warm.findings == []
        assert warm.boot is not None
        assert (warm.boot.ram, warm.boot.agent, warm.boot.problem) == (True, "answered", "")
        assert warm.boot.running_ms is not None
        assert warm.boot.answered_ms is not None
        assert warm.boot.running_ms < warm.boot.answered_ms
        nothing_left(engine, id)
        cold = await engine.verify("web", id, trial=Trial(cold=True, within=200))
        assert cold.findings == []
        assert cold.boot is not None
        assert (cold.boot.ram, cold.boot.agent) == (False, "answered")
        nothing_left(engine, id)
        # the original has noticed nothing
        assert await status(guest.qemu.witness) == "running"
        after = await guest.console.witness(within=30)
        assert after.ok
        assert after.ram > before.ram
    wish = Restoration(short / "b", isolated=True)
    argv = (await engine.prepare_restore("web", wish, id)).argv
    assert "user,id=n0,restrict=on" in argv
    assert (await engine.verify("web", id)).boot is None


@pytest.mark.timeout(400)
async def test_what_goes_wrong_is_a_finding(qemu72: Path, short: Path, store: Path) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(qemu72, short) as guest:
        await deafened(guest)
        silent = await taken(engine, guest)
        bare = Wishes(level=Level.OVERLAY, ram=RamChoice.NONE, quiesce=Quiesce.NONE, max_pause=30)
        disks = await taken(engine, guest, bare)
        await guest.console.run("kill -CONT $(pidof qemu-ga)", within=30)
        await guest.console.run(_ALONE, within=30)
        without = await taken(engine, guest)
    found = await engine.verify("web", silent, trial=Trial(within=3))
    assert [one.where for one in found.findings] == ["boot"]
    assert "its agent did not answer within 3 s" in found.findings[0].what
    assert found.boot is not None
    assert (found.boot.ram, found.boot.agent) == (True, "silent")
    nothing_left(engine, silent)

    found = await engine.verify("web", without, trial=Trial(within=3))
    assert found.findings == []
    assert found.boot is not None
    assert (found.boot.ram, found.boot.agent) == (True, "absent")
    nothing_left(engine, without)

    # taken without RAM, it is booted whatever is asked, and TCG takes longer than a second
    found = await engine.verify("web", disks, trial=Trial(within=0.5))
    assert found.boot is not None
    assert not found.boot.ram
    assert "did not answer within 0.5 s" in found.boot.problem
    with pytest.raises(Blocked, match="no revision 7"):
        await engine.verify("web", disks, trial=Trial(revision=7))

    os.utime(guest.disks[0])
    found = await engine.verify("web", disks, trial=Trial())
    assert {one.where for one in found.findings} == {"disk vd0", "boot"}
    nothing_left(engine, disks)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("key", "told"), [("b", "it restarted"), ("o", "powered off")], ids=["restart", "poweroff"]
)
async def test_a_guest_that_does_not_go_on(
    qemu72: Path, short: Path, store: Path, key: str, told: str
) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(qemu72, short) as guest:
        await deafened(guest)
        later = f"(sleep 20; echo {key} >/proc/sysrq-trigger) &"
        await guest.console.run(later, within=30)
        id = await taken(engine, guest)
    found = await engine.verify("web", id, trial=Trial(within=120))
    assert [one.where for one in found.findings] == ["boot"], found
    assert told in found.findings[0].what
    nothing_left(engine, id)


@pytest.mark.timeout(400)
async def test_the_newest_revision_boots(qemu72: Path, short: Path, store: Path) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(qemu72, short) as guest:
        id = await taken(engine, guest, Wishes(level=Level.FULL, max_pause=30))
        refreshed = await engine.refresh(Machine("web", guest.qmp, guest.agent), id)
    for trial in (Trial(cold=True, within=200), Trial(revision=1, within=200)):
        found = await engine.verify("web", id, trial=trial)
        assert found.findings == []
        assert found.boot is not None
        assert (found.boot.revision, found.boot.ram) == (1, False)
        assert found.boot.agent == "answered"
    # the disks of a revision that is damaged are not booted, and the pair is whole without it
    (Path(refreshed.local) / "storage.json").write_bytes(b"{")
    found = await engine.verify("web", id, trial=Trial(within=60))
    assert [one.where for one in found.findings] == [f"{id}/{refreshed.revision_id}"]
    assert found.boot is not None
    assert (found.boot.revision, found.boot.ram, found.boot.problem) == (0, True, "")


@pytest.mark.timeout(300)
async def test_a_machine_that_does_not_start(qemu72: Path, short: Path, store: Path) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    blob = short / "blob"
    blob.write_bytes(b"x")
    async with booted(qemu72, short, extra=["-fw_cfg", f"name=opt/x,file={blob}"]) as guest:
        id = await taken(engine, guest)
    blob.unlink()
    with pytest.raises(Blocked, match=str(blob)):  # of the host, and no fault of the snapshot
        await engine.verify("web", id, trial=Trial())
    nothing_left(engine, id)
    blob.mkdir()  # something is there, and only QEMU finds out that it is no file
    found = await engine.verify("web", id, trial=Trial())
    assert [one.where for one in found.findings] == ["boot"]
    assert str(blob) in found.findings[0].what  # QEMU's own words
    assert found.boot is not None
    assert found.boot.running_ms is None
    nothing_left(engine, id)
