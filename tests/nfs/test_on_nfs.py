"""The whole job with its store on a real NFS mount: guest, engine and store inside the rig."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Level, Wishes
from qmpsnap.errors import NotShipped, StoreStalled
from qmpsnap.host.filesystem import mount_of
from tests.nfs.conftest import Server
from tests.rig.console import Heartbeat
from tests.rig.graph import chains, status
from tests.rig.guest import Guest, agrees, booted

pytestmark = [pytest.mark.guest, pytest.mark.nfs]

MOUNT = Path(os.environ.get("NFS_MOUNT", "/mnt/nfs"))
WITHIN = 4.0  # seconds without progress after which the store is given up
PAUSE = 8  # seconds; longer than any silence of the guest may be
SILENCE = 5.0


@pytest.fixture
def store(server: Server) -> Iterator[Path]:
    path = MOUNT / f"pairs-{os.getpid()}"
    path.mkdir()
    yield path
    server("start")  # a test that failed may have left it dead: the mount would hang for ever
    shutil.rmtree(path)


@pytest.fixture
def short() -> Iterator[Path]:
    """On the rig's own disk: files of the machine outside have the times of two clocks there."""
    path = Path(tempfile.mkdtemp(prefix="qs"))
    yield path
    shutil.rmtree(path)


class Once:
    """Does something the first time that the engine reports on shipping a file."""

    def __init__(self) -> None:
        self.then: Callable[[], object] | None = None
        self.at: float | None = None

    def arm(self, then: Callable[[], object]) -> None:
        self.then, self.at = then, None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.then is not None and what.startswith("shipping"):
            self.then()
            self.then, self.at = None, time.monotonic()


@pytest.mark.timeout(580)
async def test_the_whole_job_on_a_real_nfs_mount(
    server: Server, qemu72: Path, short: Path, store: Path
) -> None:
    assert mount_of(store).network
    fault = Once()
    # no --allow-local-store: this store is one
    engine = Engine(short / "local", store, store_within=WITHIN, ship_retry=0, report=fault)
    async with booted(qemu72, short) as guest:
        machine = Machine("web", guest.qmp, guest.agent)
        with Heartbeat.open(guest.heartbeat) as heart:
            await _whole(engine, machine, guest, server, short)
            await _server_pauses(engine, machine, guest, server, fault, heart)
            await _server_dies(engine, machine, guest, server, fault, heart, short)
            await _export_is_full(engine, machine, guest, server, fault)
        entries = await engine.list("web")
        assert [entry.state for entry in entries] == ["paired"] * 4
        for entry in entries:
            assert (await engine.verify("web", entry.id)).findings == []
        assert await status(guest.qemu.witness) == "running"
        # a copy, and three overlays
        assert {len(files) for files in (await chains(guest.qemu.witness)).values()} == {4}
        before = await guest.console.witness(within=60)
    # the one that waited for the dead server, as good as any
    await agrees(engine, "web", Restoration(short / "late"), _older(before), entries[2].id)


def _older(witness: Any) -> Any:
    return type(witness)(witness.nonce, 1, None, None, ok=True)


async def _whole(
    engine: Engine, machine: Machine, guest: Guest, server: Server, short: Path
) -> None:
    before = await guest.console.witness(within=60)
    made = await engine.create(machine, Wishes(max_pause=SILENCE))
    assert made.state == "paired"
    shown = await engine.show("web")
    assert shown.manifest.trial_store is False
    (entry,) = await engine.list("web")
    assert (entry.id, entry.state) == (made.id, "paired")
    # at the server, and not in the client's cache
    packed = shown.manifest.files[-1]
    folder = f"{engine.roots.store.root.path.name}/web/{made.id}"
    there = server("sh", f"stat -c %s {folder}/{packed.name} && ls {folder}")
    assert there["out"].split() == [
        str(packed.bytes), "machine.json", "manifest.json", "manifest.sig", "usage.json", "vmstate",
    ]  # fmt: skip
    assert (await engine.verify("web")).findings == []
    await agrees(engine, "web", Restoration(short / "back"), before)


async def _server_pauses(
    engine: Engine,
    machine: Machine,
    guest: Guest,
    server: Server,
    fault: Once,
    heart: Heartbeat,
) -> None:
    patient = Engine(
        engine.roots.local.path, engine.roots.store.root.path, store_within=60, report=fault
    )
    fault.arm(lambda: server("pause", PAUSE))
    begun = heart.mark()
    made = await patient.create(machine, Wishes(level=Level.OVERLAY, max_pause=SILENCE))
    silence = heart.silence(begun, heart.mark())
    assert made.state == "paired"
    assert fault.at is not None
    assert time.monotonic() - fault.at > PAUSE - 1, "the server was not paused meanwhile"
    assert silence < SILENCE
    assert (await guest.console.witness(within=60)).ok


async def _server_dies(
    engine: Engine,
    machine: Machine,
    guest: Guest,
    server: Server,
    fault: Once,
    heart: Heartbeat,
    short: Path,
) -> None:
    before = await guest.console.witness(within=60)
    fault.arm(lambda: server("kill"))
    begun = heart.mark()
    with pytest.raises(NotShipped, match="no progress for 4 s"):
        await engine.create(machine, Wishes(level=Level.OVERLAY, max_pause=SILENCE, note="dead"))
    assert fault.at is not None
    assert time.monotonic() - fault.at < WITHIN + 6
    assert heart.silence(begun, heart.mark()) < SILENCE
    assert (await guest.console.witness(within=60)).ok
    waiting = (await engine.list("web"))[-1]
    assert (waiting.state, waiting.note, waiting.spool) == ("shipping", "dead", True)
    # a part of its RAM came with snapshots before, and is where nobody answers now
    with pytest.raises(StoreStalled):
        await engine.verify("web", waiting.id)
    # but all of it is here as well: the spool is as good to restore from as the store is
    await agrees(engine, "web", Restoration(short / "dead"), _older(before), waiting.id)
    server("start")
    delivered, left = await _until_delivered(engine)
    assert [one.id for one in delivered] == [waiting.id]
    assert left == []
    assert not engine.roots.local.spool("web", waiting.id).exists()


async def _until_delivered(engine: Engine) -> tuple[list[Any], list[Any]]:
    # a client comes back to a server that was away in its own time
    for _ in range(8):
        delivered, left = await engine.ship("web")
        if delivered:
            break
    return list(delivered), list(left)


async def _export_is_full(
    engine: Engine, machine: Machine, guest: Guest, server: Server, fault: Once
) -> None:
    server("fill")
    with pytest.raises(NotShipped, match="ENOSPC"):
        await engine.create(machine, Wishes(level=Level.OVERLAY, max_pause=SILENCE, note="full"))
    assert (await guest.console.witness(within=60)).ok
    assert (await engine.list("web"))[-1].state == "shipping"
    server("unfill")
    delivered, left = await engine.ship("web")
    assert [len(delivered), len(left)] == [1, 0]
