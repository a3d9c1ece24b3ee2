"""Prune and merge of images that are encrypted: never in the clear, whatever is cut off."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from qmpsnap.engine import resealing
from qmpsnap.engine.retention import Policy
from qmpsnap.host.journal import pending
from qmpsnap.store import points
from qmpsnap.store.layout import MERGED
from qmpsnap.store.manifest import Merged, decode
from tests.qemu.test_merge import LAST, _cut, fates, pruned, tree
from tests.rig.series import CLUSTER, VM, Series


@pytest.fixture
def series(short: Path, store: Path) -> Series:
    return Series(short, store, encrypted=True)


def formats(series: Series) -> set[str]:
    return {path.suffix for path in series.root.vm(VM).rglob("vd*")}


def clear(series: Series) -> list[Path]:
    """The files of the local root in which something of a disk can be read."""
    marks = {
        content[at + 200 : at + 232]
        for content in series.model.values()
        for at in range(0, len(content), CLUSTER)
    } - {bytes(32)}
    assert marks
    files = [path for path in series.root.path.rglob("*") if path.is_file()]
    return [path for path in files if any(mark in path.read_bytes() for mark in marks)]


@pytest.mark.parametrize("compressed", [False, True])
async def test_what_expired_goes_up_into_what_stays(series: Series, compressed: bool) -> None:
    series.compressed = compressed
    names = series.chain(6)
    await series.engine.protect(VM, names[1])
    key = series.engine.secrets.current().key
    got = await pruned(series)
    assert [got[name] for name in names] == [
        "remove", "keep", "remove", "remove", "remove", "keep",
    ]  # fmt: skip
    await series.expect(names[1], names[5])
    there = points.read(series.root, VM)
    first, last = (there.by_name[names[at]].disk("vda") for at in (1, 5))
    assert first is not None
    assert last is not None
    assert [(one.level, one.parent) for one in (first, last)] == [("full", None), ("inc", names[1])]
    assert {one.chain[0].key for one in (first, last)} == {key}
    merged = decode((series.root.point(VM, names[5]) / MERGED).read_bytes(), Merged, Path(MERGED))
    assert merged.version == 2
    assert formats(series) == {".sealed"}
    assert clear(series) == []
    # once more, into what has come from a merge itself
    await series.engine.unprotect(VM, names[1])
    more = series.add({"vda": names[5]})
    await pruned(series)
    await series.expect(more)
    assert formats(series) == {".sealed"}


async def test_the_control_lies_in_the_clear(short: Path, store: Path) -> None:
    series = Series(short, store)
    series.chain(2)
    assert len(clear(series)) == 2


async def test_keys_that_changed_on_the_way(series: Series) -> None:
    """Each image has its own; what is merged has the one of the image that took it in."""
    names = series.chain(2)
    old = series.engine.secrets.current().key
    series.engine.secrets.rotate()
    new = series.engine.secrets.current().key
    names += [series.add({"vda": names[1]})]
    names += [series.add({"vda": names[2]})]
    assert old != new
    await series.expect(*names)
    got = await pruned(series, Policy(last=2))
    assert [got[name] for name in names] == ["remove", "remove", "keep", "keep"]
    await series.expect(*names[2:])
    there = points.read(series.root, VM)
    assert {point.storage.keys[0] for point in there} == {new}


async def test_without_the_key_the_images_stay_and_all_else_goes_on(
    series: Series, short: Path
) -> None:
    names = series.chain(4)
    key = series.engine.secrets.current().key
    file = series.root.keys / "encryption.json"
    file.rename(short / "away")
    series.engine.secrets._known.clear()
    before = tree(series.root.vm(VM))
    got = await pruned(series, Policy(last=2))
    assert [got[name] for name in names] == ["images", "images", "keep", "keep"]
    again = await series.engine.prune(series.machine, Policy(last=2), dry_run=True)
    told = {one.id: one.reasons[-1] for one in again.fates}
    assert f"encrypted with the key {key}, which is not here" in told[names[1]]
    after = tree(series.root.vm(VM))
    assert all(after[path] == before[path] for path in after if path.suffix == ".sealed")
    # what nobody stands on is deleted without a key
    assert (await series.engine.delete(series.machine, names[3])).id == names[3]
    (short / "away").rename(file)
    assert (await pruned(series))[names[2]] == "keep"
    await series.expect(names[2])
    assert [one.name for one in points.read(series.root, VM)] == [names[2]]


@pytest.mark.parametrize("which", [0, 1])
async def test_what_has_rotted_is_not_merged(series: Series, which: int) -> None:
    names = series.chain(2)
    path = series.root.image(VM, names[which], "vda", "sealed")
    was, content = path.stat(), bytearray(path.read_bytes())
    content[-100] ^= 1  # behind what the fingerprint of the header is of
    path.write_bytes(content)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    for digested in (True, False):  # and by its frames alone, had nobody hashed it
        if not digested:
            (series.root.point(VM, names[which]) / "digests.json").unlink()
        done = await series.engine.prune(series.machine, LAST)
        assert fates(done.fates) == {names[0]: "images", names[1]: "keep"}
        assert ("BLAKE3" if digested else "cannot be decrypted") in done.failed[0]
        assert path.read_bytes() == content
        assert list(series.dir.rglob("*.partial")) == []


async def test_a_new_image_that_reads_otherwise_is_not_used(
    series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = series.chain(3)
    real = resealing.sealed.write
    monkeypatch.setattr(
        resealing.sealed, "write",
        lambda *args, **how: real(*args, **(how | {"extents": how["extents"][:-1]})),
    )  # fmt: skip
    done = await series.engine.prune(series.machine, LAST)
    assert "does not read as" in done.failed[0]
    assert fates(done.fates)[names[1]] == "images"
    await series.expect(names[2])
    monkeypatch.undo()
    await pruned(series)
    await series.expect(names[2])


async def test_called_off_in_the_middle_nothing_is_left(
    series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, begun, go = series.chain(3), asyncio.Event(), asyncio.Event()
    real, loop = resealing.sealed.write, asyncio.get_running_loop()

    def slow(*args: object, **how: object) -> int:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result(30)
        return real(*args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(resealing.sealed, "write", slow)
    task = asyncio.create_task(series.engine.prune(series.machine, LAST))
    await begun.wait()
    task.cancel()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(series.dir.rglob("*.partial*")) == []
    await series.expect(names[2])


@pytest.mark.timeout(1800)
async def test_cut_off_before_every_step_and_run_once_more(short: Path, store: Path) -> None:
    async def built(name: str) -> tuple[Series, list[str]]:
        made = Series(short / name, store / name, encrypted=True)
        names = made.chain(4)
        await made.engine.protect(VM, names[0])
        return made, [names[0], names[3]]

    series, stay = await built("control")
    code, steps = await _cut(series, 0)
    assert (code, steps > 15) == (0, True)
    await series.expect(*stay)

    async def survives(last: int) -> None:
        series, stay = await built(str(last))
        code, _ = await _cut(series, last)
        assert code == (9 if last <= steps else 0)
        listed = [one.id for one in await series.engine.list(VM) if one.state == "paired"]
        assert set(stay) <= set(listed)
        await series.expect(*listed, sound=False)
        assert clear(series) == []
        done = await series.engine.prune(series.machine, LAST)
        assert done.failed == []
        assert [one.name for one in points.read(series.root, VM)] == stay, last
        assert pending(series.root.journal(VM)) == []
        assert list(series.root.vm(VM).rglob("*.partial")) == []
        await series.expect(*stay)

    # several at a time: each waits for processes most of the time
    todo = iter(range(1, steps + 2))

    async def some() -> None:
        for last in todo:
            await survives(last)

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(some())
