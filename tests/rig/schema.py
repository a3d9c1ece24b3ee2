"""What of JSON Schema our schemas use, so that files can be held against them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
    "integer": int, "number": (int, float),
}  # fmt: skip
_KNOWN = frozenset(
    {"$schema", "$ref", "$defs", "title", "description", "default", "type", "enum", "const"}
    | {"anyOf", "properties", "required", "items", "additionalProperties", "minimum", "maximum"}
)


def wrong(value: Any, schema: dict[str, Any]) -> list[str]:
    """What of *value* is not as *schema* has it, each with the way to it; none if all is well."""
    return list(_wrong(value, schema, schema.get("$defs", {}), "$"))


def _wrong(value: Any, schema: dict[str, Any], defs: dict[str, Any], at: str) -> Iterator[str]:
    assert set(schema) <= _KNOWN, f"{at}: the schema has words that nobody checks here: {schema}"
    if ref := schema.get("$ref"):
        yield from _wrong(value, defs[ref.removeprefix("#/$defs/")], defs, at)
    if kinds := schema.get("anyOf"):
        tried = [list(_wrong(value, kind, defs, at)) for kind in kinds]
        if all(tried):
            # the kind that it comes nearest to: what is wrong lies the deepest
            yield from max(tried, key=lambda found: len(found[0].split(" ")[0].rstrip(":")))
    if (kind := schema.get("type")) is not None and not _is_of(value, kind):
        yield f"{at}: {value!r} is no {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} is none of {schema['enum']}"
    if "const" in schema and value != schema["const"]:
        yield f"{at}: {value!r} is not {schema['const']}"
    if isinstance(value, int) and not schema.get("minimum", value) <= value:
        yield f"{at}: {value} is too small"
    if isinstance(value, int) and not schema.get("maximum", value) >= value:
        yield f"{at}: {value} is too large"
    if isinstance(value, dict):
        yield from _wrong_object(value, schema, defs, at)
    if isinstance(value, list) and "items" in schema:
        for number, one in enumerate(value):
            yield from _wrong(one, schema["items"], defs, f"{at}[{number}]")


def _wrong_object(
    value: dict[str, Any], schema: dict[str, Any], defs: dict[str, Any], at: str
) -> Iterator[str]:
    known = schema.get("properties", {})
    yield from (f"{at}.{key} is missing" for key in schema.get("required", ()) if key not in value)
    more = schema.get("additionalProperties", {})
    for key, one in value.items():
        inner = known.get(key, more if isinstance(more, dict) else {})
        yield from _wrong(one, inner, defs, f"{at}.{key}")


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES[kind])
