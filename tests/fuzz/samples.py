"""A good value of any of our formats, made from its type: all that may be there is there."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

ID = "20261122T165057123Z"
LATER = "20261122T165058000Z"
MOMENT = "2026-11-22T16:50:57.123Z"
DIGEST = "ab" * 32
# what a field of that name has to hold, or would not be believed
_KNOWN: dict[str, Any] = {
    "id": ID, "vm": "web", "point": ID, "parent": LATER, "revision": 1, "revision_id": LATER,
    "taken_at": MOMENT, "shipped_at": MOMENT, "sampled_at": MOMENT, "recorded_at": MOMENT,
    "started_at": MOMENT, "booted_at": MOMENT, "at": MOMENT, "since": MOMENT, "origin": "web2",
    "blake3": DIGEST, "pid": 1, "phase": "holding",
}  # fmt: skip


def sample(kind: Any, **other: object) -> Any:
    """Such a value, as JSON has it; *other* are fields of the outermost one."""
    value = msgspec.json.decode(_encoded(kind))
    return {**value, **other} if other else value


def content(kind: Any, **other: object) -> bytes:
    """The content of a file that holds such a value."""
    return msgspec.json.encode(sample(kind, **other))


@cache
def _encoded(kind: Any) -> bytes:
    return msgspec.json.encode(_of(inspect.type_info(kind), "", 4))


def _of(info: inspect.Type, name: str, depth: int) -> Any:
    match info:
        case inspect.Metadata():
            return _of(info.type, name, depth)
        case inspect.StructType():
            found = {one.encode_name: _of(one.type, one.encode_name, depth) for one in info.fields}
            if info.tag_field is not None:
                found[info.tag_field] = info.tag
            return found
        case inspect.UnionType():
            kinds = [one for one in info.types if not isinstance(one, inspect.NoneType)]
            recursive = depth <= 0 or name == "before"
            return None if recursive and info.includes_none else _of(kinds[0], name, depth)
        case inspect.ListType() | inspect.VarTupleType():
            return [_of(info.item_type, name, depth - 1)]
        case inspect.TupleType():
            return [_of(one, name, depth - 1) for one in info.item_types]
        case inspect.DictType():
            return {_of(info.key_type, "key", 0): _of(info.value_type, name, depth - 1)}
        case inspect.LiteralType():
            return info.values[-1]
        case inspect.StrType():
            if info.pattern is not None:
                return DIGEST
            known = _KNOWN.get(name)
            return known if isinstance(known, str) else name or "x"
        case inspect.IntType():
            known = _KNOWN.get(name)
            return known if isinstance(known, int) else max(info.ge or 0, 1)
        case inspect.FloatType():
            return 0.5
        case inspect.BoolType():
            return True
        case inspect.AnyType():
            return {"any": [1, "x", None]}
        case inspect.RawType():
            return {"raw": 1}
    return None
