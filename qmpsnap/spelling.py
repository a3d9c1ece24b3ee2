"""Names that are no text, as a path may be of any bytes: the only place that spells them for JSON.

Python has them as surrogates, which UTF-8 and so JSON cannot take.
"""

from __future__ import annotations

from typing import Any

import msgspec


def spelled(text: str) -> str:
    """*text* as it is, if it is one; else with `\\udcff` for what is none."""
    return text.encode(errors="backslashreplace").decode()


def encode(value: Any) -> bytes:
    """*value* as a file's content: indented JSON, a newline at the end; names that are no text are
    spelled.

    They can be read then, and no longer be opened: better than to lose what else is told.
    """
    try:
        content = msgspec.json.encode(value)
    except UnicodeEncodeError:
        content = msgspec.json.encode(_spelled(msgspec.to_builtins(value)))
    return msgspec.json.format(content, indent=2) + b"\n"


def _spelled(tree: Any) -> Any:
    match tree:
        case str():
            return spelled(tree)
        case dict():
            return {_spelled(key): _spelled(value) for key, value in tree.items()}
        case list() | tuple():
            return [_spelled(one) for one in tree]
    return tree
