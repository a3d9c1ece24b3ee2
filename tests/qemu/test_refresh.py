"""A newer revision of the disks under the same ID, while the store half is out of reach."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.engine.wishes import Level, RamChoice, Wishes
from qmpsnap.errors import Blocked, SnapshotUnknown
from qmpsnap.host import qemu_img
from tests.faults.bench import options
from tests.rig.graph import untouched
from tests.rig.qemu import running
from tests.rig.wire import Witness, witness

SIZE = 16 << 20
DISK = "/machine/peripheral/vd0/virtio-backend"


def tree(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        told = path.stat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (content, told.st_mtime_ns, told.st_ino)
    return found


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody, root neither, can write below *folder* during the block."""
    for words in (["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
        subprocess.run(["mount", *words], check=True)
    try:
        with pytest.raises(OSError, match="Read-only"):
            (folder / "probe").touch()
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def away(folder: Path) -> Iterator[None]:
    """Nothing is where *folder* was: whoever looks at it fails."""
    hidden = folder.with_name(f"{folder.name}-away")
    folder.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(folder)


def write(eye: Witness, mark: int, cluster: int) -> None:
    line = f'qemu-io -d {DISK} "write -P {mark} {cluster << 16} 64k"'
    said = eye.ask("human-monitor-command", **{"command-line": line})
    assert "error" not in said.lower(), said


async def content(engine: Engine, id: str, revision: int, to: Path) -> bytes:
    wish = Restoration(to, cold=True, revision=revision)
    await engine.prepare_restore("web", wish, id)
    raw = to.with_suffix(".raw")
    await qemu_img.convert(to / "vd0.qcow2", "qcow2", raw, "raw")
    return raw.read_bytes()


@pytest.mark.parametrize("level", [Level.FULL, Level.OVERLAY])
@pytest.mark.parametrize("out_of_reach", [read_only, away])
async def test_a_refresh_leaves_the_store_as_it_was(
    qemu: Path, short: Path, store: Path, level: Level, out_of_reach: object
) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    line, _ = options(short)
    model = bytearray(SIZE)
    async with running(qemu, *line, directory=short) as process:
        machine = Machine("web", process.qmp)
        with witness(process.witness) as eye:
            write(eye, 1, 3)
            model[3 << 16 : 4 << 16] = bytes([1]) * 65536
            made = await engine.create(machine, Wishes(level=level, max_pause=20))
            states = [bytes(model)]
            before = tree(store)
            for mark in (2, 3):
                write(eye, mark, mark)
                model[mark << 16 : (mark + 1) << 16] = bytes([mark]) * 65536
                with out_of_reach(store):  # type: ignore[operator]
                    done = await engine.refresh(machine, made.id, max_pause=20)
                assert (done.id, done.revision) == (made.id, mark - 1)
                assert set(done.levels.values()) == {"inc"}
                states.append(bytes(model))
            write(eye, 9, 9)  # belongs to none of them
            verified = await engine.verify("web", machine=machine)
            assert {one.disk: one.level for one in verified.next} == {"vd0": "inc", "vd1": "inc"}
            name = (await engine.revisions("web", made.id))[-1].disks[0].bitmap
            node = "d0" if level is Level.FULL else f"vd0-{made.id}"
            eye.ask("block-dirty-bitmap-disable", node=node, name=name)
            verified = await engine.verify("web", machine=machine)
            assert "somebody has disabled it" in verified.next[0].why
            eye.ask("block-dirty-bitmap-enable", node=node, name=name)
        assert tree(store) == before
        await untouched(process.witness)
    assert (await engine.list("web"))[0].state == "paired"
    assert [one.revision for one in await engine.revisions("web", made.id)] == [0, 1, 2]
    for revision, state in enumerate(states):
        assert await content(engine, made.id, revision, short / f"r{revision}") == state
    # the RAM goes with the first; a cold boot takes the newest
    ready = await engine.prepare_restore("web", Restoration(short / "cold", cold=True))
    assert ready.pair.storage.revision == 2
    ready = await engine.prepare_restore("web", Restoration(short / "warm"))
    assert ready.pair.storage.revision == 0
    with pytest.raises(Blocked, match="of the instant of revision 0"):
        await engine.prepare_restore("web", Restoration(short / "no", revision=1))
    with pytest.raises(Blocked, match="has no revision 3; there are: 0, 1, 2"):
        await engine.prepare_restore("web", Restoration(short / "no", cold=True, revision=3))
    assert (await engine.verify("web")).findings == []


async def test_a_snapshot_that_is_not_there_is_not_refreshed(
    qemu72: Path, short: Path, store: Path
) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    line, _ = options(short)
    async with running(qemu72, *line, directory=short) as process:
        machine = Machine("web", process.qmp)
        for word in ("latest", "2026"):
            with pytest.raises(SnapshotUnknown):
                await engine.refresh(machine, word)
        await engine.create(machine, Wishes(level=Level.FULL, ram=RamChoice.NONE, max_pause=20))
        with pytest.raises(SnapshotUnknown, match="means no single snapshot"):
            await engine.refresh(machine, "1999")
        await untouched(process.witness)
