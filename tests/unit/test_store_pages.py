"""Page images that are kept: where they lie, when they are believed, and when they go."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from qmpsnap.engine import ramplace
from qmpsnap.engine.roots import Roots
from qmpsnap.errors import DamagedData
from qmpsnap.host import headroom
from qmpsnap.store import chunking, filling, pageplace, pages
from qmpsnap.store.layout import LocalRoot, StoreRoot
from qmpsnap.store.remote import Store
from tests.rig.ram import PAGE, holes, page, write_image
from tests.rig.room import room

COUNT = 160
SIZE = COUNT * PAGE
CONTENT = {3: page(3), 40: page(40), 41: page(41), 159: page(5)}
OLD, NEW, NEXT = "20261122T165001000Z", "20261122T165002000Z", "20261122T165003000Z"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder in a memory file system that holds 1 MiB; it is not there yet."""
    with room(tmp_path / "small", "1M") as root:
        yield root / "images"


def roots(local: Path, within: Path | None = None, ram_images: int = 1) -> Roots:
    (local / "web").mkdir(parents=True, exist_ok=True)
    store = Store(StoreRoot(local / "nowhere"), 30)
    return Roots(LocalRoot(local), store, ram_images=ram_images, ram_images_in=within)


def taken(
    here: Roots, id: str, content: Mapping[int, bytes] = CONTENT, sizes: Sequence[int] = (SIZE,)
) -> list[Path]:
    """What `create` leaves of a snapshot's RAM on the local root."""
    folder = here.local.ram("web", id)
    folder.mkdir(0o700, parents=True)
    paths = ramplace.made(here, "web", id, sizes)
    for path in paths:
        for number, one in content.items():
            with path.open("r+b") as file:
                file.seek(number * PAGE)
                file.write(one)
    packs = here.local.shared("web")
    packs.mkdir(exist_ok=True)
    blocks = [
        (f"b{n}", path, size) for n, (path, size) in enumerate(zip(paths, sizes, strict=True))
    ]
    index = chunking.keep(blocks, packs, [], stored_pages=[len(content)] * len(blocks)).index
    (folder / filling.INDEX).write_bytes(index)
    pages.seal(folder, id, [(name, path, len(content)) for name, path, _ in blocks])
    return paths


def digest(here: Roots, id: str) -> str:
    return pages.read(here.local.ram("web", id)).index_blake3


def good(here: Roots, id: str) -> bool:
    folder, seal = here.local.ram("web", id), digest(here, id)
    try:
        pages.found(folder, seal)
    except DamagedData:
        return False
    assert pages.wrong(folder, seal) == []
    return True


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_root_may_be_moved(tmp_path: Path, elsewhere: bool) -> None:
    here = roots(tmp_path / "one", tmp_path / "images" if elsewhere else None)
    (path,) = taken(here, NEW)
    assert path.parent.parent == (tmp_path / "images" if elsewhere else here.local.path / "web/ram")
    there = roots(tmp_path / "two", here.ram_images_in)
    there.local.path.rename(tmp_path / "aside")
    here.local.path.rename(there.local.path)
    assert good(there, NEW)
    os.utime(filling.image(filling.place(there.local.ram("web", NEW)), 0))
    assert not good(there, NEW)


def test_a_note_of_the_first_version_is_read(tmp_path: Path) -> None:
    here = roots(tmp_path / "one")
    (path,) = taken(here, NEW)
    note = here.local.ram("web", NEW) / pages.NOTE
    told = json.loads(note.read_text())
    assert (told["version"], told["images"][0]["image"]["path"]) == (2, "0.pages")
    told["version"], told["images"][0]["image"]["path"] = 1, str(path)
    note.write_text(json.dumps(told))
    assert good(here, NEW)
    here.local.path.rename(tmp_path / "two")
    assert good(roots(tmp_path / "two"), NEW)


@pytest.mark.parametrize("number", [20, 80, 159, 41])
def test_rot_is_found_where_there_was_nothing_too(tmp_path: Path, number: int) -> None:
    here = roots(tmp_path / "one")
    (path,) = taken(here, NEW, {number: one for number, one in CONTENT.items() if number != 159})
    folder, seal = here.local.ram("web", NEW), digest(here, NEW)
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(number * PAGE + 77)
        file.write(b"!")
        file.flush()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (told,) = pages.wrong(folder, seal)
    assert ("1 chunks" if number == 41 else "1 pages that have to be zero") in told


def test_images_in_memory_have_no_holes(small: Path, tmp_path: Path) -> None:
    here = roots(tmp_path / "one", small)
    (path,) = taken(here, NEW)
    assert path.stat().st_blocks * 512 >= SIZE
    assert path.parent == filling.place(here.local.ram("web", NEW))
    assert good(here, NEW)
    assert path.read_bytes() == b"".join(CONTENT.get(n, bytes(PAGE)) for n in range(COUNT))


