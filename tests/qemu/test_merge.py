"""Prune and merge on real images: what survives reads as the model says, whatever is cut off."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import textwrap
from pathlib import Path

import pytest

from qmpsnap.engine import runs
from qmpsnap.engine.dependents import Dependent, note
from qmpsnap.engine.fates import Fate
from qmpsnap.engine.retention import Policy
from qmpsnap.errors import Refused, UsageError
from qmpsnap.host import qemu_img
from qmpsnap.host.journal import Journal, pending
from qmpsnap.store import points
from qmpsnap.store.layout import KEPT, MANIFEST, MERGED, StoreRoot
from qmpsnap.store.manifest import Merged, decode
from tests.rig.qemu import ROOT
from tests.rig.series import SIZE, VM, Series

LAST = Policy(last=1)


@pytest.fixture
def series(short: Path, store: Path) -> Series:
    return Series(short, store)


def fates(found: list[Fate]) -> dict[str, str]:
    return {one.id: one.decision for one in found}


def tree(*folders: Path) -> dict[Path, tuple[int, int, int]]:
    """All that is there, and whether it was touched."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            status = path.lstat()
            found[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


async def pruned(series: Series, policy: Policy = LAST, **how: bool) -> dict[str, str]:
    """Prune, first dry: the same decisions, and nothing is touched."""
    before = tree(series.dir, series.store)
    dry = await series.engine.prune(series.machine, policy, dry_run=True, **how)
    assert tree(series.dir, series.store) == before
    done = await series.engine.prune(series.machine, policy, **how)
    assert done.fates == dry.fates
    assert done.failed == []
    left = {one.storage.id for one in points.read(series.root, VM)}
    assert left == {one.id for one in done.fates if one.decision != "remove"}
    listed = {entry.id for entry in await series.engine.list(VM)}
    assert listed == {one.id for one in done.fates if one.decision == "keep"}
    assert listed == {path.name for path in (series.store / VM).iterdir()} - {"lease"}
    assert pending(series.root.journal(VM)) == []
    assert list(series.dir.rglob("*.partial")) == []
    return fates(done.fates)


@pytest.mark.parametrize("format", ["qcow2", "raw"])
async def test_the_oldest_ones_merge_into_the_oldest_that_stays(
    series: Series, format: str
) -> None:
    names = series.chain(5, format=format)
    got = await pruned(series, Policy(last=2))
    assert [got[name] for name in names] == ["remove"] * 3 + ["keep"] * 2
    await series.expect(*names[3:])
    there = points.read(series.root, VM)
    image = there.images(there.by_name[names[4]], "vda")[1]
    assert (image.format, len(there.images(there.by_name[names[4]], "vda"))) == ("qcow2", 2)
    # it holds everything now: a differential may stand on it
    merged = there.by_name[names[3]].disk("vda")
    assert merged is not None
    assert (merged.level, merged.parent) == ("full", None)
    # and once more, into what has come from a merge itself
    more = [series.add({"vda": names[4]}), series.add({"vda": names[4]})]
    assert (await pruned(series, Policy(last=2)))[names[4]] == "images"  # two stand on it
    await series.expect(*more)
    await pruned(series)
    assert [one.name for one in points.read(series.root, VM)] == more[1:]
    await series.expect(more[1])
    assert (await pruned(series)) == {more[1]: "keep"}


async def test_in_the_middle_only_what_lies_between_is_written(series: Series) -> None:
    names = series.chain(6)
    # the first and the last stay
    await series.engine.protect(VM, names[0], "as delivered")
    first = series.root.image(VM, names[0], "vda", "qcow2")
    before = first.stat()
    await pruned(series)
    await series.expect(names[0], names[5])
    there = points.read(series.root, VM)
    assert [one.name for one in there] == [names[0], names[5]]
    header = await qemu_img.info(
        Path(there.images(there.by_name[names[5]], "vda")[0].path), "qcow2"
    )
    assert header.backing_as_written == f"../{names[0]}/vda.qcow2"
    assert header.file_bytes is not None
    assert header.file_bytes < SIZE
    assert first.stat() == before
    # the roots are found wherever they are moved to, by qemu-img alone
    moved = series.dir / "moved"
    series.root.path.rename(moved)
    chain = await qemu_img.chain(moved / VM / names[5] / "vda.qcow2", "qcow2")
    assert len(chain) == 2


async def test_protected_ones_are_kept_and_refuse_to_be_deleted(series: Series) -> None:
    names = series.chain(2)
    assert (await series.engine.protect(VM, names[0], "as delivered")).protected
    assert await pruned(series) == {names[0]: "keep", names[1]: "keep"}
    with pytest.raises(Refused, match="is protected: as delivered"):
        await series.engine.delete(series.machine, names[0])
    assert not (await series.engine.unprotect(VM, names[0])).protected
    await series.engine.unprotect(VM, names[0])
    assert await pruned(series) == {names[0]: "remove", names[1]: "keep"}
    await series.expect(names[1])


async def test_what_several_stand_on_stays_and_goes_with_the_last_but_one(series: Series) -> None:
    full = series.add({"vda": None})
    first = series.add({"vda": full})
    second = series.add({"vda": full})
    third = series.add({"vda": first})
    got = await pruned(series, Policy(last=2))
    assert got == {full: "images", first: "remove", second: "keep", third: "keep"}
    await series.expect(second, third)
    # first has gone up into third, which stands on the full as second does
    there = points.read(series.root, VM)
    assert {one.name for one in there.standing_on(full)} == {second, third}
    assert await pruned(series) == {full: "remove", second: "remove", third: "keep"}
    await series.expect(third)


async def test_each_disk_has_a_chain_of_its_own(series: Series) -> None:
    one = series.add({"vda": None, "vdb": None})
    two = series.add({"vda": one, "vdb": None})
    three = series.add({"vda": two, "vdb": two})
    four = series.add({"vda": three, "vdb": one})
    got = await pruned(series)
    assert got == {one: "remove", two: "remove", three: "remove", four: "keep"}
    await series.expect(four)
    merged = decode((series.root.point(VM, four) / MERGED).read_bytes(), Merged, Path(MERGED))
    assert set(merged.disks) == {"vda", "vdb"}


async def test_frozen_files_of_the_vm_are_left_alone(series: Series) -> None:
    base = series.add({"vda": None}, overlay=True)
    disk = series.dir / "vda.qcow2"
    was = disk.stat()
    two = series.add({"vda": base})
    three = series.add({"vda": two})
    got = await pruned(series)
    # what stands on them merges, over them
    assert got == {base: "images", two: "remove", three: "keep"}
    await series.expect(three)
    header = await qemu_img.info(series.root.image(VM, three, "vda", "qcow2"), "qcow2")
    assert header.backing_as_written == str(disk)
    assert disk.stat() == was
    (told,) = [one for one in (await series.engine.prune(series.machine, LAST)).fates
               if one.id == base]  # fmt: skip
    assert told.state == "deleted"
    assert "the VM's own, frozen" in told.reasons[-1]


async def test_revisions_go_with_their_snapshot(series: Series) -> None:
    full = series.add({"vda": None})
    one = series.add({"vda": full}, revision_of=full)
    two = series.add({"vda": one}, revision_of=full)
    last = series.add({"vda": two})
    await series.expect(full, last)
    assert await pruned(series) == {full: "remove", last: "keep"}
    await series.expect(last)
    later = series.add({"vda": last}, revision_of=last)
    end = series.add({"vda": last})
    assert await pruned(series) == {last: "remove", end: "keep"}
    await series.expect(end)
    assert (later, "vda") in series.model


async def test_nothing_is_merged_when_told_so(series: Series) -> None:
    names = series.chain(3)
    # as of a kernel that they shared: it goes when none of those that are left needs it
    (series.store / VM / "shared").mkdir()
    (series.store / VM / "shared" / "none's").touch()
    got = await pruned(series, merging=False)
    assert got == {names[0]: "images", names[1]: "images", names[2]: "keep"}
    await series.expect(names[2])
    # what was deleted earlier is merged later
    assert await pruned(series) == {names[0]: "remove", names[1]: "remove", names[2]: "keep"}
    await series.expect(names[2])


async def test_what_a_restored_machine_stands_on_stays(series: Series, short: Path) -> None:
    names = series.chain(4)
    image = short / "back.qcow2"
    image.touch()
    note(series.root, VM, names[1], Dependent(folder=str(short / "back"), images=[str(image)]))
    got = await pruned(series)
    # into the second one nothing is merged, and it is kept itself
    assert got == {names[0]: "images", names[1]: "keep", names[2]: "remove", names[3]: "keep"}
    await series.expect(names[1], names[3])
    (told, *_) = (await series.engine.prune(series.machine, LAST)).fates
    assert f"restored machines stand on it: {short}/back" in told.reasons[-1]
    image.unlink()
    assert await pruned(series) == {
        names[0]: "remove", names[1]: "remove", names[3]: "keep"
    }  # fmt: skip
    await series.expect(names[3])


async def test_only_pairs_are_removed_and_only_pairs_are_counted(series: Series) -> None:
    names = series.chain(4)
    # the newest has lost its store half: it must not be what keeps the good ones from staying
    (StoreRoot(series.store).snapshot(VM, names[3]) / MANIFEST).unlink()
    done = await series.engine.prune(series.machine, LAST)
    assert fates(done.fates) == {
        names[0]: "remove", names[1]: "remove", names[2]: "keep", names[3]: "keep"
    }  # fmt: skip
    assert done.fates[3].reasons[0].startswith("damaged: ")
    await series.expect(names[2], names[3])
    with pytest.raises(UsageError):
        await series.engine.prune(series.machine, Policy())


async def test_one_that_cannot_be_read_keeps_all_images(series: Series) -> None:
    names = series.chain(3)
    series.root.storage(VM, names[1]).write_bytes(b"{")
    got = fates((await series.engine.prune(series.machine, LAST)).fates)
    assert got == {names[0]: "images", names[1]: "keep", names[2]: "keep"}
    assert series.root.image(VM, names[0], "vda", "qcow2").exists()


async def test_what_is_damaged_beneath_others_is_not_swept(series: Series) -> None:
    names = series.chain(4)
    await pruned(series, Policy(last=2), merging=False)
    kept = series.root.point(VM, names[0]) / KEPT
    kept.write_bytes(b"{")
    got = fates((await series.engine.prune(series.machine, LAST)).fates)
    assert got == {names[1]: "images", names[2]: "images", names[3]: "keep"}
    newest = series.root.image(VM, names[3], "vda", "qcow2")
    assert len(await qemu_img.chain(newest, "qcow2")) == 4


@pytest.mark.parametrize("which", [0, 1])
async def test_what_has_rotted_is_not_merged(series: Series, which: int) -> None:
    names = series.chain(2)
    path = series.root.image(VM, names[which], "vda", "qcow2")
    was = path.stat()
    with path.open("r+b") as file:
        file.seek(0x50000 + 100)
        byte = file.read(1)[0]
        file.seek(0x50000 + 100)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    before = tree(series.root.vm(VM))
    done = await series.engine.prune(series.machine, LAST)
    assert fates(done.fates) == {names[0]: "images", names[1]: "keep"}
    assert "BLAKE3" in done.failed[0]
    assert "BLAKE3" in done.fates[0].reasons[-1]
    after = tree(series.root.vm(VM))
    for name in names:
        image = series.root.image(VM, name, "vda", "qcow2")
        assert after[image] == before[image]
    assert not (series.root.point(VM, names[1]) / MERGED).exists()


async def test_a_new_image_that_reads_otherwise_is_not_used(
    series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = series.chain(3)
    await series.engine.protect(VM, names[0])

    async def forgetful(path: Path, backing: str, format: str, *_: object) -> None:
        words = ["rebase", "-u", "-f", "qcow2", "-b", backing, "-F", format, str(path)]
        process = await asyncio.create_subprocess_exec("qemu-img", *words)
        assert await process.wait() == 0

    monkeypatch.setattr(qemu_img, "rebase", forgetful)
    done = await series.engine.prune(series.machine, LAST)
    assert "does not read as" in done.failed[0]
    assert fates(done.fates)[names[1]] == "images"
    await series.expect(names[0], names[2])
    monkeypatch.undo()
    assert (await pruned(series))[names[1]] == "remove"
    await series.expect(names[0], names[2])


async def test_a_chain_of_a_hundred_down_to_one(series: Series) -> None:
    names = series.chain(101)
    await pruned(series)
    assert [one.name for one in points.read(series.root, VM)] == names[-1:]
    await series.expect(names[-1])


async def test_a_deletion_that_was_cut_off_is_ended(series: Series) -> None:
    names = series.chain(3)
    Journal(series.root.journal(VM)).open_entry(names[1], {"verb": "delete", "phase": "deleting"})
    Journal(series.root.journal(VM)).open_entry(names[0], {"verb": "create", "phase": "planned"})
    # whatever the policy says of it
    got = fates((await series.engine.prune(series.machine, Policy(last=3))).fates)
    assert got == {names[0]: "keep", names[1]: "remove", names[2]: "keep"}
    # what else is owed is for `recover` to settle
    got = fates((await series.engine.prune(series.machine, LAST)).fates)
    assert got == {names[0]: "keep", names[2]: "keep"}
    assert [one.id for one in pending(series.root.journal(VM))] == [names[0]]
    await series.expect(names[0], names[2])


async def test_the_removal_of_a_merged_point_that_was_cut_off_is_ended(series: Series) -> None:
    names = series.chain(3)
    await pruned(series, Policy(last=2))
    assert (series.root.point(VM, names[1]) / MERGED).exists()
    folder = series.root.point(VM, names[1])
    await pruned(series, merging=True)
    assert not folder.exists()
    # as after a crash in the middle of it: what was deleted is in no order
    folder.mkdir()
    shutil.copy(series.root.storage(VM, names[2]), folder / KEPT)
    text = (folder / KEPT).read_text().replace(names[2], names[1])
    (folder / KEPT).write_text(text)
    merged = (series.root.point(VM, names[2]) / MERGED).read_text()
    (folder / MERGED).write_text(merged.replace(names[2], names[1]))
    assert await pruned(series) == {names[1]: "remove", names[2]: "keep"}
    assert not folder.exists()


# A process that ends at once before its n-th step that others could see; it tells how many it made.
_CUT = """
    import asyncio, os, sys
    from pathlib import Path
    from qmpsnap import Engine, Machine
    from qmpsnap.engine.retention import Policy

    local, store, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    made = 0
    changing = {"os.rename", "os.remove", "os.rmdir", "os.link", "os.mkdir"}

    def step(event, words):
        global made
        if event == "open":
            writes = isinstance(words[2], int) and words[2] & (os.O_WRONLY | os.O_RDWR)
            counted = writes and str(words[0]).startswith(str(local))
        else:
            counted = event in changing or event == "subprocess.Popen"
        if counted:
            made += 1
            if made == last:
                os._exit(9)

    engine = Engine(local, store, allow_local_store=True)
    sys.addaudithook(step)
    asyncio.run(engine.prune(Machine("web"), Policy(last=1)))
    print(made)
"""


async def _cut(series: Series, last: int) -> tuple[int, int]:
    """Prune in a process that dies before its step *last*: its exit code, and the steps it made."""
    words = [sys.executable, "-c", textwrap.dedent(_CUT), series.root.path, series.store, str(last)]
    process = await asyncio.create_subprocess_exec(
        *map(str, words), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, int(out or 0)


async def _built(dir: Path, store: Path) -> tuple[Series, list[str]]:
    """Two expired ones beneath one that has come from a merge itself, and another on that."""
    series = Series(dir, store)
    names = series.chain(4)
    for name in names[:2]:
        await series.engine.protect(VM, name)
    await series.engine.prune(series.machine, LAST)
    for name in names[:2]:
        await series.engine.unprotect(VM, name)
    await series.engine.protect(VM, names[3])
    return series, [names[3], series.add({"vda": names[3]})]


@pytest.mark.timeout(1800)
async def test_cut_off_before_every_step_and_run_once_more(short: Path, store: Path) -> None:
    series, stay = await _built(short / "control", store / "control")
    assert len(list(points.read(series.root, VM))) == 4
    code, steps = await _cut(series, 0)
    assert code == 0
    assert steps > 30
    await series.expect(*stay)

    async def survives(last: int) -> None:
        series, stay = await _built(short / str(last), store / str(last))
        code, _ = await _cut(series, last)
        assert code == (9 if last <= steps else 0)
        there = points.read(series.root, VM)
        assert there.damaged == {}
        listed = [one.id for one in await series.engine.list(VM) if one.state == "paired"]
        assert set(stay) <= set(listed)
        # until it is run once more an image may be without its digest, never without its content
        await series.expect(*listed, sound=False)
        done = await series.engine.prune(series.machine, LAST)
        assert done.failed == []
        assert [one.name for one in points.read(series.root, VM)] == stay, last
        assert {path.name for path in (series.store / VM).iterdir()} == {*stay, "lease"}
        assert pending(series.root.journal(VM)) == []
        assert list(series.dir.rglob("*.partial")) == []
        await series.expect(*stay)

    # several at a time: each waits for processes most of the time
    todo = iter(range(1, steps + 2))

    async def some() -> None:
        for last in todo:
            await survives(last)

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(some())


async def test_called_off_in_the_middle_nothing_is_left(
    series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = series.chain(3)
    await series.engine.protect(VM, names[0])
    begun = asyncio.Event()

    async def endless(*_: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(qemu_img, "rebase", endless)
    task = asyncio.create_task(series.engine.prune(series.machine, LAST))
    await begun.wait()
    assert list(series.dir.rglob("*.partial")) != []
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(series.dir.rglob("*.partial")) == []
    await series.expect(names[0], names[2])
    monkeypatch.undo()
    assert await pruned(series) == {names[0]: "keep", names[1]: "remove", names[2]: "keep"}
    await series.expect(names[0], names[2])


async def test_without_room_the_images_stay(
    series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = series.chain(3)
    real = os.statvfs

    def full(path: Path) -> os.statvfs_result:
        return os.statvfs_result((*real(path)[:4], 1, *real(path)[5:]))

    monkeypatch.setattr(os, "statvfs", full)
    done = await series.engine.prune(series.machine, LAST)
    assert "no room" in done.failed[0]
    assert fates(done.fates) == {names[0]: "images", names[1]: "images", names[2]: "keep"}
    assert list(series.dir.rglob("*.partial")) == []
    monkeypatch.undo()
    await series.expect(names[2])
    assert set((await pruned(series)).values()) == {"remove", "keep"}
    await series.expect(names[2])


def test_a_plan_of_merges_ends_with_a_machine_on_top(series: Series) -> None:
    names = series.chain(4)
    there = points.read(series.root, VM)
    expired = set(names[:3])
    assert runs.plan(there, expired, {}).runs == [
        runs.Run("vda", names[3], (names[2], names[1], names[0]), None)
    ]
    held = runs.plan(there, expired, {names[3]: "a machine stands on it"})
    assert held.runs == [runs.Run("vda", names[2], (names[1], names[0]), None)]
    assert "a machine stands on it" in held.stuck[names[2]]
    held = runs.plan(there, expired, {names[1]: "a machine stands on it"})
    assert held.runs == [runs.Run("vda", names[3], (names[2],), names[1])]
    assert set(held.stuck) == {names[0], names[1]}
