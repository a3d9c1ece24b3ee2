"""The JSON Schema of a struct: the only place that asks msgspec for one."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(kind: Any) -> dict[str, Any]:
    """The JSON Schema of *kind*, alike to the letter whichever msgspec made it.

    From 0.23 on that takes the indentation out of descriptions, which before it left in.
    """
    made = msgspec.json.schema(kind)
    for one in (made, *made.get("$defs", {}).values()):
        if "description" in one:
            one["description"] = inspect.cleandoc(one["description"])
    return {"$schema": _DIALECT, **made}