def test_a_local_root_in_memory(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = roots(small)
    (path,) = taken(here, NEW)
    assert path.stat().st_blocks * 512 >= SIZE
    before = path.stat()
    ramplace.held([path])
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert good(here, NEW)
    assert caplog.text == ""
    assert taken(here, NEXT)[0].stat().st_blocks * 512 < SIZE // 2
    assert "has to find memory" in caplog.text


def test_older_images_give_way(small: Path, tmp_path: Path) -> None:
    here = roots(tmp_path / "one", small)
    (old,) = taken(here, OLD)
    (new,) = taken(here, NEW)
    assert new.parent.parent == small
    assert not old.parent.exists()
    left = {path.name for path in here.local.ram("web", OLD).iterdir()}
    assert left == {"pages.json", "ram.index"}
    assert good(here, NEW)
    assert pages.trim(here.local, "web", 1)
    assert not here.local.ram("web", OLD).exists()
    assert good(here, NEW)
    pages.forget(here.local, "web", NEW)
    assert list(small.iterdir()) == []
    assert list(here.local.ram("web").iterdir()) == []


def _full(small: Path, tmp_path: Path) -> None:
    taken(roots(tmp_path / "other", small), OLD)


def _open(small: Path, _: Path) -> None:
    small.mkdir()
    small.chmod(0o777)


def _led_away(small: Path, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    small.symlink_to(tmp_path / "away")


def _no_folder(small: Path, _: Path) -> None:
    small.write_text("")


def _not_mounted(small: Path, _: Path) -> None:
    small.symlink_to("nowhere/images")


@pytest.mark.parametrize("trouble", [_full, _open, _led_away, _no_folder, _not_mounted])
def test_what_has_no_place_there_lies_on_the_local_root(
    trouble: Callable[[Path, Path], None],
    small: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trouble(small, tmp_path)
    before = sorted(small.parent.rglob("*"))
    here = roots(tmp_path / "one", small)
    (path,) = taken(here, NEW)
    assert path.parent == here.local.ram("web", NEW)
    assert not path.with_name(filling.ELSEWHERE).is_symlink()
    assert "stay on the local root" in caplog.text
    assert len(holes(path)) == COUNT - len(CONTENT)
    assert good(here, NEW)
    assert sorted(small.parent.rglob("*")) == before  # others' images are no worse for it


@pytest.mark.parametrize("short_of", ["memory", "ceiling"])
def test_no_memory_is_taken_that_others_need(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_of: str
) -> None:
    host = headroom.look()
    less = host.memory_total_bytes // 16 + SIZE - 1
    if short_of == "memory":
        tight = replace(host, memory_free_bytes=less)
    else:
        tight = replace(host, ceilings=(headroom.Ceiling("/g", SIZE + 9, 10),))
    monkeypatch.setattr(headroom, "look", lambda: tight)
    here = roots(tmp_path / "one", small)
    assert taken(here, NEW)[0].parent == here.local.ram("web", NEW)
    monkeypatch.undo()
    assert taken(here, NEXT)[0].parent.parent == small


def test_none_are_kept_elsewhere_either(tmp_path: Path) -> None:
    here = roots(tmp_path / "one", tmp_path / "images", ram_images=0)
    assert taken(here, NEW)[0].parent == here.local.ram("web", NEW)


def test_images_that_packs_are_made_of_again_are_durable(tmp_path: Path) -> None:
    here = roots(tmp_path / "one", tmp_path / "images")
    folder = here.local.ram("web", NEW)
    folder.mkdir(parents=True)
    (path,) = ramplace.made(here, "web", NEW, [SIZE], here=True)
    assert path.parent == folder


def test_what_nothing_leads_to_is_swept(tmp_path: Path) -> None:
    within = tmp_path / "images"
    one, two = roots(tmp_path / "one", within), roots(tmp_path / "two", within)
    (first,), (second,) = taken(one, NEW), taken(two, NEW)
    assert first.parent.name != second.parent.name
    shutil.rmtree(one.local.path / "web/ram")  # anybody may, it is a cache
    (within / "no folder of ours").mkdir()
    taken(two, NEXT)
    assert not first.exists()
    assert second.exists()
    assert (within / "no folder of ours").exists()


@pytest.mark.parametrize("step", ["link", "folder", "back", "going", "aside"])
def test_cut_off_at_every_step(tmp_path: Path, step: str) -> None:
    within = tmp_path / "images"
    here = roots(tmp_path / "one", within)
    taken(here, NEW)
    folder = here.local.ram("web", NEW)
    there = filling.place(folder)
    if step in ("link", "folder", "back"):
        shutil.rmtree(there)
    if step in ("folder", "back"):
        there.mkdir()
    if step == "back":
        (there / "of").symlink_to(folder)
    if step == "aside":
        there.rename(f"{there}.going")
    if step in ("going", "aside"):
        folder.rename(f"{folder}.going")
    pages.trim(here.local, "web", 0)
    pages.forget(here.local, "web", NEW)
    pageplace.sweep(within)
    assert list(within.iterdir()) == []
    assert list(here.local.ram("web").iterdir()) == []


def test_holes_in_memory_are_filled_before_they_are_mapped(small: Path, tmp_path: Path) -> None:
    small.mkdir()
    write_image(small / "0.pages", CONTENT, SIZE)
    write_image(tmp_path / "0.pages", CONTENT, SIZE)
    for path in (small / "0.pages", tmp_path / "0.pages"):
        before = path.read_bytes()
        ramplace.held([path])
        assert path.read_bytes() == before
    assert (small / "0.pages").stat().st_blocks * 512 >= SIZE
    assert (tmp_path / "0.pages").stat().st_blocks * 512 < SIZE // 2
