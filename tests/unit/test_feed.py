"""Pages are sent once each, those that somebody waits for first, whatever the others wait for."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qmpsnap.errors import LocalFailed
from qmpsnap.hypervisor.vmstate import records
from qmpsnap.hypervisor.vmstate.feed import Feed
from qmpsnap.hypervisor.vmstate.records import PAGE

_RAM = 7
_LARGE = {"pc.ram": 1200 * PAGE, "m0": 100 * PAGE}


class Gated:
    """Images of which nothing is there from the page *slow* of pc.ram on, until *open*."""

    def __init__(self, images: dict[str, Path], slow: int) -> None:
        self.images, self.slow, self.open = images, slow, asyncio.Event()
        self._come = asyncio.Semaphore(0)

    async def ready(self, block: str, start: int, length: int) -> None:
        if block == "pc.ram" and start + length > self.slow * PAGE:
            self._come.release()
            await self.open.wait()

    async def waiting(self, count: int) -> None:
        """Until so many have come here for what is not there."""
        for _ in range(count):
            await self._come.acquire()


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    """Every third page has content, and so have those from the 600th to the 800th; else holes."""
    found = {}
    for number, (block, size) in enumerate(_LARGE.items()):
        found[block] = tmp_path / f"{number}.pages"
        with found[block].open("wb") as file:
            file.truncate(size)
            for page in range(size // PAGE):
                if page % 3 == 0 or 600 <= page < 800:
                    file.seek(page * PAGE + 4000)
                    file.write(b"%d" % (page + 1))
    return found


def _said(data: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Block, page and content of each record in *data*, a plain reader of its own."""
    at, block = 0, ""

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        assert at <= len(data)
        return data[at - count : at]

    while at < len(data):
        assert take(5) == bytes([records.PART]) + _RAM.to_bytes(4, "big")
        first = True
        while (head := int.from_bytes(take(8), "big")) != records.EOS:
            flags = head % PAGE
            if not flags & records.CONTINUE:
                block = take(take(1)[0]).decode()
            assert block
            assert not (first and flags & records.CONTINUE)
            first = False
            if flags & records.ZERO:
                assert take(1) == b"\0"
                yield block, head // PAGE, bytes(PAGE)
            else:
                assert flags & ~records.CONTINUE == records.CONTENT
                yield block, head // PAGE, take(PAGE)
        assert take(5) == records.footer(_RAM)


async def _drained(wire: socket.socket, into: bytearray) -> None:
    wire.setblocking(False)
    while data := await asyncio.get_running_loop().sock_recv(wire, 1 << 20):
        into += data


async def test_each_page_goes_once_and_the_asked_ones_first(images: dict[str, Path]) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    pages, data, told = Gated(images, slow=912), bytearray(), list[tuple[int, int]]()
    with ours, theirs, Feed(ours, _RAM, _LARGE, pages, lambda *so_far: told.append(so_far)) as feed:
        reading = asyncio.ensure_future(_drained(theirs, data))
        bitmap = np.zeros(1200 // 8, np.uint8)
        bitmap[:2] = 0xFF, 0x01  # QEMU has nine pages already
        feed.has("pc.ram", bitmap.tobytes())
        late = asyncio.ensure_future(feed.answer("pc.ram", 1000 * PAGE, PAGE))
        await feed.answer("m0", 50 * PAGE, PAGE)
        await feed.answer("m0", 50 * PAGE, PAGE)  # QEMU asks again, when its thread was interrupted
        await feed.answer("/rom@x", 0, PAGE)
        pushing = asyncio.ensure_future(feed.push())
        await pages.waiting(2)  # the one that is not there, and those behind it in order
        await feed.answer("pc.ram", 899 * PAGE, PAGE)  # beside one that is not there
        assert not late.done()
        pages.open.set()
        await asyncio.gather(late, pushing)
        assert feed.asked == 5
        ours.shutdown(socket.SHUT_WR)
        await reading
    assert told[-1] == (1300 * PAGE, 1300 * PAGE)
    found = list(_said(bytes(data)))
    order = [(block, page) for block, page, _ in found]
    assert order[0] == ("m0", 50)
    assert sorted(order[1:16]) == [("m0", page) for page in range(48, 64) if page != 50]
    assert ("pc.ram", 899) in order[:-300]
    everything = {(block, page) for block, size in _LARGE.items() for page in range(size // PAGE)}
    assert len(order) == len(set(order))
    assert set(order) == everything - {("pc.ram", page) for page in range(9)}
    for block, page, content in found:
        with images[block].open("rb") as file:
            file.seek(page * PAGE)
            assert file.read(PAGE) == content


async def test_a_page_that_cannot_be_read_is_no_zero_page(images: dict[str, Path]) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    pages = Gated(images, slow=10000)
    with ours, theirs, Feed(ours, _RAM, _LARGE, pages) as feed:
        with images["m0"].open("r+b") as file:
            file.truncate(40 * PAGE)
            file.truncate(98 * PAGE + 1)
        with pytest.raises(LocalFailed, match="cut short"):
            await feed.answer("m0", 99 * PAGE, PAGE)
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
