"""How an input is spoilt: the only place that makes odd trees, texts and bytes out of good ones.

All of it comes from the dice that are handed in: the same seed gives the same input.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

INF = float("inf")
TEXTS = (
    "", " ", "\0", "a\0b", "\n", "a\nb", "\x1b[31m", "\u202e", "\u2028", "\ud800", "\udcff", "é",
    "١٢", "²", "..", ".", "/", "//", "../../x", "/etc/passwd", "~", "~nobody-at-all/x", "%s", "{}",
    "json:", "json:{", "json:[]", 'json:{"file":{"file":[]}}', "-", "--", "-1", "0", "1e999", "nan",
    "inf", "0x10", "9" * 30, "9" * 5000, "1" * 400, "a" * 300, "ä" * 70000, "true", "null", "on",
    "20261122T165057123Z", "20261340T995999999Z", "99991230T235959999Z", "99991231T235959999Z",
    "00010101T000000000Z",
    "2026-11-22T16:50:57.123Z", "9999-12-31T23:59:59Z", "2026-W01Z", "ab" * 32, "AB" * 32, ":",
    "::", "=", ",", ",,", "[", "]", '"', "'", "\\", "#", "#block123", "qmpsnap:web:vda:x", "N0=1",
    "child<", "child<x>", "link<", "link<x>", "/machine", "/objects/m0", "$refused",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 7, 255, 256, 4095, 4096, 65535, 65536, 1 << 31, -(1 << 31), (1 << 32) - 1, 1 << 32,
    (1 << 62), (1 << 63) - 1, 1 << 63, -(1 << 63), (1 << 64) - 1, 1 << 64, -(1 << 64), 10**30,
    10**400, 0.5, -0.0, 1e308, -1e308, 1e-320, INF, -INF,
)  # fmt: skip
WORDS = (b"\0", b"\n", b"\r\n", b"\xff", b"\xff\xff\xff\xff", b"{", b"}", b"[", b"]", b'"', b"\\",
         b"\\u0000", b"\\ud800", b"\xed\xa0\x80", b"\xc3", b"\xef\xbb\xbf", b"9" * 40, b"1e999",
         b"9" * 5000, b"-", b":", b",", b"null", b"[" * 3000, b'{"a":' * 3000, b" " * 5000,
         b"NaN", b"Infinity", b"\x80", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff")  # fmt: skip
DEEP = 2000
_LONGEST = 1 << 20  # bytes: whoever reads a file of ours reads no more, or not much


def tree(dice: Random, seed: Any) -> Any:
    """*seed* with one to three changes; what is not changed is shared with it."""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        path = _place(dice, seed)
        seed = _changed(seed, path, dice, seed)
    return seed


def text(dice: Random, seed: str, words: Sequence[str] = TEXTS) -> str:
    """*seed* with one to three changes; *words* are thrown in."""
    for _ in range(dice.choice((1, 1, 2, 3))):
        at, end = sorted((dice.randint(0, len(seed)), dice.randint(0, len(seed))))
        if dice.random() < 0.7:
            end = min(end, at + dice.randint(0, 4))
        match dice.randrange(6):
            case 0:
                seed = seed[:at] + seed[end:]
            case 1:
                seed = seed[:at]
            case 2:
                seed = seed[:end] + seed[at:end] * dice.randint(1, 3) + seed[end:]
            case 3:
                seed = seed[:at] + chr(dice.choice((dice.randrange(128), dice.randrange(65536))))
                seed += seed[end:]
            case _:
                seed = seed[:at] + dice.choice(words) + seed[end:]
    return seed[: 1 << 17]


def content(dice: Random, seed: bytes, *, json_too: bool = False) -> bytes:
    """*seed* with some changes; with *json_too* half of them are of what it says."""
    if json_too and dice.random() < 0.6:
        try:
            return dumped(dice, tree(dice, json.loads(seed)))[:_LONGEST]
        except (ValueError, RecursionError):
            pass
    for _ in range(dice.choice((1, 1, 2, 4))):
        at, end = sorted((dice.randint(0, len(seed)), dice.randint(0, len(seed))))
        if dice.random() < 0.7:
            end = min(end, at + dice.randint(0, 8))
        match dice.randrange(7):
            case 0:
                seed = seed[:at] + seed[end:]
            case 1:
                seed = seed[:at]
            case 2:
                seed = seed[:end] + seed[at:end] * dice.randint(1, 3) + seed[end:]
            case 3 if seed:
                at = min(at, len(seed) - 1)
                seed = seed[:at] + bytes([seed[at] ^ 1 << dice.randrange(8)]) + seed[at + 1 :]
            case 4 if seed:
                seed = seed[:at] + dice.randbytes(dice.choice((1, 2, 4, 8))) + seed[at + 4 :]
            case _:
                seed = seed[:at] + dice.choice(WORDS) + seed[end:]
    return seed[: 1 << 18]


def dumped(dice: Random, value: Any) -> bytes:
    """*value* as JSON, as some program or other might write it."""
    said = json.dumps(value, ensure_ascii=dice.random() < 0.5)
    return said.encode(errors="surrogatepass")


def _place(dice: Random, value: Any) -> list[Any]:
    """The keys that lead to some part of *value*, deep ones as likely as shallow ones."""
    path: list[Any] = []
    while isinstance(value, dict | list) and value and dice.random() < 0.85:
        key = dice.choice(list(value)) if isinstance(value, dict) else dice.randrange(len(value))
        path.append(key)
        value = value[key]
    return path


def _at(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def _changed(value: Any, path: Sequence[Any], dice: Random, whole: Any) -> Any:
    if not path:
        return _instead(value, dice, whole)
    key, *rest = path
    if isinstance(value, dict):
        copy: Any = dict(value)
        if not rest and (odds := dice.random()) < 0.3:
            old = copy.pop(key)
            if odds < 0.05:
                copy[dice.choice(TEXTS)] = old
            return copy
    else:
        copy = list(value)
        if not rest and (odds := dice.random()) < 0.2:
            if odds < 0.1:
                del copy[key]
            else:
                copy[key:key] = [copy[key]] * dice.choice((1, 2, 100))
            return copy
    copy[key] = _changed(value[key], rest, dice, whole)
    return copy


def _instead(value: Any, dice: Random, whole: Any) -> Any:
    match dice.randrange(12):
        case 0:
            return None
        case 1:
            return dice.choice((True, False))
        case 2 | 3:
            return dice.choice(NUMBERS)
        case 4 | 5:
            return dice.choice(TEXTS)
        case 6:
            return dice.choice(([], {}, [[]], [{}], {"": None}, [None], [0], [""]))
        case 7:
            return [value]
        case 8:
            return {"x": value}
        case 9 if dice.random() < 0.2:
            return _deep(dice)
        case 10:
            return _at(whole, _place(dice, whole))
    match value:
        case str():
            return text(dice, value)
        case bool() | None:
            return dice.choice(NUMBERS)
        case int() | float():
            return dice.choice((value + 1, value - 1, -value, value * 2, value * (1 << 40)))
    return dice.choice(TEXTS)


def _deep(dice: Random) -> Any:
    value: Any = 0
    if dice.random() < 0.5:
        for _ in range(dice.choice((200, DEEP))):
            value = [value]
    else:
        for _ in range(dice.choice((200, DEEP))):
            value = {"a": value}
    return value
