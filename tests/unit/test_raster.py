"""The picture as PNG: read back dot by dot."""

from __future__ import annotations

import string
import struct
import zlib

from qmpsnap.cli import glyphs
from qmpsnap.cli.picture import PAPER, RULE, Box, Dot, Picture, Rule, Trace, Words, drawn
from qmpsnap.cli.raster import png

RED, WHITE = (255, 0, 0), (255, 255, 255)
Colour = tuple[int, int, int]


def read(content: bytes) -> list[list[Colour]]:
    """The dots of a PNG of 24 bits without filters; each check sum is looked at."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        check = content[at + 8 + length : at + 12 + length]
        assert check == struct.pack(">I", zlib.crc32(kind + body))
        chunks[kind] = body
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 2, 0, 0, 0]
    data, found = zlib.decompress(chunks[b"IDAT"]), []
    assert len(data) == height * (1 + 3 * width)
    for row in range(height):
        start = row * (1 + 3 * width)
        assert data[start] == 0
        one = data[start + 1 : start + 1 + 3 * width]
        found.append([(one[x], one[x + 1], one[x + 2]) for x in range(0, len(one), 3)])
    return found


def dots(*marks: object, width: int = 20, height: int = 10) -> dict[tuple[int, int], Colour]:
    """Column and row of what is not white."""
    rows = read(png(Picture(width, height, list(marks))))  # type: ignore[arg-type]
    assert (len(rows), len(rows[0])) == (height * 2, width * 2)
    return {(x, y): one for y, row in enumerate(rows) for x, one in enumerate(row) if one != WHITE}


def test_an_empty_one() -> None:
    assert dots() == {}
    assert PAPER == "#ffffff"


def test_a_box_and_a_rule() -> None:
    found = dots(Box(2, 1, 3, 2, "#ff0000"))
    assert found == {(x, y): RED for x in range(4, 10) for y in range(2, 6)}
    grey = int(RULE[1:3], 16)
    assert dots(Rule(5, 10, 4)) == {(x, y): (grey,) * 3 for x in range(10, 20) for y in (7, 8)}
    assert dots(Box(-5, -5, 1000, 1000, "#ff0000"))[(39, 19)] == RED  # what is outside is cut off


def test_a_line_goes_from_end_to_end() -> None:
    for points in (((2, 2), (18, 8)), ((18, 8), (2, 2)), ((3, 1), (3, 9)), ((2, 5), (18, 5))):
        found = dots(Trace(points, "#ff0000"))
        for part in range(11):
            x, y = (a + (b - a) * part / 10 for a, b in zip(*points, strict=True))
            red, green, _ = found[(round(x * 2), round(y * 2))]
            assert red == 255
            assert green < 160  # its edges are soft
        assert len(found) < 6 * 40


def test_a_dot_is_round() -> None:
    found = dots(Dot((10, 5), "#ff0000"))
    assert found[(20, 10)] == RED
    assert {x for x, _ in found} == set(range(15, 26))
    assert (16, 6) not in found
    assert (15, 10) in found


def test_letters() -> None:
    found = dots(Words(1, 9, "i."))
    letter = {(x, y) for x, y in glyphs.dots("i")}
    assert {(x // 2 - 1, y // 2 - 2) for x, y in found if x < 14} == letter
    bold = dots(Words(1, 9, "i.", bold=True))
    assert set(found) < set(bold)


def test_every_letter_that_a_picture_needs() -> None:
    needed = string.ascii_letters + string.digits + "._-:/% ,"  # names of VMs, moments, units
    box = glyphs.dots("\N{SNOWMAN}")
    shapes = [glyphs.dots(one) for one in needed]
    assert box not in shapes
    assert len(set(shapes)) == len(needed)
    assert all(0 <= x < 5 and 0 <= y < 9 for shape in shapes for x, y in shape)
    texts = "".join(mark.text for mark in drawn("web", []).marks if isinstance(mark, Words))
    assert set(texts) <= set(needed)
