"""The only place that knows what the fields of an option are called: QEMU's options, typed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from qmpsnap.errors import UsageError
from qmpsnap.hypervisor.machine import keyval
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.keyval import Fields, Pair

# Options that are key=value lists, with the key that their first word may leave out.
# qemu-options.hx and the QemuOptsLists of 7.2 to 11.1.
IMPLIED: dict[str, str | None] = {
    "M": "type", "accel": "accel", "acpitable": None, "action": None, "add-fd": None,
    "audio": "driver", "audiodev": "driver", "blockdev": "driver", "boot": "order",
    "chardev": "backend", "compat": None, "device": "driver", "display": "type", "drive": None,
    "fsdev": "fsdriver", "fw_cfg": "name", "icount": "shift", "iscsi": None, "m": "size",
    "machine": "type", "mon": "chardev", "msg": "timestamp", "name": "guest", "net": "type",
    "netdev": "type", "nic": "type", "numa": "type", "object": "qom-type",
    "option-rom": "romfile", "overcommit": None, "plugin": "file", "rtc": None,
    "run-with": None, "sandbox": "enable", "semihosting-config": "enable", "smbios": None,
    "smp": "cpus", "spice": None, "tpmdev": "type", "trace": "enable", "virtfs": "fsdriver",
    "vnc": "vnc",
}  # fmt: skip
_JSON_TOO = frozenset({"audiodev", "blockdev", "compat", "device", "display", "netdev", "object"})

# -hda FILE and its kin are drives: `if`, then `index` and `media` as vl.c's drive_add has them.
_SHORT_DRIVES: dict[str, tuple[Pair, ...]] = {
    "hda": (("index", "0"), ("media", "disk")), "hdb": (("index", "1"), ("media", "disk")),
    "hdc": (("index", "2"), ("media", "disk")), "hdd": (("index", "3"), ("media", "disk")),
    "cdrom": (("index", "2"), ("media", "cdrom")),
    "fda": (("if", "floppy"), ("index", "0")), "fdb": (("if", "floppy"), ("index", "1")),
    "pflash": (("if", "pflash"),), "mtdblock": (("if", "mtd"),), "sd": (("if", "sd"),),
}  # fmt: skip
DRIVES = ("drive", *_SHORT_DRIVES)


def fields_of(option: Option) -> Fields:
    """The fields of *option*. Raises UsageError if it has none, or they make no sense."""
    if option.name not in IMPLIED or option.value is None:
        raise UsageError(f"{option}: not a key=value option")
    json_too = option.name in _JSON_TOO
    return keyval.parse(option.value, IMPLIED[option.name], json_too=json_too)


def option_of(name: str, fields: Fields) -> Option:
    """The option *name* that says *fields*, as JSON if they were."""
    return Option(name, keyval.format(fields, IMPLIED[name]))


@dataclass(frozen=True, slots=True)
class View:
    """An option read through its fields; what we have no word for stays in them."""

    fields: Fields
    NAME: ClassVar[str]

    @classmethod
    def of(cls, option: Option) -> Self:
        return cls(fields_of(option))

    def option(self) -> Option:
        return option_of(self.NAME, self.fields)

    @property
    def id(self) -> str | None:
        return self.fields.get("id")


class Machine(View):
    """-machine or -M; QEMU merges several, the later one winning key by key."""

    NAME = "machine"

    @property
    def type(self) -> str | None:
        return self.fields.get("type")


class Memory(View):
    NAME = "m"

    @property
    def size(self) -> str | None:
        return self.fields.get("size")


class Blockdev(View):
    NAME = "blockdev"

    @property
    def node_name(self) -> str | None:
        return self.fields.get("node-name")

    @property
    def driver(self) -> str | None:
        return self.fields.get("driver")

    @property
    def read_only(self) -> bool:
        return self.fields.on("read-only")


class Drive(View):
    """-drive, or one of the short options (-hda, -cdrom, -pflash...), which are drives as well."""

    NAME = "drive"

    @classmethod
    def of(cls, option: Option) -> Self:
        if option.name in _SHORT_DRIVES and option.value is not None:
            # the file name is taken as it stands: no commas to escape
            return cls(Fields((*_SHORT_DRIVES[option.name], ("file", option.value))))
        return cls(fields_of(option))

    @property
    def interface(self) -> str | None:
        return self.fields.get("if")

    @property
    def file(self) -> str | None:
        return self.fields.get("file", "file.filename")

    @property
    def format(self) -> str | None:
        return self.fields.get("format", "driver")

    @property
    def media(self) -> str:
        return self.fields.get("media") or "disk"

    @property
    def read_only(self) -> bool:
        return self.media == "cdrom" or any(map(self.fields.on, ("readonly", "read-only")))


class Device(View):
    NAME = "device"

    @property
    def driver(self) -> str | None:
        return self.fields.get("driver")

    @property
    def bus(self) -> str | None:
        return self.fields.get("bus")

    @property
    def addr(self) -> str | None:
        return self.fields.get("addr")


class Chardev(View):
    NAME = "chardev"

    @property
    def backend(self) -> str | None:
        return self.fields.get("backend")

    @property
    def path(self) -> str | None:
        return self.fields.get("path")

    @property
    def server(self) -> bool:
        return self.fields.on("server")


class Netdev(View):
    NAME = "netdev"

    @property
    def type(self) -> str | None:
        return self.fields.get("type")


class Object(View):
    NAME = "object"

    @property
    def qom_type(self) -> str | None:
        return self.fields.get("qom-type")


def applied_sets(line: CommandLine) -> CommandLine:
    """*line* with each `-set group.id.key=value` written into the option that it is about.

    Raises UsageError for a -set that QEMU would not take.
    """
    options: list[Option] = []
    for option in line.options:
        if option.name == "set":
            _apply(option, options)
        else:
            options.append(option)
    return CommandLine(line.binary, tuple(options))


def guest_name(line: CommandLine) -> str | None:
    """What -name calls the guest."""
    names = [fields_of(option).get("guest") for option in line.all("name")]
    return next((name for name in reversed(names) if name), None)


def accelerators(line: CommandLine) -> list[str]:
    """What *line* asks for, in QEMU's order; without a word it is TCG."""
    asked: list[str] = []
    for option in line.options:
        if option.name == "enable-kvm":
            asked.append("kvm")
        elif option.name in ("accel", "machine"):
            asked += [one for one in (fields_of(option).get("accel") or "").split(":") if one]
    return asked or ["tcg"]


def _apply(setting: Option, options: list[Option]) -> None:
    path, equals, value = (setting.value or "").partition("=")
    group, _, rest = path.partition(".")
    ident, _, key = rest.partition(".")
    if not (equals and key and group in IMPLIED):
        raise UsageError(f"{setting}: not group.id.key=value")
    for index, option in enumerate(options):
        # JSON options are no QemuOpts: -set does not see them
        if option.name != group or (option.value or "{").startswith("{"):
            continue
        fields = fields_of(option)
        if fields.get("id") == ident:
            # behind the others, as QEMU does: the last one counts
            changed = Fields((*fields.pairs, (key, value)))
            options[index] = option_of(group, changed)
            return
    raise UsageError(f"{setting}: there is no -{group} with that id before it")
