"""The only place that turns a command line into JSON records for a manifest, and back."""

from __future__ import annotations

from collections.abc import Sequence

from qmpsnap.errors import ManifestError
from qmpsnap.hypervisor.machine import keyval
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.keyval import Bare, Fields, Json, Pair
from qmpsnap.hypervisor.machine.options import IMPLIED, fields_of, option_of

Record = dict[str, Json]


def as_json(line: CommandLine) -> list[Record]:
    """One record an option, in order: `option`, and `json`, `keyval` or `text` for its value.

    In `keyval` a key that came without a value is true, and one that came twice has a list.
    """
    return [_record(option) for option in line.options]


def from_json(binary: str, records: Sequence[Record]) -> CommandLine:
    """The command line that `as_json` made *records* of.

    Raises ManifestError for a record that it cannot have made.
    """
    return CommandLine(binary, tuple(_option(record) for record in records))


def _record(option: Option) -> Record:
    if option.value is None:
        return {"option": option.name}
    as_text: Record = {"option": option.name, "text": option.value}
    if option.name not in IMPLIED:
        return as_text
    fields = fields_of(option)
    record: Record = {"option": option.name}
    if fields.json:
        record["json"] = keyval.nested(fields)
    else:
        record["keyval"] = _keyval(fields)
    # the typed form is for reading; where it would not say the same, the text stays
    return record if _option(record) == option else as_text


def _keyval(fields: Fields) -> dict[str, Json]:
    out: dict[str, Json] = {}
    for key, value in fields.pairs:
        new: Json = True if value is Bare.KEY else keyval.spelled(value)
        if key not in out:
            out[key] = new
        elif isinstance(old := out[key], list):
            old.append(new)
        else:
            out[key] = [old, new]
    return out


def _option(record: Record) -> Option:
    match record:
        case {"option": str(name), "json": dict(tree)} if name in IMPLIED:
            return option_of(name, keyval.from_json(tree))
        case {"option": str(name), "keyval": dict(tree)} if name in IMPLIED:
            return option_of(name, Fields(tuple(_pairs(tree))))
        case {"option": str(name), "text": str(text)}:
            return Option(name, text)
        case {"option": str(name)} if len(record) == 1:
            return Option(name)
        case _:
            raise ManifestError(f"not an option of a command line: {record}")


def _pairs(tree: dict[str, Json]) -> list[Pair]:
    pairs: list[Pair] = []
    for key, value in tree.items():
        for one in value if isinstance(value, list) else [value]:
            if one is True:
                pairs.append((key, Bare.KEY))
            elif isinstance(one, str):
                pairs.append((key, one))
            else:
                raise ManifestError(f"not a value of a key: {key}: {one!r}")
    return pairs
