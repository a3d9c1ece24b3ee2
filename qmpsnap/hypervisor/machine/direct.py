"""The only place that knows which files a machine is booted from without a disk of its own."""

from __future__ import annotations

from pathlib import Path

from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.options import Machine, option_of

OPTIONS = ("kernel", "initrd", "dtb", "shim")


def files(line: CommandLine, cwd: Path) -> dict[str, str]:
    """The absolute path behind each of OPTIONS that *line*, started in *cwd*, gives."""
    return {
        option.name: str(cwd / option.value)
        for option in spelled_out(line).all(*OPTIONS)
        if option.value
    }


def spelled_out(line: CommandLine) -> CommandLine:
    """*line* with `-machine kernel=...` and its like as the options that are short for them."""
    options: list[Option] = []
    for option in line.options:
        if option.name not in ("machine", "M"):
            options.append(option)
            continue
        fields = Machine.of(option).fields
        rest = fields.without(*OPTIONS)
        options.append(option if rest == fields else option_of(option.name, rest))
        given = ((name, fields.get(name)) for name in OPTIONS)
        options += [Option(name, value) for name, value in given if value]
    return CommandLine(line.binary, tuple(options))
