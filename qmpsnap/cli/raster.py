"""A picture as PNG: the only place that turns marks into dots."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable
from itertools import pairwise

from qmpsnap.cli import glyphs
from qmpsnap.cli.picture import INK, PAPER, RULE, Box, Dot, Picture, Rule, Trace, Words

_SCALE = 2  # dots a unit: sharp on screens that have more dots than they say
_LETTER = 2  # dots a dot of a letter
_RADIUS = 2.5
_WIDTH = 1.0


def png(picture: Picture) -> bytes:
    """*picture* in 24 bits of colour (PNG, third edition: W3C 2025)."""
    canvas = _Canvas(picture.width * _SCALE, picture.height * _SCALE)
    for mark in picture.marks:
        match mark:
            case Words():
                canvas.write(mark)
            case Box():
                canvas.fill(mark.x, mark.y, mark.width, mark.height, mark.colour)
            case Rule():
                canvas.fill(mark.left, mark.y - 0.5, mark.right - mark.left, 1, RULE)
            case Dot():
                canvas.line((mark.at, mark.at), mark.colour, _RADIUS * 2)
            case Trace():
                canvas.line(mark.points, mark.colour, _WIDTH)
    return canvas.encoded()


class _Canvas:
    """Rows of dots, three bytes each. What is drawn is told in units, as `Picture` has them."""

    def __init__(self, width: int, height: int) -> None:
        self._width, self._height = width, height
        self._rows = [bytearray(_colour(PAPER) * width) for _ in range(height)]

    def fill(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        left, right = (min(max(0, round(at * _SCALE)), self._width) for at in (x, x + width))
        top, bottom = (min(max(0, round(at * _SCALE)), self._height) for at in (y, y + height))
        for row in self._rows[top:bottom]:
            row[left * 3 : right * 3] = _colour(colour) * (right - left)

    def write(self, words: Words) -> None:
        left, top = round(words.x * _SCALE), round(words.y * _SCALE) - glyphs.BASE * _LETTER
        for letter in words.text:
            for column, row in glyphs.dots(letter):
                for x in range(_LETTER + words.bold):
                    for y in range(_LETTER):
                        self._blend(left + column * _LETTER + x, top + row * _LETTER + y, INK, 1.0)
            left += (glyphs.WIDTH + 1) * _LETTER

    def line(self, points: Iterable[tuple[float, float]], colour: str, width: float) -> None:
        """Through *points*, with round ends and soft edges."""
        several = [(x * _SCALE, y * _SCALE) for x, y in points]
        for start, end in pairwise(several):
            self._segment(start, end, colour, width * _SCALE / 2)

    def _segment(
        self, start: tuple[float, float], end: tuple[float, float], colour: str, half: float
    ) -> None:
        (x1, y1), (x2, y2) = sorted((start, end))
        across, down = x2 - x1, y2 - y1
        length = math.hypot(across, down)
        # how far above and below its middle the line reaches in one column
        reach = (half + 1) * (length / across if across else math.inf)
        for x in range(math.floor(x1 - half - 1), math.ceil(x2 + half + 1) + 1):
            along = min(max(0.0, (x - x1) / across), 1.0) if across else 0.0
            middle = y1 + along * down
            top = max(middle - reach, min(y1, y2) - half - 1)
            bottom = min(middle + reach, max(y1, y2) + half + 1)
            for y in range(math.floor(top), math.ceil(bottom) + 1):
                part = ((x - x1) * across + (y - y1) * down) / length**2 if length else 0.0
                part = min(max(0.0, part), 1.0)
                away = math.hypot(x - x1 - part * across, y - y1 - part * down)
                self._blend(x, y, colour, min(max(0.0, half + 0.5 - away), 1.0))

    def _blend(self, x: int, y: int, colour: str, share: float) -> None:
        if not share or not (0 <= x < self._width and 0 <= y < self._height):
            return
        row, at = self._rows[y], x * 3
        for channel, value in enumerate(_colour(colour)):
            row[at + channel] += round((value - row[at + channel]) * share)

    def encoded(self) -> bytes:
        header = struct.pack(">IIBBBBB", self._width, self._height, 8, 2, 0, 0, 0)
        # each row says first how it was filtered: not at all
        packed = zlib.compress(b"".join(b"\0" + row for row in self._rows), 9)
        chunks = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*one) for one in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def _colour(spelled: str) -> bytes:
    return bytes.fromhex(spelled.removeprefix("#"))
