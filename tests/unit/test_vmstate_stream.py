"""A migration stream is taken apart into exactly its pages, put together again, or refused."""

from __future__ import annotations

import json
import os
import random
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some

from qmpsnap.errors import DamagedData, LocalFailed, StreamUnknown
from qmpsnap.hypervisor.vmstate.description import Section
from qmpsnap.hypervisor.vmstate.join import join
from qmpsnap.hypervisor.vmstate.split import Split, split
from qmpsnap.hypervisor.vmstate.stream import examine
from qmpsnap.hypervisor.vmstate.window import SIZE, Cancelled
from tests.rig import stream as rig
from tests.rig.ram import holes, page
from tests.rig.room import room
from tests.rig.stream import BLOCKS, DEVICES, PAGE, Content, Made

ABOVE = 10 * PAGE  # bytes; two blocks of the rig are larger
LARGE = [name for name, count in BLOCKS.items() if count * PAGE > ABOVE]
TIGHT = 4400  # bytes of a window that has room for one record
Record = tuple[str, int, Content]


def _records(seed: int, count: int) -> list[Record]:
    """Runs of records of one kind and single ones, pages in order and not, again and again."""
    dice, found = random.Random(seed), list[Record]()
    while len(found) < count:
        block = dice.choice([*BLOCKS, "pc.ram", "pc.ram"])
        pages = BLOCKS[block]
        first, length = dice.randrange(pages), dice.choice([1, 1, 2, 5, 40, 100])
        kinds = [dice.choice(["zero", "full", "content", "zeros", "mixed"])] * length
        step = dice.choice([1, 1, 1, 3, -1, 0])
        for at, kind in enumerate(kinds):
            now = dice.choice(["zero", "full", "content"]) if kind == "mixed" else kind
            number = (first + at * step) % pages
            held: dict[str, Content] = {
                "zero": 0,
                "full": dice.randrange(1, 256),
                "content": page((seed, len(found) % 50)),
                "zeros": bytes(PAGE),
            }
            found.append((block, number, held[now]))
    return found


