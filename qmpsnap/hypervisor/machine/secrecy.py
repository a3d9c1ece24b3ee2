"""The only place that knows which words of a command line are secret, and leaves them out."""

from __future__ import annotations

import json
import re
from typing import Any

from qmpsnap.errors import UNREADABLE, UsageError
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.keyval import Bare, Fields, Json, Scalar
from qmpsnap.hypervisor.machine.options import DRIVES, IMPLIED, fields_of, option_of

_SECRETS = frozenset({"password", "x509-key-password", "cookie", "rxcookie", "txcookie"})
_YES_OR_NO = frozenset({"on", "off", "yes", "no", "true", "false", "y", "n"})
_IMAGES = frozenset({*DRIVES, "blockdev", "iscsi"})
# iscsi has the %
_IN_URL = re.compile(r"(?P<before>[a-z][a-z0-9+.-]*://[^/@\s:%]*)[:%][^/\s]*@", re.I)
_SIGNED = re.compile(
    r"(?P<before>[?&](?:[\w-]*(?:signature|token|credential)|sig|key)=)[^&\s]*", re.I
)
_IN_RBD = re.compile(r":key=[^:]*")
_JSON = "json:"


def without(line: CommandLine) -> tuple[CommandLine, list[str]]:
    """*line* without what is secret in it, and what that was: `-spice password`.

    Where a secret is read from stays: a file's name, the id of a -object secret. What the guest is
    given (-fw_cfg, -smbios, -append) is the machine's own, and stays too.
    """
    options, withheld = [], []
    for option in line.options:
        kept, keys = _without(option)
        options.append(kept)
        withheld += [f"-{option.name} {key}" for key in keys]
    return CommandLine(line.binary, tuple(options)), withheld


def of_image(name: str) -> str:
    """The name of an image, without a password in it."""
    if name.startswith(_JSON):
        try:
            tree = json.loads(name.removeprefix(_JSON))
        except UNREADABLE:
            return _JSON  # what cannot be read cannot be looked through
        return _JSON + json.dumps(_of_tree(tree), separators=(",", ":"), ensure_ascii=False)
    name = _IN_RBD.sub("", name) if name.startswith("rbd:") else name
    return _SIGNED.sub(r"\g<before>", _IN_URL.sub(r"\g<before>@", name))


def _without(option: Option) -> tuple[Option, list[str]]:
    """*option*, and the names of the keys whose values are gone."""
    if option.value is None:
        return option, []
    if option.name not in IMPLIED:
        value = option.value
        if option.name in _IMAGES:
            value = of_image(value)
        elif option.name == "set":
            value = _of_setting(value)
        elif option.name == "incoming" and value.startswith("exec:"):
            value = "exec:"  # any command with any words; a restore has its own
        return Option(option.name, value), [] if value == option.value else [value]
    try:
        fields = fields_of(option)
    except UsageError:
        return option, []
    title = fields.get("id") or ""
    hidden = [key for key, value in fields if _is_secret(option.name, fields, key, value)]
    kept = fields.keep(lambda key: key not in hidden)
    if option.name in _IMAGES:
        for key, word in kept.pairs:
            if isinstance(word, str) and (plain := of_image(word)) != word:
                kept = kept.set(key, plain)
                hidden.append(key)
    if not hidden:
        return option, []
    return option_of(option.name, kept), [f"{title} {key}".strip() for key in hidden]


def _of_setting(text: str) -> str:
    """-set group.id.key=value, without a value that is secret."""
    path, equals, value = text.partition("=")
    key = path.rpartition(".")[2]
    hidden = key in _SECRETS or (path.startswith("object.") and key == "data")
    return f"{path}{equals}" + ("" if hidden else of_image(value))


def _is_secret(name: str, fields: Fields, key: str, value: Scalar) -> bool:
    if name == "object" and (fields.get("qom-type") or "").startswith("secret"):
        return key == "data"
    if key.rpartition(".")[2] not in _SECRETS:
        return False
    # -vnc only says whether there is to be one
    return not (name == "vnc" and (value is Bare.KEY or str(value) in _YES_OR_NO))


def _of_tree(tree: Any) -> Json:
    match tree:
        case dict():
            return {key: _of_tree(one) for key, one in tree.items() if key not in _SECRETS}
        case list():
            return [_of_tree(one) for one in tree]
        case str():
            return of_image(tree)
        case int() | float() | None:
            return tree
    return None
