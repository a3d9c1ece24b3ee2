"""The smallest input that still shows a fault: the only place that takes inputs apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

_TRIES = 2000


def smallest(given: Any, fails: Callable[[Any], bool]) -> Any:
    """What is left of *given* when nothing more can be taken away without that it *fails* not."""
    tries = 0
    again = True
    while again and tries < _TRIES:
        again = False
        for one in _smaller(given):
            tries += 1
            if tries > _TRIES:
                break
            if one != given and fails(one):
                given, again = one, True
                break
    return given


def _smaller(value: Any) -> Iterator[Any]:
    match value:
        case bytes() | str():
            length = len(value)
            step = length
            while step >= 1:
                for at in range(0, length, step):
                    yield value[:at] + value[at + step :]
                if length // step > 64:
                    return
                step //= 2
        case tuple():
            for one in _smaller(list(value)):
                yield tuple(one)
        case dict():
            for key in value:
                yield {name: one for name, one in value.items() if name != key}
            for key in value:
                for one in _smaller(value[key]):
                    yield {**value, key: one}
        case list():
            if len(value) > 8:
                yield value[: len(value) // 2]
                yield value[len(value) // 2 :]
            for at in range(len(value)):
                yield value[:at] + value[at + 1 :]
            for at in range(len(value)):
                for one in _smaller(value[at]):
                    yield [*value[:at], one, *value[at + 1 :]]