def _made(seed: int, passes: int, count: int, *, ended: bool, named: bool, late: bool) -> Made:
    made = Made()
    made.begin(uuid=not named)
    for at in range(passes):
        made.section(_records(seed + at, count), named=named)
    if late:
        made.switchover()
    if ended:
        made.section(_records(seed - 1, count // 2), end=True)
    made.finish()
    return made


def _source(raw: bytes, folder: Path) -> Path:
    path = folder / "whole"
    path.write_bytes(raw)
    return path


def _apart(raw: bytes, folder: Path, **how: object) -> Split:
    fd = os.open(_source(raw, folder.parent), os.O_RDWR)
    folder.mkdir(exist_ok=True)
    try:
        return split(fd, folder, above=ABOVE, **how)  # type: ignore[arg-type]
    finally:
        os.close(fd)


def _joined(parts: Split, to: Path) -> bytes:
    with to.open("wb") as file:
        images = {image.block: image.path for image in parts.images}
        assert join(parts.stream, images, file.fileno()) == file.tell()
    return to.read_bytes()


def _same(made: Made, parts: Split) -> None:
    """Images, small stream and what is told of both are what *made* says."""
    large = [name for name, count in made.blocks.items() if count * PAGE > ABOVE]
    assert [image.block for image in parts.images] == large
    for number, image in enumerate(parts.images):
        assert image.path.name == f"{number}.pages"
        assert image.path.read_bytes() == made.block(image.block), image.block
        stored = made.stored(image.block)
        assert image.stored_pages == len(stored)
        assert holes(image.path) == set(range(made.blocks[image.block])) - stored
    whole, small = rig.read(bytes(made.raw)), rig.read(parts.stream.read_bytes())
    last = [kind for kind in whole.kinds[-2:] if kind == 3]
    assert small.kinds == [2, *[8 for kind in whole.kinds if kind == 8], *last]
    assert (small.head, small.tail) == (whole.head, whole.tail)
    assert small.pages == {at: held for at, held in whole.pages.items() if at[0] not in large}
    assert len(small.records) == len(small.pages)
    contents = parts.contents
    assert (contents.machine, contents.bytes) == ("pc-q35-7.2", len(made.raw))
    assert contents.ram_bytes == made.tail - len(whole.head)
    assert contents.ended == bool(last)
    assert [(block.name, block.bytes) for block in contents.blocks] == [
        (name, count * PAGE) for name, count in made.blocks.items()
    ]
    for block in contents.blocks:
        assert block.stored_pages == len(made.stored(block.name))
        assert block.stored_pages + block.zero_pages == made.blocks[block.name]
    assert contents.sections == tuple(
        Section(device.name, device.instance, 3, device.bytes) for device in DEVICES
    )


@given(
    some.integers(0, 1 << 30),
    some.integers(0, 4),
    some.integers(0, 250),
    some.tuples(some.booleans(), some.booleans(), some.booleans()),
    some.one_of(some.just(SIZE), some.integers(TIGHT, 6 * TIGHT), some.integers(TIGHT, 1 << 19)),
)
@example(1, 3, 600, (True, False, True), SIZE)
@example(2, 3, 600, (False, False, False), SIZE)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_a_stream_is_its_pages_and_comes_together_again(
    seed: int, passes: int, count: int, how: tuple[bool, bool, bool], window: int
) -> None:
    ended, named, late = how
    made = _made(seed, passes, count, ended=ended, named=named, late=late)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        parts = _apart(bytes(made.raw), home / "a", window_bytes=window, forget=bool(seed % 2))
        _same(made, parts)
        joined = _joined(parts, home / "joined")
        read = rig.read(joined)
        for block, pages in BLOCKS.items():
            sent = {at[1]: held for at, held in read.pages.items() if at[0] == block}
            if block in LARGE:
                assert sorted(sent) == list(range(pages))
                assert b"".join(sent[number] for number in range(pages)) == made.block(block)
        assert len(read.records) == len(read.pages)
        again = _apart(joined, home / "b", window_bytes=window)
        assert again.stream.read_bytes() == parts.stream.read_bytes()
        for one, other in zip(parts.images, again.images, strict=True):
            assert (one.block, one.stored_pages) == (other.block, other.stored_pages)
            assert one.path.read_bytes() == other.path.read_bytes()
            assert holes(one.path) == holes(other.path)
        assert _joined(again, home / "joined again") == joined


def test_a_window_may_end_anywhere(tmp_path: Path) -> None:
    made = rig.small()
    for window in range(TIGHT, TIGHT + PAGE + 64, 19):
        folder = tmp_path / str(window)
        parts = _apart(bytes(made.raw), folder, window_bytes=window)
        assert parts.images[0].path.read_bytes() == made.block("pc.ram")
        assert rig.read(parts.stream.read_bytes()).tail == bytes(made.raw[made.tail :])
        assert len(parts.contents.sections) == len(DEVICES)


def test_a_pipe_gives_what_a_file_gives(tmp_path: Path) -> None:
    made = _made(7, 2, 200, ended=True, named=False, late=False)
    dice = random.Random(1)

    def write(fd: int) -> None:
        left = memoryview(bytes(made.raw))
        with open(fd, "wb", buffering=0) as file:
            while left:
                left = left[file.write(left[: dice.choice([1, 7, 4104, 65536])]) :]

    for verb in ("split", "examine"):
        reading, writing = os.pipe()
        thread = threading.Thread(target=write, args=(writing,))
        thread.start()
        try:
            if verb == "split":
                parts = split(reading, tmp_path, above=ABOVE, window_bytes=3 * TIGHT, forget=False)
                _same(made, parts)
            else:
                assert examine(reading, window_bytes=3 * TIGHT) == parts.contents
        finally:
            os.close(reading)
            thread.join()
    assert examine(os.open(_source(bytes(made.raw), tmp_path), os.O_RDONLY)) == parts.contents


def _tried(raw: bytes, folder: Path | None = None) -> type[Exception] | None:
    """What becomes of *raw*; whatever is refused leaves nothing in *folder*."""
    fd = os.memfd_create("whole")
    try:
        os.write(fd, raw)
        if folder is None:
            examine(fd, window_bytes=1 << 16)
        else:
            split(fd, folder, above=ABOVE, window_bytes=1 << 16)
    except (StreamUnknown, DamagedData) as refused:
        assert folder is None or list(folder.iterdir()) == []
        return type(refused)
    finally:
        os.close(fd)
    return None


def test_what_is_cut_short_is_damaged(tmp_path: Path) -> None:
    made = rig.small()
    raw = bytes(made.raw)
    told = struct.unpack_from(">I", raw, raw.rindex(b'{"configuration"') - 4)[0]
    for length in (at for at in made.seams() if at > 0):
        # where all devices are there and what describes them is not, the stream is another one
        expected = StreamUnknown if length == len(raw) - told - 5 else DamagedData
        assert _tried(raw[:length], tmp_path if length % 7 == 0 else None) is expected, length
    assert _tried(b"", tmp_path) is DamagedData
    assert _tried(raw + b"}", tmp_path) is DamagedData


def test_no_byte_that_is_wrong_does_more_than_harm() -> None:
    made = rig.small()
    raw = bytearray(made.raw)
    met: dict[type[Exception] | None, int] = {}
    for at in made.seams():
        was = raw[at]
        for now in {was ^ 1, was ^ 0x80}:
            raw[at] = now
            end = _tried(bytes(raw))
            met[end] = met.get(end, 0) + 1
        raw[at] = was
    # most of them are what devices wrote of themselves, and of the JSON, and are nobody's business
    assert met.keys() == {None, StreamUnknown, DamagedData}
    assert met[DamagedData] > 500
    assert _tried(bytes(raw)) is None


@given(some.lists(some.tuples(some.integers(0, 1 << 20), some.integers(1, 255)), min_size=2))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_bytes_that_are_wrong_do_more_than_harm(flips: list[tuple[int, int]]) -> None:
    made = rig.small()
    raw, seams = bytearray(made.raw), made.seams()
    for at, flip in flips:
        raw[seams[at % len(seams)]] ^= flip
    with tempfile.TemporaryDirectory() as name:
        _tried(bytes(raw), Path(name))


def _finished(made: Made) -> bytes:
    """What `finish` would add."""
    other = Made(raw=bytearray(made.raw))
    return other.finish()[len(made.raw) :]


def _begun(**how: object) -> Made:
    made = Made({"pc.ram": 20, "rom": 2})
    made.begin(**how)  # type: ignore[arg-type]
    return made


def _flag(flag: int) -> Callable[[Made], None]:
    def put(made: Made) -> None:
        made.section([("pc.ram", 0, page(0))])
        made.raw += struct.pack(">BIQ", 2, rig.RAM, flag) + bytes(64)

    return put


def _after(*word: object) -> Callable[[Made], None]:
    def put(made: Made) -> None:
        made.section([("pc.ram", 0, page(0))])
        for part in word:
            made.raw += part if isinstance(part, bytes) else bytes(made.raw[: 9 if part else 0])

    return put


def _headed(name: bytes, kind: int) -> bytes:
    return struct.pack(">BIB", kind, 7, len(name)) + name + struct.pack(">II", 0, 1)


UNKNOWN = {
    "XBZRLE": (_flag(0x40), 5),
    "COMPRESS_PAGE": (_flag(0x100), 5),
    "HOOK": (_flag(0x80), 5),
    "MULTIFD_FLUSH": (_flag(0x200), 5),
    "bit 11": (_flag(0x800), 5),
    "a command 0x7 of 0 bytes": (_after(b"\x08\0\x07\0\0"), 0),
    "'block'": (_after(_headed(b"block", 1)), 0),
    "CONFIGURATION": (_after(b"\7"), 0),
    "SUBSECTION": (_after(b"\5"), 0),
    "of type 0x55": (_after(b"\x55"), 0),
}


@pytest.mark.parametrize("word", UNKNOWN)
def test_what_is_not_known_is_named_with_its_place(word: str, tmp_path: Path) -> None:
    put, behind = UNKNOWN[word]
    made, known = _begun(), _begun()
    put(made)
    known.section([("pc.ram", 0, page(0))])
    with pytest.raises(StreamUnknown) as refused:
        _apart(bytes(made.raw) + bytes(99), tmp_path / "a")
    assert word in str(refused.value)
    assert f" at {len(known.raw) + behind} " in f"{refused.value} "


def test_an_early_device_and_a_late_section_are_named(tmp_path: Path) -> None:
    made = _begun()
    raw = bytes(made.raw)
    at = raw.index(b"\1" + struct.pack(">IB", rig.RAM, 3) + b"ram")
    for word, early in {
        "'dirty-bitmap'": _headed(b"dirty-bitmap", 1),
        "'pci/early'": _headed(b"pci/early", 4),
        "'configuration/new'": b"\5\x11configuration/new\0\0\0\1",
        "xbzrle": b"\5\x1aconfiguration/capabilities\0\0\0\1\0\0\0\1\6xbzrle",
        "16384": b"\5\x1econfiguration/target-page-bits\0\0\0\1\0\0\0\x0e",
    }.items():
        with pytest.raises(StreamUnknown, match=word):
            _apart(raw[:at] + early + raw[at:] + bytes(99), tmp_path / "a")
    made.section([("pc.ram", 0, page(0))], end=True)
    for at in range(2):  # behind the RAM, and behind a device
        began = len(made.raw) + at * len(DEVICES[0].written(3))
        raw = bytearray(made.raw + _finished(made))
        raw[began] = 1
        with pytest.raises(StreamUnknown, match=rf"(?i)(timer|SECTION_START|vga).* at {began} "):
            _apart(bytes(raw), tmp_path / "a")


@pytest.mark.parametrize("records", [[("rom", 2, 0)], [("rom", 1, 0), ("pc.ram", 20, page(0))]])
def test_a_page_outside_of_its_block_is_damage(records: list[Record], tmp_path: Path) -> None:
    made = _begun()
    made.section(records)
    made.finish()
    with pytest.raises(DamagedData, match="outside of its block"):
        _apart(bytes(made.raw), tmp_path / "a")


def test_a_block_larger_than_any_memory_is_damage(tmp_path: Path) -> None:
    made = Made({"pc.ram": 1 << 50})
    made.begin()
    made.finish()
    with pytest.raises(DamagedData, match=r"pc\.ram"):
        _apart(bytes(made.raw), tmp_path / "a")


@pytest.mark.parametrize(
    "told",
    [
        {"size": -1},
        {"size": 1 << 70},
        {"instance_id": -1},
        {"instance_id": 1 << 33},
        {"name": "é" * 200},
        {"name": "t" * 300},
        {"name": None},
    ],
    ids=str,
)
def test_a_description_of_what_cannot_be_is_damage(told: dict[str, object], tmp_path: Path) -> None:
    made = _begun()
    made.section([("pc.ram", 0, page(0))], end=True)
    raw = made.finish()
    at = raw.rindex(b'{"configuration"')
    text = json.loads(raw[at:])
    first = text["devices"][0]
    first |= {key: told[key] for key in told if key in first}
    first["fields"][0] |= {key: told[key] for key in told if key not in first}
    new = json.dumps(text, ensure_ascii=False).encode()
    with pytest.raises(DamagedData):
        _apart(raw[: at - 4] + struct.pack(">I", len(new)) + new, tmp_path / "a")


def test_a_machine_without_devices(tmp_path: Path) -> None:
    made = _begun()
    made.section([("pc.ram", 3, page(3))], end=True)
    raw = made.finish([])
    assert _apart(raw, tmp_path / "a").contents.sections == ()


def test_an_unknown_stream_is_not_forgotten(tmp_path: Path) -> None:
    made = _begun()
    for _ in range(8):
        made.section([("pc.ram", number, page(number)) for number in range(20)])
    whole = bytes(made.raw)
    raw = whole + b"\x08\0\x07\0\0" + bytes(1 << 16)
    path = _source(raw, tmp_path)
    took = path.stat().st_blocks
    with pytest.raises(StreamUnknown):
        _apart(raw, tmp_path / "a", forget=True, window_bytes=2 * TIGHT)
    assert path.read_bytes() == raw
    assert path.stat().st_blocks == took
    sound = bytes(_made(3, 3, 200, ended=True, named=False, late=False).raw)
    for forget in (False, True):
        _apart(sound, tmp_path / str(forget), forget=forget, window_bytes=2 * TIGHT)
        kept = path.stat().st_blocks * 512
        assert kept < 4 * PAGE if forget else kept >= len(sound)


def test_what_has_no_holes_gets_none(tmp_path: Path) -> None:
    made = _made(5, 3, 300, ended=True, named=False, late=False)

    def make(sizes: Sequence[int]) -> list[Path]:
        paths = [tmp_path / f"{number}.pages" for number in range(len(sizes))]
        for path, size in zip(paths, sizes, strict=True):
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        return paths

    parts = _apart(bytes(made.raw), tmp_path / "a", make=make)
    took = [holes(image.path) for image in _apart(bytes(made.raw), tmp_path / "b").images]
    assert all(took)
    for number, image in enumerate(parts.images):
        assert image.path == tmp_path / f"{number}.pages"
        assert image.path.read_bytes() == made.block(image.block)
        assert image.path.stat().st_blocks * 512 >= image.bytes
        image.path.unlink()
    with pytest.raises(StreamUnknown):
        _apart(bytes(_begun().raw) + b"\x08\0\x07\0\0", tmp_path / "c", make=make)
    assert list(tmp_path.glob("*.pages")) == []


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that holds 1 MiB."""
    with room(tmp_path / "small", "1M") as root:
        yield root


@pytest.mark.parametrize("kind", ["images", "small blocks", "devices"])
def test_a_full_disk_leaves_nothing_behind(mounted: Path, tmp_path: Path, kind: str) -> None:
    blocks = {"images": {"pc.ram": 400}, "small blocks": {"a": 400}, "devices": {"a": 1}}[kind]
    made = Made(blocks)
    made.begin()
    name, count = next(iter(blocks.items()))
    made.section([(name, number, page(number)) for number in range(count)])
    large = rig.Device("big", 0, b"d" * (2 << 20), ((2 << 20, 1),))
    raw = made.finish([large] if kind == "devices" else DEVICES)
    fd = os.open(_source(raw, tmp_path), os.O_RDONLY)
    above = (1 << 10) * PAGE if kind == "small blocks" else ABOVE
    with pytest.raises(LocalFailed, match="No space left"):
        split(fd, mounted, above=above)
    os.close(fd)
    assert list(mounted.iterdir()) == []
    found = os.statvfs(mounted)
    assert found.f_bfree == found.f_blocks


def test_a_full_disk_ends_a_join(tmp_path: Path) -> None:
    parts = _apart(bytes(rig.small().raw), tmp_path / "a")
    images = {image.block: image.path for image in parts.images}
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(LocalFailed, match="No space"):
        join(parts.stream, images, full)
    os.close(full)


def test_a_join_of_what_does_not_fit_writes_nothing(tmp_path: Path) -> None:
    parts = _apart(bytes(rig.small().raw), tmp_path / "a")
    image, other = parts.images[0].path, tmp_path / "other"
    other.write_bytes(image.read_bytes()[:-PAGE])
    cut = tmp_path / "cut"
    cut.write_bytes(parts.stream.read_bytes()[:-1])
    wrong: Sequence[tuple[Path, dict[str, Path], type[Exception]]] = [
        (parts.stream, {"pc.ram": other}, DamagedData),
        (parts.stream, {"pc.rom": image}, DamagedData),
        (parts.stream, {"pc.ram": tmp_path / "none"}, LocalFailed),
        (cut, {"pc.ram": image}, DamagedData),
        (tmp_path / "none", {}, LocalFailed),
    ]
    for stream, images, kind in wrong:
        with (tmp_path / "out").open("wb") as out:
            with pytest.raises(kind):
                join(stream, images, out.fileno())
            assert out.tell() == 0


def test_progress_and_an_end_on_request(tmp_path: Path) -> None:
    raw = bytes(_made(5, 2, 200, ended=True, named=False, late=True).raw)
    told: list[tuple[int, int]] = []
    how = {"window_bytes": 3 * TIGHT, "on_progress": lambda *now: told.append(now)}
    parts = _apart(raw, tmp_path / "a", **how)
    assert told == sorted(told)
    assert told[-1] == (len(raw), len(raw))
    asked = iter([False] * 5)
    with pytest.raises(Cancelled):
        _apart(raw, tmp_path / "b", cancelled=lambda: next(asked, True), window_bytes=3 * TIGHT)
    assert list((tmp_path / "b").iterdir()) == []
    told.clear()
    with (tmp_path / "out").open("wb") as out:
        images = {image.block: image.path for image in parts.images}
        join(parts.stream, images, out.fileno(), on_progress=lambda *now: told.append(now))
    total = sum(image.bytes for image in parts.images)
    assert told == sorted(told)
    assert told[-1] == (total, total)


def test_nothing_that_is_there_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    theirs = tmp_path / "a" / "stream"
    theirs.write_text("theirs")
    with pytest.raises(LocalFailed, match="exists"):
        _apart(bytes(rig.small().raw), tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["stream"]
    assert theirs.read_text() == "theirs"
