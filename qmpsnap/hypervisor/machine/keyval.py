"""The only place that knows QEMU's `key=value,...` syntax and the JSON that may stand for it."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from qmpsnap.errors import UNREADABLE, UsageError


class Bare(enum.Enum):
    """A key without a value: `server` for server=on, `nowait` for wait=off."""

    KEY = "bare"


class Empty(enum.Enum):
    """A JSON object or list with nothing in it."""

    OBJECT = "{}"
    LIST = "[]"


Scalar: TypeAlias = str | int | float | bool | Bare | Empty | None
Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
Pair: TypeAlias = tuple[str, Scalar]

_STRING = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'')
_QUOTES = {"\\'": "'", '"': '\\"'}
_TRUE = frozenset({"on", "yes", "true", "y"})


@dataclass(frozen=True, slots=True)
class Fields:
    """An option's value as an ordered list of dotted keys, whichever way it was written.

    `{"file": {"driver": "file"}}` and `file.driver=file` are both the pair `file.driver`. A key
    may come twice (hostfwd=); `get` gives the last one, as QEMU does.
    """

    pairs: tuple[Pair, ...] = ()
    json: bool = False

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def get(self, *keys: str) -> str | None:
        """The value of the last of *keys* as text, with `on`/`off` for booleans; None if unset."""
        for key, value in reversed(self.pairs):
            if key in keys:
                return None if value is None else spelled(value)
            if value is Bare.KEY and key.startswith("no") and key[2:] in keys:
                return "off"
        return None

    def on(self, key: str) -> bool:
        return (self.get(key) or "off").lower() in _TRUE

    def has(self, key: str) -> bool:
        """Whether *key*, or something below it, is set."""
        return any(name == key or name.startswith(f"{key}.") for name, _ in self.pairs)

    def below(self, key: str) -> Fields:
        """The pairs under `key.`, with that prefix taken away."""
        start = f"{key}."
        inner = tuple((name[len(start) :], v) for name, v in self.pairs if name.startswith(start))
        return replace(self, pairs=inner)

    def keep(self, wanted: Callable[[str], bool]) -> Fields:
        return replace(self, pairs=tuple(pair for pair in self.pairs if wanted(pair[0])))

    def without(self, *keys: str) -> Fields:
        """Without *keys* and all below them."""
        dropped = tuple(f"{key}." for key in keys)
        return self.keep(lambda name: name not in keys and not name.startswith(dropped))

    def set(self, key: str, value: Scalar) -> Fields:
        """*key* has *value*, at the place of its first occurrence or at the end."""
        at = next((i for i, (name, _) in enumerate(self.pairs) if name == key), len(self.pairs))
        rest = [pair for pair in self.pairs if pair[0] != key]
        return replace(self, pairs=(*rest[:at], (key, value), *rest[at:]))

    def default(self, key: str, value: Scalar) -> Fields:
        return self if self.has(key) else self.set(key, value)

    def merged(self, later: Fields) -> Fields:
        """These, overridden by *later* key by key."""
        out = self
        for key, value in later.pairs:
            out = out.set(key, value)
        return out


def parse(text: str, implied: str | None = None, *, json_too: bool = False) -> Fields:
    """What *text* says; its first word may leave out the key *implied*.

    With *json_too*, a text that begins with `{` is JSON, as QEMU has it for some options.

    Raises UsageError when the JSON is none, or no object.
    """
    if json_too and text.startswith("{"):
        return from_json(_object(text))
    pairs: list[Pair] = []
    for number, word in enumerate(_words(text)):
        key, equals, value = word.partition("=")
        if equals:
            pairs.append((key, _unescaped(value)))
        elif number == 0 and implied is not None:
            pairs.append((implied, _unescaped(word)))
        else:
            pairs.append((key, Bare.KEY))
    return Fields(tuple(pairs))


def format(fields: Fields, implied: str | None = None) -> str:
    """The text that says *fields*; it begins with the value of *implied*, if that comes first."""
    if fields.json:
        return json.dumps(nested(fields), separators=(",", ":"), ensure_ascii=False)
    words = []
    for number, (key, value) in enumerate(fields.pairs):
        if value is Bare.KEY and (number or implied is None):
            words.append(key)
            continue
        if value is Bare.KEY:  # as the first word it would be taken for the value of *implied*
            words.append(f"{key[2:]}=off" if key.startswith("no") else f"{key}=on")
            continue
        text = spelled(value).replace(",", ",,")
        # an `=` in the value would be taken for the one behind a key
        short = number == 0 and key == implied and text and "=" not in text
        words.append(text if short else f"{key}={text}")
    return ",".join(words)


def nested(fields: Fields) -> dict[str, Json]:
    """*fields* as JSON: dots open objects, and an object keyed 0, 1, 2... is a list."""
    tree: dict[str, Json] = {}
    for key, value in fields.pairs:
        *above, last = key.split(".")
        here = tree
        for step in above:
            inner = here.setdefault(step, {})
            if not isinstance(inner, dict):
                raise UsageError(f"{key}: {step} is both a value and an object")
            here = inner
        here[last] = _json_of(value)
    return {key: _lists(value) for key, value in tree.items()}


def from_json(tree: dict[str, Json]) -> Fields:
    """The fields of a JSON object; `nested` gives it back."""
    return Fields(tuple(_flat("", tree)), json=True)


def spelled(value: Scalar) -> str:
    """A value as QEMU's keyval syntax has it."""
    match value:
        case bool():
            return "on" if value else "off"
        case Bare.KEY:
            return "on"
        case None | Empty():
            return ""
        case _:
            return str(value)


def _words(text: str) -> Iterator[str]:
    # a comma doubled is a comma within the value; single ones separate
    start = at = 0
    while at < len(text):
        if text[at] == ",":
            if text[at + 1 : at + 2] == ",":
                at += 2
                continue
            yield text[start:at]
            start = at + 1
        at += 1
    if start < len(text):
        yield text[start:]


def _unescaped(text: str) -> str:
    return text.replace(",,", ",")


def _object(text: str) -> dict[str, Json]:
    try:
        tree = json.loads(_STRING.sub(_double_quoted, text))
    except UNREADABLE as odd:
        # without the text, in which there may be a password
        raise UsageError(f"an option in braces is not JSON: {odd}") from None
    if not isinstance(tree, dict):
        raise UsageError("an option in braces is not a JSON object")
    return tree


def _double_quoted(found: re.Match[str]) -> str:
    """QEMU takes 'text' too (qobject/json-lexer.c)."""
    if found[0].startswith('"'):
        return found[0]
    inner = re.sub(r"\\.|\"", lambda one: _QUOTES.get(one[0], one[0]), found[0][1:-1])
    return f'"{inner}"'


def _flat(prefix: str, tree: dict[str, Json]) -> Iterator[Pair]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        match value:
            case dict():
                yield from _flat(f"{name}.", value) if value else [(name, Empty.OBJECT)]
            case list():
                numbered: dict[str, Json] = {str(i): item for i, item in enumerate(value)}
                yield from _flat(f"{name}.", numbered) if value else [(name, Empty.LIST)]
            case _:
                yield name, value


def _json_of(value: Scalar) -> Json:
    match value:
        case Bare.KEY:
            return True
        case Empty.OBJECT:
            return {}
        case Empty.LIST:
            return []
        case _:
            return value


def _lists(tree: Json) -> Json:
    if not isinstance(tree, dict) or not tree:
        return tree
    inner = {key: _lists(value) for key, value in tree.items()}
    if all(re.fullmatch(r"\d+", key) for key in inner):
        return [inner[key] for key in sorted(inner, key=int)]
    return inner
