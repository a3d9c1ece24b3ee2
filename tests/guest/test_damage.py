"""Damage: found, named, and never restored from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmpsnap import Engine, Machine
from qmpsnap.engine.restore import Restoration
from qmpsnap.errors import BaseChanged, DamagedData
from tests.rig.graph import status
from tests.rig.guest import agrees, back, booted

pytestmark = pytest.mark.guest


@contextmanager
def harmed(path: Path, harm: Callable[[Path], None]) -> Iterator[None]:
    """*path* is harmed for the block, and as it was afterwards, to the nanosecond."""
    content, times = path.read_bytes(), path.stat()
    harm(path)
    try:
        yield
    finally:
        with path.open("r+b" if path.exists() else "xb") as file:
            file.write(content)
            file.truncate()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def spoil(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 512)


def touch(path: Path) -> None:
    os.utime(path)


def header(path: Path) -> None:
    """Another content, and the times of before: only the header's digest tells."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(600)
        file.write(b"?")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.timeout(400)
async def test_damage_is_named_and_nothing_is_restored_from_it(
    qemu72: Path, short: Path, store: Path
) -> None:
    engine = Engine(short / "local", store, allow_local_store=True)
    async with booted(qemu72, short) as guest:
        before = await guest.console.witness(within=30)
        made = await engine.create(Machine("web", guest.qmp, guest.agent))
        assert await status(guest.qemu.witness) == "running"
    for base in guest.disks:
        for harm in (cut, grow, touch, spoil, header):
            with harmed(base, harm):
                await _named(engine, str(base))
                with pytest.raises(BaseChanged, match=base.name):
                    await engine.prepare_restore("web", Restoration(short / "b"))
                assert not (short / "b").exists()
    half = Path(made.store)
    names = below(half)
    assert names == ["machine.json", "manifest.json", "usage.json", "vmstate/stream.zst"]
    for name in names:
        for harm in (spoil, cut, Path.unlink):
            with harmed(half / name, harm):
                await _named(engine, name)
                if name != "usage.json":  # it tells nothing that a restore needs
                    await _not_restored(engine, short / "b", name)
    with harmed(half / "manifest.json", lambda path: os.truncate(path, 100)):
        (entry,) = await engine.list("web")
        assert entry.state == "damaged"
        assert "manifest.json" in entry.why
    sealed = Path(made.local) / "storage.json"
    for harm in (spoil, cut):
        with harmed(sealed, harm):
            assert [entry.state for entry in await engine.list("web")] == ["damaged"]
            await _named(engine, "")
            with pytest.raises(DamagedData):
                await engine.prepare_restore("web", Restoration(short / "b"), made.id)
    # and with nothing wrong any more all is well: it was the damage that was found
    assert (await engine.verify("web")).findings == []
    await agrees(engine, "web", Restoration(short / "b"), before)


async def _named(engine: Engine, name: str) -> None:
    (entry,) = await engine.list("web")
    found = (await engine.verify("web", entry.id)).findings
    assert any(name in f"{one.where} {one.what}" for one in found), found


async def _not_restored(engine: Engine, to: Path, name: str) -> None:
    (entry,) = await engine.list("web")
    with pytest.raises(DamagedData):
        async with back(engine, "web", Restoration(to), entry.id):
            pytest.fail(f"restored in spite of a harmed {name}")
    assert below(to) == []
