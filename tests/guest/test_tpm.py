"""A TPM whose state the guest has changed: it comes back as it was, with the RAM and from disk."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.comparison import Row
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Level, Wishes
from qmpsnap.errors import Blocked
from qmpsnap.host import tpmstate
from tests.rig import tpm
from tests.rig.console import Console
from tests.rig.guest import back, booted
from tests.rig.qemu import binary

pytestmark = pytest.mark.guest


async def row(engine: Engine, id: str, to: Path, *, cold: bool = False) -> Row:
    found = await engine.check("web", Restoration(to, cold=cold), id)
    (one,) = (row for row in found.rows if row.what == "TPM t0")
    assert found.fits == (one.verdict != "blocks")
    return one


def gone(pidfd: int) -> None:
    """Returns when that process has ended."""
    ended, _, _ = select.select([pidfd], [], [], 30)
    os.close(pidfd)
    assert ended


@pytest.mark.timeout(400)
async def test_it_comes_back_as_it_was(
    qemu72: Path, short: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    with tpm.swtpm(short / "tpm") as socket:
        async with booted(qemu72, short, extra=tpm.options(socket)) as guest:
            await tpm.define(guest.console)
            await tpm.store(guest.console, b"the then")
            await tpm.extend(guest.console, 1)
            then = await tpm.register(guest.console)
            machine = Machine("web", guest.qmp, guest.agent)
            id = (await engine.create(machine, Wishes(level=Level.FULL, max_pause=20))).id
            await tpm.store(guest.console, b"the now!")
            await tpm.extend(guest.console, 2)
            assert await tpm.register(guest.console) != then
            assert await tpm.stored(guest.console) == b"the now!"

    for version in ("7.2", "10.0"):
        wish = Restoration(short / version, qemu=binary(version))
        async with back(engine, "web", wish, id) as (_, console):
            assert await tpm.register(console) == then
            assert await tpm.stored(console) == b"the then"
            assert (await console.witness(within=30)).ok

    # with the RAM, on another QEMU; the machine outlives us, and takes its swtpm along when killed
    to = short / "b"
    assert (await row(engine, id, to)).verdict == "ok"
    ready = await engine.prepare_restore("web", Restoration(to, qemu=binary("11.1")), id)
    async with engine.restored(ready, detach=True) as restored:
        pass
    async with Console.open(to / "console.sock") as console:
        assert await tpm.register(console) == then
        assert await tpm.stored(console) == b"the then"
        assert (await console.witness(within=30)).ok
        await tpm.store(console, b"another!")
    own = tpmstate.behind(to / "ctrl.sock")
    assert own.place == to / "tpm"
    assert {path.stat().st_mode & 0o777 for path in own.place.iterdir()} == {0o600}
    assert (to / "ctrl.sock").stat().st_mode & 0o777 == 0o600
    pidfd = os.pidfd_open(own.pid)
    os.kill(restored.process.pid, signal.SIGKILL)
    gone(pidfd)

    # from the disks: what is volatile is as after a reset, what is permanent is as it was
    told = await row(engine, id, short / "c", cold=True)
    assert told.verdict == "ok", told
    async with back(engine, "web", Restoration(short / "c", cold=True), id) as (_, console):
        await console.until("READY", within=120)
        assert await tpm.stored(console) == b"the then"
        assert await tpm.register(console) == "0" * 64
        pidfd = os.pidfd_open(tpmstate.behind(short / "c/ctrl.sock").pid)
    gone(pidfd)

    half = store / "web" / id
    kept = (half / "tpm/tpm2-00.permall").read_bytes()
    (half / "tpm/tpm2-00.permall").unlink()
    to = short / "d"
    for cold, verdict in ((False, "differs"), (True, "blocks")):
        told = await row(engine, id, to, cold=cold)
        assert told.verdict == verdict
        assert "tpm2-00.permall" in told.why
    findings = (await engine.verify("web", id)).findings
    assert [one.where for one in findings] == ["tpm/tpm2-00.permall"]
    (half / "tpm/tpm2-00.permall").write_bytes(kept)
    (half / "tpm.json").rename(half / "gone")
    assert (await row(engine, id, to, cold=True)).verdict == "blocks"
    assert "taken for a TPM 2" in (await row(engine, id, to)).why
    (half / "gone").rename(half / "tpm.json")
    monkeypatch.setenv("PATH", str(short))
    assert "swtpm is not installed" in (await row(engine, id, to)).why
    with pytest.raises(Blocked, match="TPM t0: swtpm is not installed"):
        await engine.prepare_restore("web", Restoration(to), id)
    assert not to.exists()
