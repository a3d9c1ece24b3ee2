"""`machine.json`: what a new QEMU needs to take up a captured state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from qmpsnap.dialect import schema
from qmpsnap.engine import reconciliation
from qmpsnap.engine.details import Details
from qmpsnap.engine.reconciliation import Reconciliation
from qmpsnap.engine.survey import Survey
from qmpsnap.errors import Blocked, HalfMissing, ManifestError
from qmpsnap.hypervisor.machine import records, secrecy
from qmpsnap.hypervisor.machine.cmdline import CommandLine
from qmpsnap.hypervisor.machine.inventory import Inventory
from qmpsnap.store.head import readable, version_of

_FORMAT: Literal["qmpsnap-machine"] = "qmpsnap-machine"
_VERSION = 2


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """The captured machine. *machine_type* is resolved: `pc` became `pc-i440fx-7.2`.

    *options* is the command line as typed options, *cwd* the folder its paths start from; both
    are None when QEMU's process could not be found (then no RAM was taken either). What is secret
    in them is left out: `details.withheld` has its names. *hotplugged* and *unplugged* came and
    went at run time; *reconciled* is None where nothing did. Version 1 has neither *reconciled*
    nor *details*, and did not know how to bring a machine back whose devices came and went.
    """

    format: Literal["qmpsnap-machine"] = "qmpsnap-machine"
    version: Annotated[int, msgspec.Meta(ge=1, le=_VERSION)] = _VERSION
    vm: str
    qemu_version: str
    qemu_package: str
    machine_type: str | None
    exe: str | None
    cwd: str | None
    options: list[dict[str, Any]] | None
    hotplugged: list[str]
    unplugged: list[str]
    inventory: Inventory
    reconciled: Reconciliation | None = None
    details: Details | None = None

    def command_line(self) -> tuple[CommandLine, Path]:
        """A command line that makes this machine, and its folder.

        Raises HalfMissing if it is not known.
        """
        if self.options is None or self.cwd is None or self.exe is None:
            raise HalfMissing(f"{self.vm}: the captured command line is not known")
        options = self.reconciled.options if self.reconciled else self.options
        return records.from_json(self.exe, options), Path(self.cwd)


def of(facts: Survey) -> Configuration:
    """The configuration of a running VM."""
    line = facts.attached.line if facts.attached else None
    plain = secrecy.without(line)[0] if line else None
    return Configuration(
        vm=facts.machine.name,
        qemu_version=facts.abilities.version,
        qemu_package=facts.abilities.package,
        machine_type=facts.inventory.machine,
        exe=facts.process.exe if facts.process else None,
        cwd=str(facts.attached.cwd) if facts.attached else None,
        options=records.as_json(plain) if plain else None,
        hotplugged=list(facts.reconciled.plugged) if facts.reconciled else [],
        unplugged=list(facts.reconciled.unplugged) if facts.reconciled else [],
        inventory=facts.inventory,
        reconciled=reconciliation.of(facts.reconciled),
        details=facts.details,
    )


def refuse_unwritable(facts: Survey) -> None:
    """Raises Blocked for a machine some of whose words are no UTF-8, and so in no JSON."""
    try:
        encode(of(facts))
    except UnicodeEncodeError as odd:
        words = odd.object.encode(errors="surrogateescape")[:80]
        raise Blocked(
            f"{facts.machine.name}: what its QEMU says of it is not UTF-8: {words!r}",
            hint="no restore could say it again; rename that file, or what it is",
        ) from None


def encode(configuration: Configuration) -> bytes:
    return msgspec.json.format(msgspec.json.encode(configuration), indent=2) + b"\n"


def decode(text: str | bytes, path: str) -> Configuration:
    """Raises ManifestError, naming *path* and the key; also for one that could be left out.

    What `encode` writes is written whole, so that a key that is not there was taken away.
    """
    version = version_of(text, _FORMAT, _VERSION, path)
    with readable(text, path):
        configuration = msgspec.json.decode(text, type=Configuration)
    if version == _VERSION and (gone := _gone(text, configuration)):
        raise ManifestError(f"{path}: Object missing required field `{gone}`")
    return configuration


def _gone(text: str | bytes, configuration: Configuration) -> str | None:
    """The path of the first key that *text* has not, and that stands for its default."""
    whole = msgspec.json.decode(msgspec.json.encode(configuration))
    return next(_missing(whole, msgspec.json.decode(text), "$"), None)


def _missing(whole: Any, there: Any, path: str) -> Iterator[str]:
    if isinstance(whole, dict):
        for key, value in whole.items():
            if key not in there:
                yield f"{path}.{key}"
            else:
                yield from _missing(value, there[key], f"{path}.{key}")
    elif isinstance(whole, list):
        for index, value in enumerate(whole):
            yield from _missing(value, there[index], f"{path}[{index}]")


def schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema of `machine.json`, by the word that its file is named for."""
    return {_FORMAT: schema(Configuration)}
