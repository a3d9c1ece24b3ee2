"""The return path of a migration: what QEMU wants, and what no QEMU says."""

from __future__ import annotations

import asyncio

import pytest

from qmpsnap.errors import ReplyMalformed
from qmpsnap.hypervisor.vmstate.returnpath import (
    Acknowledged,
    Message,
    Pong,
    Received,
    ReturnPath,
    Shut,
    Wanted,
)

_BLOCKS = {"pc.ram": 4096 * 130, "m0": 4096 * 8}
_PAGES = (4096).to_bytes(8, "big") + (8192).to_bytes(4, "big")


def _message(kind: int, body: bytes) -> bytes:
    return kind.to_bytes(2, "big") + len(body).to_bytes(2, "big") + body


async def _read(*said: bytes) -> list[Message]:
    reader = asyncio.StreamReader()
    reader.feed_data(b"".join(said))
    reader.feed_eof()
    path, found = ReturnPath(reader, _BLOCKS), list[Message]()
    try:
        while True:
            found.append(await path.next())
    except EOFError:
        return found


async def test_messages_are_read_in_their_order() -> None:
    bitmap = bytes(range(24))
    whole = (24).to_bytes(8, "big") + bitmap + bytes.fromhex("0123456789abcdef")
    found = await _read(
        _message(2, b"\0\0\0\3"),
        _message(3, _PAGES + b"\6pc.ram"),
        _message(4, _PAGES),
        _message(3, _PAGES + b"\2m0"),
        _message(4, _PAGES),
        _message(5, b"\6pc.ram") + whole,
        _message(6, b"\0\0\0\1"),
        _message(1, b"\0\0\0\0"),
        _message(1, b"\0\0\0\1")[:-1],
    )
    ram, other = Wanted("pc.ram", 4096, 8192), Wanted("m0", 4096, 8192)
    received = Received("pc.ram", bitmap)
    assert found == [Pong(3), ram, ram, other, other, received, Acknowledged(), Shut(0)]


@pytest.mark.parametrize(
    "said",
    [
        _message(5, b""),
        _message(5, bytes(257)),
        _message(4, _PAGES),  # of no block yet
        _message(3, _PAGES + b"\2m1"),
        _message(3, _PAGES + b"\3m0"),
        _message(3, (4095).to_bytes(8, "big") + _PAGES[8:] + b"\2m0"),
        _message(3, (4096 * 7).to_bytes(8, "big") + _PAGES[8:] + b"\2m0"),
        _message(3, _PAGES[:8] + bytes(4) + b"\2m0"),
        _message(5, b"\6pc.ram") + (16).to_bytes(8, "big") + bytes(24),
        _message(5, b"\6pc.ram") + (1 << 40).to_bytes(8, "big"),
        _message(5, b"\6pc.ram") + (24).to_bytes(8, "big") + bytes(32),
        _message(9, b""),
        _message(2, b""),
        b"\0\2\xff\xff",
    ],
)
async def test_what_no_qemu_says_is_refused(said: bytes) -> None:
    with pytest.raises(ReplyMalformed):
        await _read(said)
