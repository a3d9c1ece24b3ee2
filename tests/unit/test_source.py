"""The end of a postcopy migration comes after all pages, also those that somebody waits for."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from qmpsnap.hypervisor.vmstate.feed import Feed
from qmpsnap.hypervisor.vmstate.handover import Handover
from qmpsnap.hypervisor.vmstate.records import END, PAGE, PART
from qmpsnap.hypervisor.vmstate.source import speaking
from qmpsnap.hypervisor.vmstate.stream import Opening

_BLOCK = "m0"


class Slow(Feed):
    """Its answers are held back once their pages count as sent, as by a disk that reads slowly."""

    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(*arguments, **named)  # type: ignore[arg-type]
        self.taken, self.go = asyncio.Event(), asyncio.Event()

    async def _written(self, made: bytes, count: int) -> None:
        if count == 1:
            self.taken.set()
            await self.go.wait()
        await super()._written(made, count)


class Here:
    def __init__(self, image: Path) -> None:
        self.images = {_BLOCK: image}

    async def ready(self, block: str, start: int, length: int) -> None:
        pass


async def test_the_end_waits_for_answers(tmp_path: Path) -> None:
    large = {_BLOCK: 64 * PAGE}
    image = tmp_path / "0.pages"
    image.write_bytes(b"x" * large[_BLOCK])
    plan = Handover(tmp_path, Opening(b"", "pc", 3, ((_BLOCK, 64 * PAGE),)), large, (0, 0), (0, 0))
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)  # nobody reads before the end
    with ours, theirs, Slow(ours, 3, large, Here(image)) as feed:
        async with speaking(ours, plan, feed) as source:
            request = (5 * PAGE).to_bytes(8, "big") + PAGE.to_bytes(4, "big") + b"\2m0"
            theirs.send(b"\0\3\0\x0f" + request)
            async with asyncio.TaskGroup() as group:
                listening = group.create_task(source.listen(group))
                await feed.taken.wait()
                sending = group.create_task(source.sent())
                while feed.done < 63 * PAGE:
                    await asyncio.wait([sending], timeout=0.01)
                assert not sending.done()
                feed.go.set()
                await sending
                theirs.send(b"\0\1\0\4\0\0\0\0")
                await listening
        said = b""
        ours.shutdown(socket.SHUT_WR)
        while data := theirs.recv(1 << 20):
            said += data
    assert said.endswith(plan.end())
    assert said.count(b"x" * PAGE) == 64
    assert plan.end()[0] == END
    assert said[0] == PART
