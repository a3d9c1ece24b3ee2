"""The only place that splits QEMU's command line into options and joins it again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from qmpsnap.errors import Blocked, UsageError

# `QEMU -version -NAME` for every name in the help of 7.2, 10.0 and 11.1: these ask for no value.
FLAGS = frozenset({
    "S", "async-teardown", "audio-help", "daemonize", "enable-kvm", "enable-sync-profile",
    "full-screen", "h", "help", "jitdump", "mem-prealloc", "no-acpi", "no-fd-bootchk", "no-hpet",
    "no-reboot", "no-shutdown", "no-user-config", "nodefaults", "nographic", "old-param",
    "one-insn-per-tb", "only-migratable", "perfmap", "portrait", "preconfig", "s", "semihosting",
    "singlestep", "snapshot", "usb", "version", "win2k-hack", "xen-attach", "xen-domid-restrict",
})  # fmt: skip
_DISK_IMAGE = "hda"  # what a first argument without a dash is short for


@dataclass(frozen=True, slots=True)
class Option:
    """One option: `-name value`, or `-name` alone where *value* is None."""

    name: str
    value: str | None = None

    def argv(self) -> list[str]:
        return [f"-{self.name}"] if self.value is None else [f"-{self.name}", self.value]

    def __str__(self) -> str:
        return " ".join(self.argv())


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A QEMU's command line; the order of its options is part of what it says."""

    binary: str
    options: tuple[Option, ...] = ()

    def argv(self) -> list[str]:
        """What to execute: `parse(line.argv()) == line`."""
        return [self.binary, *(word for option in self.options for word in option.argv())]

    def all(self, *names: str) -> list[Option]:
        """The options called one of *names*, in order."""
        return [option for option in self.options if option.name in names]

    def has(self, *names: str) -> bool:
        return any(option.name in names for option in self.options)

    def without(self, names: Collection[str]) -> CommandLine:
        kept = tuple(option for option in self.options if option.name not in names)
        return replace(self, options=kept)

    def append(self, *options: Option) -> CommandLine:
        return replace(self, options=(*self.options, *options))

    def replace(self, rule: Callable[[int, Option], Iterable[Option]]) -> CommandLine:
        """Each option gives way to what *rule* makes of its index and itself: none, one, many."""
        new = (out for index, option in enumerate(self.options) for out in rule(index, option))
        return replace(self, options=tuple(new))


def parse(argv: Sequence[str]) -> CommandLine:
    """The options of *argv*, whose first word is the binary.

    `--name` is `-name`, and a bare word is the disk image: `-hda` says the same.

    Raises UsageError for an option that lacks its value, and Blocked for -writeconfig. What a
    -readconfig names is read by `readconfig.included`.
    """
    if not argv:
        raise UsageError("an empty command line starts no QEMU")
    words = iter(argv[1:])
    options = []
    for word in words:
        if not word.startswith("-"):
            options.append(Option(_DISK_IMAGE, word))
            continue
        name = word[2:] if word.startswith("--") else word[1:]
        if name == "writeconfig":
            raise Blocked("-writeconfig: does not start a machine")
        if name in FLAGS:
            options.append(Option(name))
            continue
        try:
            options.append(Option(name, next(words)))
        except StopIteration:
            raise UsageError(f"-{name} lacks its value") from None
    return CommandLine(argv[0], tuple(options))
